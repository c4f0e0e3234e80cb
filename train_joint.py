"""Joint training: an encoder and a linear classifier on its 128 numbers learn together.

The labels shape the latents directly:  loss = CE(logits, y) + mae_weight * MAE(softmax, one-hot).
As a mean over K classes the second term is 2 (1 - p_y) / K, whose gradient is 2 % of
cross-entropy's at the start; both parts are logged, and both gradient norms before the first step,
so that one sees what it does (Ghosh et al. 2017 study MAE as a loss against wrong labels).

What to expect on 2 CPU cores: digits in half a minute, MNIST (20 epochs) in about ten.

    python train_joint.py                                 handwritten digits, no download
    accelerate launch train_joint.py --dataset mnist
    wandb sweep sweeps/joint.yaml
"""

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
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
from common.losses import probability_mae
from common.schedules import warmup_cosine

METHOD = "joint"


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
    blocks: Natural = 0  # residual blocks per stage of the cnn
    latent_dim: Count = 128  # numbers between encoder and linear classifier
    # Loss
    mae_weight: NonNegative = 1.0  # of MAE(softmax, one-hot) beside cross-entropy
    label_smoothing: Fraction = 0.0  # of cross-entropy
    augment: augmentation.Kind = "light"  # light: shifts; cutout: a hole, too; affine: turn, zoom
    flip: bool | None = None  # also mirror it; None: where the data set's labels allow it
    # Optimisation
    epochs: Count = 20  # passes over the training images
    batch_size: Batch = 128  # images per step, summed over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd: with Nesterov momentum 0.9
    learning_rate: Positive = 0.1  # peak rate; adamw wants about 0.002
    weight_decay: NonNegative = 5e-4  # adamw wants about 0.05
    warmup_epochs: NonNegative = 1  # linear rise before the cosine; fractions are fine
    max_gradient_norm: Positive = 5.0  # longer gradients are cut to this length
    # Evaluation
    evaluate_every: Count = 1  # epochs between two looks at the validation images
    knn_images: Count = 5000  # training images that the nearest neighbours are taken from meanwhile
    tsne_images: Count = 2000  # test images in the t-SNE picture
    test: bool = True  # report on the test images at the end; False in sweeps
    # Run
    seed: Natural = 0  # of the weights, the order of the images and their shifts
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # auto: bf16 where it is fast
    compile: bool = False  # torch.compile the training step
    log_every: Count = 50  # steps between two rows of train/loss
    run_dir: str | None = None  # where everything goes; None: runs/joint-DATASET-TIME
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
    if len(images.class_names) < 2:
        raise UserError(
            "all images are of one class, so there is nothing to tell apart; add another"
        )

    # ---------------------------------------------------------------- Model
    names = ("encoder", "image_size", "width", "blocks", "latent_dim")
    architecture = {name: getattr(config, name) for name in names} | {"channels": images.channels}
    classes = len(images.class_names)
    network = memory.build(
        lambda: models.JointClassifier(models.build_encoder(**architecture), classes),
        (local.stop - local.start, images.channels, size, size),
        memory.MOMENTUM if config.optimizer == "sgd" else memory.ADAM,
        accelerator,
        "--width, --blocks, --latent_dim or --batch_size",
    )
    network = runtime.share_batch_norm(network, accelerator).to(device)
    memory.check_latents(network.encoder.output_dim, images, 1, device, "--latent_dim")
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
    names = ("loss", "cross_entropy", "probability_mae", "accuracy")
    watch = health.Watch(accelerator, network, names)
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
    best = {"val/accuracy": -1.0, "epoch": 0}
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
            drawn = augmentation.draw(
                config.augment,
                config.batch_size,
                config.image_size,
                data.generator(config.seed, epoch, step),
                flip,
                colour=images.channels == 3,
            )
            pixels = augmentation.apply(images.train.images(positions), drawn[local])  # (B,C,S,S)
            labels = images.train.labels[positions.to(device)]  # (B,)
            learning_rate = warmup_cosine(step, total_steps, warmup_steps, config.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            logits = model(preprocess(pixels))  # (B,K)
            cross_entropy = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            mae = probability_mae(logits, labels)
            loss = cross_entropy + config.mae_weight * mae

            if step == 0:
                row = {}
                for name, part in (("cross_entropy", cross_entropy), ("probability_mae", mae)):
                    gradients = torch.autograd.grad(part, parameters, retain_graph=True)
                    gradients = accelerator.reduce(gradients, "mean")  # over the processes
                    norm = torch.nn.utils.get_total_norm(gradients)
                    row[f"train/{name}_gradient_norm"] = norm.item()
                tracker.log(row, 0, 0)
            accelerator.backward(loss)
            watch.clip(config.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            accuracy = (logits.argmax(1) == labels).float().mean()
            watch.add(step, learning_rate, loss, cross_entropy, mae, accuracy)
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
                latents = evaluation.encode(network.encoder, preprocess, images.validation)
                with torch.no_grad():
                    logits = network.classifier(latents)
                row = {
                    "val/cross_entropy": F.cross_entropy(logits, images.validation.labels).item(),
                    "val/probability_mae": probability_mae(logits, images.validation.labels).item(),
                    "val/accuracy": probes.accuracy(logits.argmax(1), images.validation.labels),
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
                f"epoch {epoch}/{config.epochs}: loss {watch.loss:.4f}, val accuracy "
                f"{row['val/accuracy']:.2%}, val kNN {row['val/knn_accuracy']:.2%}, "
                f"{row['time/images_per_second']:,.0f} images/s"
            )
            if row["val/accuracy"] > best["val/accuracy"]:
                best = {"val/accuracy": row["val/accuracy"], "epoch": epoch}
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
    network.requires_grad_(False).eval()
    encoder, classifier = network.encoder, network.classifier
    origin = {"method": METHOD, "dataset": config.dataset, "class_names": images.class_names}
    statistics = {"mean": images.mean, "std": images.std}
    models.save_encoder(run_dir, encoder, {**architecture, **statistics, **origin})
    models.save_weights(run_dir / "classifier.safetensors", classifier)
    tracking.say("measuring and drawing")
    latents = evaluation.encode_splits(encoder, preprocess, images, config.test)

    found = probes.predict(classifier, latents.validation)
    metrics = {"val/accuracy": probes.accuracy(found, images.validation.labels)}  # of the best
    part = "test" if config.test else "validation"  # what is shown
    shown, codes = getattr(images, part), getattr(latents, part)
    sure = probes.probabilities(classifier, codes)  # (N,K)
    predictions = sure.argmax(dim=1)  # (N,)
    if config.test:
        metrics["test/accuracy"] = probes.accuracy(predictions, shown.labels)
        metrics |= evaluation.latent_metrics(latents, classes, "test", "latent")
        metrics |= evaluation.image_metrics(images)
        pca, why_no_pca = evaluation.fit_pca(images.train, config.latent_dim)
        if pca:
            linear = evaluation.pca_latents(pca, images)
            metrics |= evaluation.latent_metrics(linear, classes, "pca", "pca")
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
