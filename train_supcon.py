"""Supervised contrastive learning: pull images of one class together, push the others away.

A ResNet and an MLP head map two random views of each image to unit vectors z; the loss is L_out,
equation 2 of Khosla et al. 2020:  mean over views i of
-1/|P(i)| * sum over positives p of log( exp(z_i.z_p / T) / sum over a != i of exp(z_i.z_a / T) ).
Then the encoder is frozen and a linear classifier learns to read the labels from its features,
which come before the head. Without labels (--supervised=False) the loss is SimCLR's.

What to expect on 2 CPU cores: digits in a few minutes; natural images want a narrow network
(--width 16) there, and a GPU for the usual one.

    python train_supcon.py --width 8                      handwritten digits, no download
    accelerate launch train_supcon.py --dataset cifar10
    wandb sweep sweeps/supcon.yaml
"""

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list
from einops import rearrange

from common import (
    augmentation,
    checkpoints,
    data,
    evaluation,
    folders,
    health,
    memory,
    models,
    probes,
    runs,
    runtime,
    tables,
    tracking,
)
from common.config import Batch, Count, ImageSize, Natural, NonNegative, Positive, parse
from common.errors import UserError
from common.files import read_rows
from common.interruption import Interruption
from common.losses import supcon_collapse, supcon_floor, supcon_loss
from common.schedules import warmup_cosine

METHOD = "supcon"


@dataclass(frozen=True)
class Config:
    # Data
    dataset: data.Name = "digits"  # which images; folder: your own
    data_dir: str = "data"  # where they lie; for folder it holds train/CLASS/* (and test/CLASS/*)
    image_size: ImageSize = 32  # pixels a side
    limit_train: Batch | None = None  # take only so many training images, for a quick try
    skip_unreadable: bool = False  # folder: leave out images that cannot be read
    # Model
    encoder: models.EncoderName = "resnet18"  # its features are the latents
    width: Count | None = None  # base channels; None: 32 for cnn, 64 for the ResNets
    blocks: Natural = 0  # residual blocks per stage of the cnn
    projection_dim: Count = 128  # numbers that the loss compares; the head is dropped afterwards
    # Loss
    temperature: Positive = 0.1  # T: lower looks harder at the nearest negatives
    supervised: bool = True  # False: only views of one image are positives (SimCLR)
    views: Count = 2  # random views of each image
    augment: augmentation.Kind = "contrastive"  # light: shifts; cutout: hole; affine: turn, zoom
    flip: bool | None = None  # also mirror them; None: where the data set's labels allow it
    # Optimisation
    epochs: Count = 20  # passes over the training images
    batch_size: Batch = 256  # images per step, summed over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd: with Nesterov momentum 0.9
    learning_rate: Positive = 0.1  # peak rate; scale it with the batch; adamw wants about 0.002
    weight_decay: NonNegative = 1e-4  # adamw wants about 0.05
    warmup_epochs: NonNegative = 1  # linear rise before the cosine; fractions are fine
    max_gradient_norm: Positive = 5.0  # longer gradients are cut to this length
    # Evaluation
    evaluate_every: Count = 1  # epochs between two looks at the validation images
    knn_images: Count = 5000  # training images that the nearest neighbours are taken from meanwhile
    tsne_images: Count = 2000  # test images in the t-SNE picture
    test: bool = True  # report on the test images at the end; False in sweeps
    # Run
    seed: Natural = 0  # of the weights, the order of the images and their views
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # auto: bf16 where it is fast
    compile: bool = False  # torch.compile the training step
    log_every: Count = 50  # steps between two rows of train/loss
    run_dir: str | None = None  # where everything goes; None: runs/supcon-DATASET-TIME
    resume: str | None = None  # go on with the run in this folder, or start there
    project: str = "latent-spaces"  # of W&B
    tags: str = ""  # of W&B, separated by commas
    tracking: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: W&B, if logged in


def main(config: Config) -> dict[str, float]:
    # ---------------------------------------------------------------- Set-up
    accelerator = runtime.start(config.precision, config.seed)
    device, is_main = accelerator.device, accelerator.is_main_process
    chosen = runs.choose_run_dir(config.run_dir, config.resume, METHOD, config.dataset)
    (run_dir,) = broadcast_object_list([chosen])  # the time in its name must be everybody's
    if (metrics := runs.finished(run_dir)) is not None:
        tracking.say(f"{run_dir} is finished already; its results are in summary.json", is_main)
        return metrics
    interruption = Interruption(run_dir)

    # ---------------------------------------------------------------- Data
    place, size = Path(config.data_dir), config.image_size
    if config.dataset == "folder":
        arrays = folders.load_folder(place, size, config.skip_unreadable, is_main)
    else:
        arrays = data.load(config.dataset, place, size)
    images = data.split_data(arrays, config.limit_train).to(device)
    share = (accelerator.process_index, accelerator.num_processes)
    local = data.local_slice(len(images.train), config.batch_size, *share)
    references = images.train.sample(config.knn_images)
    flip = config.dataset in data.FLIPPABLE if config.flip is None else config.flip
    if config.temperature < 0.003:
        raise UserError(f"--temperature {config.temperature} is too low for float32; take 0.003 up")
    if config.supervised and len(images.class_names) < 2:
        raise UserError("all images are of one class, so nothing is pushed away; add another class")
    if config.views < 2 and not config.supervised:
        raise UserError("--views 1 leaves no positives without labels; take at least 2")
    shares = images.train.labels.bincount(minlength=len(images.class_names)) / len(images.train)
    ids = config.batch_size * shares if config.supervised else torch.ones(config.batch_size)
    floor = supcon_floor(ids.tolist(), config.views, config.temperature)
    collapse = supcon_collapse(config.batch_size, config.views)

    # ---------------------------------------------------------------- Model
    names = ("encoder", "image_size", "width", "blocks")
    architecture = {name: getattr(config, name) for name in names}
    architecture |= {"channels": images.channels, "latent_dim": None}  # the features themselves
    network = memory.build(
        lambda: models.SupConResNet(models.build_encoder(**architecture), config.projection_dim),
        (config.views * (local.stop - local.start), images.channels, size, size),
        memory.MOMENTUM if config.optimizer == "sgd" else memory.ADAM,
        accelerator,
        "--width, --blocks, --projection_dim, --views or --batch_size",
    )
    network = runtime.share_batch_norm(network, accelerator).to(device)
    memory.check_latents(network.encoder.output_dim, images, 1, device, "--width")
    memory.check_latents(config.projection_dim, images, 1, device, "--projection_dim")
    preprocess = models.Preprocess(images.mean, images.std).to(device)

    # ---------------------------------------------------------------- Optimiser
    parameters = list(network.parameters())
    rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    rates["fused"] = accelerator.scaler is None  # fused, fp16 would skip steps unseen
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **rates)
    else:
        optimizer = torch.optim.AdamW(parameters, **rates)
    model, optimizer = accelerator.prepare(network, optimizer)
    if config.compile:
        model = torch.compile(model)
    steps_per_epoch = len(images.train) // config.batch_size
    total_steps = config.epochs * steps_per_epoch
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)

    # ---------------------------------------------------------------- Resume
    same = {"processes": accelerator.num_processes, "fingerprint": images.fingerprint}
    facts = {"method": METHOD, "class_names": images.class_names, **same}
    facts |= {"train_images": len(images.train), "parameters": sum(p.numel() for p in parameters)}
    watch = health.Watch(accelerator, network, ("loss",))
    parts = dict(network=network, optimizer=optimizer, watch=watch, scaler=accelerator.scaler)
    state = checkpoints.load_last(run_dir / "checkpoints", expected=same)
    tracker = tracking.open_tracker(
        run_dir,
        settings=asdict(config),
        facts={**runtime.facts(accelerator), **facts},
        labels=runs.labels(METHOD, asdict(config), asdict(Config())),
        mode=config.tracking,
        project=config.project,
        keep_rows=state and state["rows"],
        is_main=is_main,
    )
    epoch, step, seconds = 0, 0, 0.0  # seconds of training in this epoch
    best = {"val/knn_accuracy": -1.0, "epoch": 0}
    if state is not None:
        checkpoints.restore(parts, state)
        epoch, step, best, seconds = (state[name] for name in ("epoch", "step", "best", "seconds"))
        tracking.say(f"going on with {run_dir} at epoch {epoch + 1}, step {step}", is_main)

    def current() -> dict:
        place = {"epoch": epoch, "step": step, "best": best, "seconds": seconds}
        return {**same, **place, "rows": tracker.rows, **checkpoints.states(parts)}

    def save(state: dict) -> None:
        if is_main:
            checkpoints.save_last(run_dir / "checkpoints", state)

    def stop_if_wrong() -> None:
        if wrong := watch.problem():
            save(good)
            tracker.stop(1, wrong)
            raise UserError(f"{wrong}; {run_dir} is kept as of step {good['step']}")

    def stop_if_asked() -> None:
        if number := interruption.agreed(accelerator):
            stop_if_wrong()
            save(current())
            tracker.stop(128 + number)
            interruption.leave(number)

    # ---------------------------------------------------------------- Training
    interruption.hold(accelerator)
    network.train()
    good = copy.deepcopy(current())  # the last state of which all numbers are known to be finite
    if state is None:
        save(good)  # there is room, and from here on the run goes on as itself
    while epoch < config.epochs:
        batches = data.epoch_batches(len(images.train), config.batch_size, config.seed, epoch)
        first_step = epoch * steps_per_epoch
        bar = tracking.progress(steps_per_epoch, f"epoch {epoch + 1}/{config.epochs}", is_main)
        bar.update(step - first_step)
        started = time.perf_counter() - seconds
        for positions in batches[step - first_step :, local]:
            batch = images.train.images(positions)  # (B,C,S,S) uint8
            labels = images.train.labels[positions.to(device)]  # (B,)
            generator = data.generator(config.seed, epoch, step)
            sizes = (config.batch_size, config.image_size)
            colour = images.channels == 3
            views = []
            for _ in range(config.views):
                drawn = augmentation.draw(config.augment, *sizes, generator, flip, colour)
                views.append(preprocess(augmentation.apply(batch, drawn[local])))
            learning_rate = warmup_cosine(step, total_steps, warmup_steps, config.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            embeddings = model(torch.cat(views))  # (V·B,P)
            embeddings = rearrange(embeddings, "(v b) p -> b v p", v=config.views)
            loss = supcon_loss(
                embeddings, labels if config.supervised else None, config.temperature
            )

            accelerator.backward(loss)
            watch.clip(config.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            watch.add(step, learning_rate, loss)
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0:
                stop_if_wrong()
                row = watch.means() | {"train/learning_rate": learning_rate}
                row |= {"train/loss_floor": floor, "train/loss_collapse": collapse}
                tracker.log(row, step, step / steps_per_epoch)
                good = copy.deepcopy(current())
                rate = (step - first_step) * config.batch_size / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {watch.loss:.4f}, {rate:,.0f} images/s")
            seconds = time.perf_counter() - started
            stop_if_asked()
        bar.close()

        # every n epochs: evaluate, draw, save
        row, done = {}, epoch + 1
        if is_main and (done % config.evaluate_every == 0 or done == config.epochs):
            with interruption.dropping():
                row = {
                    "val/knn_accuracy": evaluation.knn_accuracy(
                        network.encoder, preprocess, references, images.validation
                    ),
                    **runtime.cost(device, seconds, steps_per_epoch * config.batch_size),
                }
        stop_if_asked()  # an evaluation that was under way is redone
        epoch, seconds = done, 0
        if row:
            tracker.log(row, step, epoch)
            tracking.say(
                f"epoch {epoch}/{config.epochs}: loss {watch.loss:.4f} (floor {floor:.2f}, "
                f"collapse {collapse:.2f}), val kNN {row['val/knn_accuracy']:.2%}, "
                f"{row['time/images_per_second']:,.0f} images/s"
            )
            if row["val/knn_accuracy"] > best["val/knn_accuracy"]:
                best = {"val/knn_accuracy": row["val/knn_accuracy"], "epoch": epoch}
                checkpoints.save_best(run_dir / "checkpoints", network.state_dict())
                tracker.best(best)
        if epoch == 1 and watch.loss > collapse - 0.01 * (collapse - floor):
            advice = "a lower --learning_rate, more --warmup_epochs or a higher --temperature"
            tracking.say(f"warning: all embeddings are nearly equal; try {advice}", is_main)
        save(current())
    accelerator.wait_for_everyone()
    accelerator.end_training()
    interruption.release()
    if not is_main:
        return {}

    # ---------------------------------------------------------------- Final evaluation
    last = network.state_dict(), {"epoch": epoch}
    weights, best = checkpoints.load_best(run_dir / "checkpoints", best, otherwise=last)
    network.load_state_dict(weights)
    encoder = network.requires_grad_(False).eval().encoder
    origin = {"method": METHOD, "dataset": config.dataset, "class_names": images.class_names}
    statistics = {"mean": images.mean, "std": images.std}
    models.save_encoder(run_dir, encoder, {**architecture, **statistics, **origin})
    tracking.say("training the linear classifiers, then measuring and drawing")
    classes = len(images.class_names)
    latents = evaluation.encode_splits(encoder, preprocess, images, config.test)
    projections = latents.projected(network.head)
    classifier, row = probes.linear_classifier(latents, classes)
    _, on_projections = probes.linear_classifier(projections, classes)
    row |= {f"projection/{name.replace('/', '_')}": v for name, v in on_projections.items()}
    step, epoch = step + 1, epoch + 1
    tracker.log(row, step, epoch)
    models.save_weights(run_dir / "classifier.safetensors", classifier)
    models.save_weights(run_dir / "head.safetensors", network.head)

    metrics = {}
    part = "test" if config.test else "validation"  # what is shown
    shown, codes = getattr(images, part), getattr(latents, part)
    sure = probes.probabilities(classifier, codes)  # (N,K)
    predictions = sure.argmax(dim=1)  # (N,)
    if config.test:
        metrics["test/accuracy"] = probes.accuracy(predictions, shown.labels)
        metrics |= evaluation.latent_metrics(latents, classes, "test", "latent")
        metrics |= evaluation.latent_metrics(projections, classes, "projection", "projection")
        metrics |= evaluation.image_metrics(images)
        evaluation.save_latents(
            run_dir / "latents.npz", codes, shown.labels, predictions, projections.test
        )
    tracker.log(metrics, step, epoch)

    tracker.confusion(shown.labels.tolist(), predictions.tolist(), images.class_names, step)
    for name, columns, cells in tables.of_images(shown, codes, sure, images.class_names):
        tracker.table(f"tables/{name}", columns, cells, step)
    networks = (encoder, classifier, preprocess)
    rows = read_rows(run_dir / "metrics.jsonl")
    for name, figure, caption in (
        *evaluation.latent_pictures(
            networks, shown, predictions, images.class_names, config.tsne_images, metrics
        ),
        evaluation.curves_picture(rows, metrics),
    ):
        tracker.figure(name, figure, caption, step)
    files = [run_dir / "encoder.json", *sorted(run_dir.glob("*.safetensors"))]
    tracker.artifact(f"{METHOD}-{config.dataset}", "model", files, metrics, ["best"])
    metrics = evaluation.summary(rows, metrics, best)
    lines = tracker.finish(metrics)
    interruption.end()
    print("", tables.final(metrics), "", *lines, sep="\n")
    return metrics


if __name__ == "__main__":
    main(parse(Config))
