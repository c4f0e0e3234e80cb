"""What helps an encoder to learn in a short training: one change at a time, judged on validation.

    python benchmarks/tries.py run --data_dir data/cifar10-images --method supcon --head linear
    python benchmarks/tries.py many tries.txt --workers 6   a try per line of a file, six at a time
    python benchmarks/tries.py show                         benchmarks/tries.jsonl as a table

A try trains with the parts of the scripts and, beside them, with ideas from the literature that the
scripts do not have. Its settings and figures become a row of --out. Test images are never seen.
`many` leaves out what has a row already, so the same command goes on where it was stopped.
"""

import argparse
import functools
import json
import multiprocessing
import os
import shlex
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import common  # isort: skip  # noqa: F401  (before torch, which reads how threads wait)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import models, optimizers
from common.config import DatasetName, EncoderName, OptimizerName, parse
from common.data import augmentation, datasets
from common.data.philox import Random
from common.errors import UserError
from common.evaluation import probes, report
from common.files import read_rows
from common.losses import reconstruction_loss
from common.run import runtime

ROWS = Path(__file__).with_name("tries.jsonl")
MEASURED = ("linear", "own", "class_mean", "mse_of_pca")  # accuracies, and a ratio of errors


@dataclass(frozen=True)
class Config:
    method: Literal["joint", "supcon", "ae"] = "supcon"
    # Data
    dataset: DatasetName = "folder"
    data_dir: str = "data/cifar10-images"
    image_size: int = 32
    limit_train: int | None = None
    labels_per_class: int | None = None
    skip_unreadable: bool = False
    labels: str | None = None
    white: float | None = None
    test: bool = False
    augment: augmentation.Kind = "crop_flip"
    flip: bool = True
    # Model
    encoder: EncoderName = "airbench"
    width: int = 16
    blocks: int = 0
    latent_dim: int = 128  # of joint and ae
    head: Literal["mlp", "linear", "none"] = "mlp"  # of supcon
    linear_path: bool = False  # of train_ae.py
    # Loss
    views: int = 1
    temperature: float = 0.1
    centers: float = 0.0  # weight of learned class centers as further columns of the softmax
    queue: int = 0  # this many embeddings of former steps as further columns
    sincere: bool = False  # the other positives leave the denominator
    cross_entropy_weight: float = 0.0
    label_smoothing: float = 0.1  # of joint
    noise: float = 0.0  # ae: standard deviation of what is added to the input, not to the target
    # Optimization
    epochs: int = 4
    batch_size: int = 500
    optimizer: OptimizerName = "muon"
    learning_rate: float = 0.2
    adamw_learning_rate: float = 0.005
    weight_decay: float = 1e-4
    lookahead: float = 0.0  # decay of the average that the weights return to every five steps
    schedule: optimizers.Schedule = "linear"
    grow: bool = False  # smaller images in the first 60 % of the steps
    probe: bool = True  # False: leave out the linear probe, to save time
    precision: Literal["auto", "no", "bf16"] = "no"
    seed: int = 0
    out: str = str(ROWS)


class Contrastive:
    """The supervised contrastive loss with the variants that are tried; pairs as one matrix."""

    def __init__(self, config: Config, dim: int):
        self.config = config
        self.queue, self.queue_labels = torch.zeros(0, dim), torch.zeros(0, dtype=torch.long)

    def __call__(self, embeddings: Tensor, labels: Tensor, centers: Tensor | None) -> Tensor:
        """Embeddings (B,P) of unit length, labels (B,), centers (K,P) or None; a scalar."""
        config = self.config
        self.queue = self.queue.to(embeddings.device)
        self.queue_labels = self.queue_labels.to(embeddings.device)
        others = torch.cat([embeddings, self.queue])
        same = labels[:, None] == torch.cat([labels, self.queue_labels])
        itself = torch.zeros_like(same)
        itself[:, : len(labels)].fill_diagonal_(True)
        similarity = (embeddings @ others.T / config.temperature).masked_fill(itself, -torch.inf)
        if config.sincere:
            negatives = similarity.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
            log = similarity - torch.logaddexp(similarity, negatives)
        else:
            log = similarity - similarity.logsumexp(1, keepdim=True)
        counts = (same & ~itself).sum(1)
        per_anchor = -torch.where(same & ~itself, log, 0).sum(1) / counts.clamp(min=1)
        loss = per_anchor.sum() / (counts > 0).sum().clamp(min=1)
        if centers is not None:
            to_centers = embeddings @ F.normalize(centers, dim=1).T / config.temperature
            columns = torch.cat([to_centers, similarity], dim=1)
            loss = loss * (1 - config.centers) + config.centers * F.cross_entropy(columns, labels)
        if config.queue:
            self.queue = torch.cat([embeddings.detach(), self.queue])[: config.queue]
            self.queue_labels = torch.cat([labels, self.queue_labels])[: config.queue]
        return loss


DATA = (
    *("dataset", "data_dir", "image_size", "limit_train", "labels_per_class", "skip_unreadable"),
    *("labels", "white", "test", "seed"),
)


def load(config: Config, device: torch.device) -> datasets.ImageData:
    """The images of a try; a worker reads them once for all tries that want the same."""
    wanted = {name: getattr(config, name) for name in DATA}
    wanted["seed"] = config.seed if config.labels_per_class else 0  # it chooses the labels only
    return _load(Config(**wanted), device)


@functools.cache
def _load(config: Config, device: torch.device) -> datasets.ImageData:
    return datasets.load(config, show_progress=False).to(device)


def build(config: Config, images: datasets.ImageData) -> tuple[nn.Module, models.Preprocess]:
    """The network of a try and what normalizes its input."""
    torch.manual_seed(config.seed)
    classes = len(images.class_names)
    sizes = {name: getattr(config, name) for name in ("image_size", "width", "blocks")}
    sizes["channels"] = images.channels
    mean, std = images.mean, images.std
    if config.method == "ae":
        mean = std = (0.5,) * images.channels
        sizes |= {"latent_dim": config.latent_dim, "linear_path": config.linear_path}
        network = models.build_autoencoder(config.encoder, **sizes)
    elif config.method == "joint":
        encoder = models.build_encoder(config.encoder, **sizes, latent_dim=config.latent_dim)
        network = models.JointClassifier(encoder, classes)
    else:
        encoder = models.build_encoder(config.encoder, **sizes, latent_dim=None)
        head = "mlp" if config.head == "none" else config.head
        dim = 128 if config.head != "none" else encoder.output_dim
        with_classifier = classes if config.cross_entropy_weight else None
        network = models.SupConNet(encoder, head, dim, with_classifier)
        network.head = nn.Identity() if config.head == "none" else network.head
        network.centers = nn.Parameter(torch.randn(classes, dim)) if config.centers else None
    device = images.train.labels.device
    preprocess = models.Preprocess(mean, std).to(device)
    network = runtime.place(network, device)
    models.fit_whitening(network, preprocess, images.train.sample(5000).blocks())
    if config.linear_path:
        pca, why_not = report.fit_pca(images.train, config.latent_dim)
        if pca is None:
            raise UserError(f"--linear_path begins as PCA, but {why_not}")
        network.begin_as_pca(pca.components, pca.mean)
    return network, preprocess


def train(config: Config, accelerator, network: nn.Module, preprocess: nn.Module, images) -> None:
    learned, device = images.train, accelerator.device
    optimizer = optimizers.build(config, network)
    steps = len(learned) // config.batch_size
    total = steps * config.epochs
    generator = torch.Generator().manual_seed(config.seed)
    noises = torch.Generator(device).manual_seed(config.seed)
    average = {name: value.clone() for name, value in network.state_dict().items()}
    contrastive = None
    for epoch in range(config.epochs):
        network.train()
        order = torch.randperm(len(learned), generator=generator).to(device)
        for k, indices in enumerate(order[: steps * config.batch_size].split(config.batch_size)):
            step = epoch * steps + k
            randoms = [Random(indices, config.seed, epoch, view) for view in range(config.views)]
            batch, labels = learned.images(indices), learned.labels[indices].repeat(config.views)
            inputs = torch.cat(
                [
                    preprocess(augmentation.augment(batch, random, config.augment, config.flip))
                    for random in randoms
                ]
            )
            if config.grow and step < 0.6 * total:
                side = config.image_size * (5 if step < 0.3 * total else 6) // 8
                inputs = F.interpolate(inputs, (side, side), mode="bilinear", antialias=True)
            share = optimizers.schedule(config.schedule, step, total, warmup_steps=0)
            optimizers.set_learning_rate(optimizer, share)
            noise = 0.0
            if config.noise:
                noise = config.noise * torch.randn(inputs.shape, generator=noises, device=device)
            with accelerator.autocast():
                outputs = network(inputs + noise)
            if config.method == "ae":
                loss = reconstruction_loss(outputs.float(), inputs, alpha=0.5)
            elif config.method == "joint":
                smoothing = config.label_smoothing
                loss = F.cross_entropy(outputs.float(), labels, label_smoothing=smoothing)
            else:
                embeddings, logits = outputs
                contrastive = contrastive or Contrastive(config, embeddings.shape[1])
                loss = contrastive(embeddings.float(), labels, network.centers)
                if logits is not None:
                    cross_entropy = F.cross_entropy(logits.float(), labels)
                    loss = loss + config.cross_entropy_weight * cross_entropy
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            if config.lookahead and (step + 1) % 5 == 0:  # Zhang et al. 2019, as in airbench
                decay, state = config.lookahead**5 * ((step + 1) / total) ** 3, network.state_dict()
                for name, value in average.items():
                    if value.is_floating_point():
                        value.lerp_(state[name], 1 - decay)
                        state[name].copy_(value)
        print(f"epoch {epoch + 1}/{config.epochs}: loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def measure(config: Config, network: nn.Module, preprocess: nn.Module, images) -> dict[str, float]:
    """Accuracies on validation, and the error of an autoencoder as a multiple of PCA's."""
    network.eval()
    blocks = [
        torch.cat([network.encoder(preprocess(batch)) for batch in split.blocks()])
        for split in (images.train, images.validation)
    ]
    labels = images.train.labels, images.validation.labels
    latents = probes.Latents(blocks[0], labels[0], blocks[1], labels[1])
    found = {}
    if config.probe:
        found["linear"] = probes.fit_linear(latents, len(images.class_names)).accuracy
    if hasattr(network, "classifier") and network.classifier is not None:
        logits = network.classifier(latents.validation)
        found["own"] = probes.accuracy(logits.argmax(1), labels[1])
    if config.method == "supcon":
        projected = latents.projected(network.head)
        nearest = report.scores.nearest_class_mean(projected.train, labels[0], projected.validation)
        found["class_mean"] = probes.accuracy(nearest, labels[1])
    if config.method == "ae":
        classifier = models.MLPClassifier(config.latent_dim, 1024, len(images.class_names), 0.1)
        classifier = classifier.to(labels[0].device)
        recipe = {"epochs": 20, "batch_size": 256, "learning_rate": 5e-3, "weight_decay": 1e-2}
        with torch.enable_grad():
            rows = list(probes.train_classifier(classifier, latents, **recipe, seed=config.seed))
        found["own"] = max(row["val/accuracy"] for row in rows)  # as train_ae.py, without views
        pca, _ = report.fit_pca(images.train, config.latent_dim)
        errors = report.autoencoder_errors(network, preprocess, images.validation, "val")
        found["mse_of_pca"] = errors["val/mse"] / report.pca_errors(pca, images.validation)["mse"]
    return found


def run(config: Config, at_once: int) -> dict[str, float]:
    """A try from its settings to its row in --out; so many share the machine."""
    accelerator = runtime.start(config.precision, config.seed)
    images = load(config, accelerator.device)
    network, preprocess = build(config, images)
    wall, cpu = time.perf_counter(), time.process_time()
    train(config, accelerator, network, preprocess, images)
    row = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    started = time.perf_counter()
    row |= measure(config, network, preprocess, images)
    row["measuring_seconds"] = time.perf_counter() - started
    facts = {k: runtime.facts(accelerator)[k] for k in ("commit", "torch", "device", "threads")}
    facts["at_once"] = at_once
    with open(config.out, "a") as file:
        file.write(json.dumps({**asdict(config), **row, "facts": facts}) + "\n")
    return row


def attempt(config: Config, at_once: int, ends: float) -> str | None:
    """A try in a worker, told in a line; None where the time is over."""
    if time.time() > ends:
        return None
    started = time.perf_counter()
    row = run(config, at_once)
    found = ", ".join(f"{name} {row[name]:.4f}" for name in MEASURED if name in row)
    seconds = f"{row['wall_seconds']:.0f} of {time.perf_counter() - started:.0f} s"
    return f"{changes(asdict(config))}, seed {config.seed}: {found} ({seconds})"


def many(words: list[str]) -> int:
    """All tries of a file that have no row yet, in its order, several at a time; 1 if one fails."""
    parser = argparse.ArgumentParser("tries.py many")
    parser.add_argument("file", type=Path, help="flags of a try in each line; # begins a comment")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e6, help="no try begins after them")
    arguments, common_flags = parser.parse_known_args(words)
    lines = [shlex.split(line, comments=True) for line in arguments.file.read_text().splitlines()]
    configs = [parse(Config, [*common_flags, *line]) for line in lines if line]
    outs = {Path(config.out) for config in configs}
    rows = [row for out in outs if out.exists() for row in read_rows(out)]
    left = [config for config in configs if not is_done(config, rows)]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // arguments.workers)))
    rest, failed = (arguments.workers, time.time() + 60 * arguments.minutes), 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, spawn) as pool:
        jobs = {pool.submit(attempt, config, *rest): config for config in left}
        for job in as_completed(jobs):
            if (error := job.exception()) is not None:  # the others go on
                failed += 1
                traceback.print_exception(error)
                print(f"failed: {changes(asdict(jobs[job]))}: {error}", flush=True)
            elif line := job.result():
                print(line, flush=True)
    return 1 if failed else 0


def is_done(config: Config, rows: list[dict]) -> bool:
    """Whether a row has these settings, and the linear probe if that is asked for."""
    wanted = settings(asdict(config))
    return any(settings(row) == wanted and ("linear" in row or not config.probe) for row in rows)


def settings(row: dict) -> dict:
    """What makes a try: all settings but where its data lie, its row goes, and what is measured."""
    apart = ("data_dir", "out", "probe")
    found = {f.name: row.get(f.name, f.default) for f in fields(Config) if f.name not in apart}
    return found | {"linear_path, tied": row.get("pca", False)}  # of a former form


def changes(row: dict) -> str:
    """How a try differs from the defaults."""
    defaults = settings({})
    found = settings(row).items()
    words = [f"{k} {v}" for k, v in found if v != defaults[k] and k not in ("seed", "precision")]
    return ", ".join(words) or "none (supcon)"


def table(path: Path) -> str:
    """All tries in Markdown: what differs from the defaults, and what was measured."""
    columns = ("change", "seed", "linear probe", "own classifier", "class mean", "MSE / PCA's")
    lines = [columns, ("---",) * len(columns)]
    for row in read_rows(path):
        cells = [f"{row[name]:.4f}" if name in row else "–" for name in MEASURED]
        lines.append((changes(row), str(row["seed"]), *cells))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    command, *words = sys.argv[1:] or ["show"]
    if command == "run":
        print(attempt(parse(Config, words), 1, float("inf")))
    elif command == "many":
        raise SystemExit(many(words))
    else:
        print(table(Path(words[0]) if words else ROWS), end="")
