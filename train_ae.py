"""Autoencoder: learn to reconstruct images through 128 numbers, then classify by those numbers.

An encoder of three strided convolutions squeezes an image x into a latent z, a mirrored decoder
paints it again, and both minimise  alpha * MSE(x', x) + (1 - alpha) * MAE(x', x)  without labels
(Hinton & Salakhutdinov 2006). Then the encoder is frozen and a classifier of three fully connected
layers reads the labels from z. The linear autoencoder of the same size, PCA, stands beside it.

What to expect on 2 CPU cores: digits in about a minute, MNIST (20 epochs) in about ten.

    python train_ae.py                                    handwritten digits, no download
    accelerate launch train_ae.py --dataset mnist
    wandb sweep sweeps/ae.yaml
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list

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
from common.config import Batch, Count, Fraction, ImageSize, Natural, NonNegative, Positive, parse
from common.errors import UserError
from common.files import read_rows
from common.interruption import Interruption
from common.losses import reconstruction_loss
from common.schedules import warmup_cosine

METHOD = "ae"


@dataclass(frozen=True)
class Config:
    # Data
    dataset: data.Name = "digits"  # which images; folder: your own
    data_dir: str = "data"  # where they lie; for folder it holds train/CLASS/* (and test/CLASS/*)
    image_size: ImageSize = 32  # pixels a side
    limit_train: Batch | None = None  # take only so many training images, for a quick try
    skip_unreadable: bool = False  # folder: leave out images that cannot be read
    # Model
    encoder: models.EncoderName = "cnn"  # in front of the latents
    width: Count | None = None  # base channels; None: 32 for cnn, 64 for the ResNets
    blocks: Natural = 0  # residual blocks per stage of the cnn and of the decoder
    latent_dim: Count = 128  # numbers that an image is squeezed into
    # Loss
    alpha: Fraction = 0.5  # share of MSE; the rest is MAE; both with images in [-1, 1]
    # Optimisation
    epochs: Count = 20  # passes over the training images
    batch_size: Batch = 128  # images per step, summed over all processes
    learning_rate: Positive = 2e-3  # peak rate of AdamW
    weight_decay: NonNegative = 1e-4  # of AdamW
    warmup_epochs: NonNegative = 1  # linear rise before the cosine; fractions are fine
    max_gradient_norm: Positive = 1.0  # longer gradients are cut to this length
    # Classifier on the frozen encoder
    hidden_dim: Count = 1024  # units of its two hidden layers
    dropout: Fraction = 0.1  # share of hidden units left out while it trains
    classifier_epochs: Count = 20  # passes over the training latents
    classifier_batch_size: Batch = 256  # latents per step
    classifier_learning_rate: Positive = 5e-3  # peak rate of its one-cycle schedule
    classifier_weight_decay: NonNegative = 1e-2  # of its AdamW
    classifier_views: Count = 8  # it sees each image as it is, and so often less one shifted a bit
    flip: bool | None = None  # also mirrored; None: where the data set's labels allow it
    # Evaluation
    evaluate_every: Count = 1  # epochs between two looks at the validation images
    knn_images: Count = 5000  # training images that the nearest neighbours are taken from meanwhile
    tsne_images: Count = 2000  # test images in the t-SNE picture
    test: bool = True  # report on the test images at the end; False in sweeps
    # Run
    seed: Natural = 0  # of the weights, the order of the images and the classifier
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # auto: bf16 where it is fast
    compile: bool = False  # torch.compile the training step
    log_every: Count = 50  # steps between two rows of train/loss
    run_dir: str | None = None  # where everything goes; None: runs/ae-DATASET-TIME
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
    pca, why_no_pca = evaluation.fit_pca(images.train, config.latent_dim)
    pca_line = evaluation.pca_errors(pca, images.validation) if pca else {}

    # ---------------------------------------------------------------- Model
    names = ("encoder", "image_size", "width", "blocks", "latent_dim")
    architecture = {name: getattr(config, name) for name in names} | {"channels": images.channels}
    network = memory.build(
        lambda: models.build_autoencoder(**architecture),
        (local.stop - local.start, images.channels, size, size),
        memory.ADAM,
        accelerator,
        "--width, --blocks, --latent_dim or --batch_size",
    )
    network = runtime.share_batch_norm(network, accelerator).to(device)
    view_count = min(config.classifier_views, config.classifier_epochs)  # one for each epoch
    memory.check_latents(config.latent_dim, images, view_count, device, "--latent_dim")
    classes = len(images.class_names)
    sizes = (config.latent_dim, config.hidden_dim, classes, config.dropout)
    needs = memory.measure(lambda: models.MLPClassifier(*sizes), (2, config.latent_dim), "no")
    memory.check(needs.training(memory.ADAM), device, "the classifier", "--hidden_dim")
    half = (0.5,) * images.channels  # images and loss live in [-1, 1], the range of tanh
    preprocess = models.Preprocess(half, half).to(device)

    # ---------------------------------------------------------------- Optimiser
    parameters = list(network.parameters())
    rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(parameters, **rates, fused=accelerator.scaler is None)
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
    best = {"val/mse": float("inf"), "epoch": 0}
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
            inputs = preprocess(images.train.images(positions))  # (B,C,S,S) in [-1,1]
            learning_rate = warmup_cosine(step, total_steps, warmup_steps, config.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            reconstructions = model(inputs)
            loss = reconstruction_loss(reconstructions, inputs, config.alpha)

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
                    **evaluation.autoencoder_errors(network, preprocess, images.validation, "val"),
                    **{f"val/pca_{name}": value for name, value in pca_line.items()},
                    "val/knn_accuracy": evaluation.knn_accuracy(
                        network.encoder, preprocess, references, images.validation
                    ),
                    **runtime.cost(device, seconds, steps_per_epoch * config.batch_size),
                }
        stop_if_asked()  # an evaluation that was under way is redone
        epoch, seconds = done, 0
        if row:
            tracker.log(row, step, epoch)
            pca_said = f" (PCA {pca_line['mse']:.5f})" if pca else ""
            tracking.say(
                f"epoch {epoch}/{config.epochs}: loss {watch.loss:.4f}, val mse "
                f"{row['val/mse']:.5f}{pca_said}, val kNN {row['val/knn_accuracy']:.2%}, "
                f"{row['time/images_per_second']:,.0f} images/s"
            )
            if row["val/mse"] < best["val/mse"]:
                best = {"val/mse": row["val/mse"], "epoch": epoch}
                checkpoints.save_best(run_dir / "checkpoints", network.state_dict())
                tracker.best(best)
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
    models.save_encoder(run_dir, encoder, {**architecture, "mean": half, "std": half, **origin})
    tracking.say("training the classifier on the frozen encoder, then measuring and drawing")
    flip = config.dataset in data.FLIPPABLE if config.flip is None else config.flip
    shifts = (images.train, view_count - 1, flip, config.seed)
    latents = evaluation.encode_splits(encoder, preprocess, images, config.test, shifted(*shifts))
    names = ("epochs", "batch_size", "learning_rate", "weight_decay")
    recipe = {name: getattr(config, f"classifier_{name}") for name in names} | {"seed": config.seed}
    recipe["precision"] = "bf16" if accelerator.mixed_precision == "bf16" else "no"
    torch.manual_seed(config.seed)  # also after a resume, which drew nothing so far
    classifier = models.MLPClassifier(*sizes).to(device)
    with tracking.progress(config.classifier_epochs, "classifier", is_main) as bar:
        for row in probes.train_classifier(classifier, latents, **recipe):
            step, epoch = step + 1, epoch + 1
            tracker.log(row, step, epoch)
            bar.set_postfix_str(f"val accuracy {row['val/accuracy']:.2%}")
            bar.update()
    models.save_weights(run_dir / "classifier.safetensors", classifier)

    found = probes.predict(classifier, latents.validation)
    metrics = {"val/accuracy": probes.accuracy(found, images.validation.labels)}  # of the best
    part = "test" if config.test else "validation"  # what is shown
    shown, codes = getattr(images, part), getattr(latents, part)
    sure = probes.probabilities(classifier, codes)  # (N,K)
    predictions = sure.argmax(dim=1)  # (N,)
    if config.test:
        metrics |= evaluation.autoencoder_errors(network, preprocess, images.test, "test")
        metrics["test/accuracy"] = probes.accuracy(predictions, shown.labels)
        metrics |= evaluation.latent_metrics(latents, classes, "test", "latent")
        metrics |= evaluation.image_metrics(images)
        if pca:
            baseline = models.MLPClassifier(*sizes).to(device)
            metrics |= evaluation.pca_metrics(pca, images, shifted(*shifts), baseline, recipe)
        else:
            tracking.say(f"PCA-{config.latent_dim} is left out: {why_no_pca}")
        evaluation.save_latents(run_dir / "latents.npz", codes, shown.labels, predictions)
    tracker.log(metrics, step, epoch)

    tracker.confusion(shown.labels.tolist(), predictions.tolist(), images.class_names, step)
    for name, columns, cells in tables.of_images(shown, codes, sure, images.class_names):
        tracker.table(f"tables/{name}", columns, cells, step)
    networks = (encoder, classifier, preprocess)
    rows = read_rows(run_dir / "metrics.jsonl")
    for name, figure, caption in (
        *evaluation.autoencoder_pictures(network, preprocess, shown, images.class_names),
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


def shifted(split: data.Split, copies: int, flip: bool, seed: int) -> Iterator[data.Split]:
    """The same images, each moved by a few pixels and, where `flip`, perhaps mirrored."""
    channels, size = split.source.shape[1:3]
    for copy_number in range(1, copies + 1):
        generator = data.generator(seed, copy_number)
        drawn = augmentation.draw("light", len(split), size, generator, flip, channels == 3)

        def moved(images: torch.Tensor, positions: slice, drawn=drawn) -> torch.Tensor:
            return (augmentation.apply(images, drawn[positions]) * 255).round().byte()

        yield replace(split, change=moved)


if __name__ == "__main__":
    main(parse(Config))
