"""Autoencoder: learn to reconstruct images from 128-d latents, then classify the latents.

An encoder of strided convolutions maps an image x to a latent z, a mirrored decoder
reconstructs it, and both minimize  alpha * MSE(x', x) + (1 - alpha) * MAE(x', x)  without labels
(Hinton & Salakhutdinov 2006). Then the encoder is frozen and a classifier of three fully connected
layers predicts the labels from z. PCA, the linear autoencoder of the same size, is the baseline.

What to expect on 2 CPU cores: digits in about five minutes (a fifth of it with --epochs 20), MNIST
(20 epochs) in about ten.

    python train_ae.py                                    handwritten digits, no download
    accelerate launch train_ae.py --dataset mnist
    wandb sweep sweeps/ae.yaml
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import common  # isort: skip  # noqa: F401  (before torch, which reads how threads wait)

import torch

from common import models, optimizers
from common.config import (
    BatchSize,
    Fraction,
    NonNegativeFloat,
    OptimizerName,
    PositiveFloat,
    PositiveInt,
    TrainingConfig,
    parse,
)
from common.console import progress
from common.data import augmentation, datasets
from common.data.philox import Random
from common.display import tables
from common.errors import UserError
from common.evaluation import pictures, probes, report
from common.losses import reconstruction_loss
from common.run.sampling import epochs_of
from common.run.session import Session

METHOD = "ae"


@dataclass(frozen=True)
class Config(TrainingConfig):
    # Model
    latent_dim: PositiveInt = 128  # numbers that an image is encoded to
    linear_path: bool = False  # a linear autoencoder beside the networks, which begins as PCA
    # Loss
    alpha: Fraction = 0.5  # weight of MSE; that of MAE is 1 - alpha; both with images in [-1, 1]
    augment: augmentation.Kind = "none"  # what is changed in an image before it is reconstructed
    flip: bool | None = None  # also mirror it; None: if its labels allow it, never a folder
    # Optimization
    batch_size: BatchSize = 128  # images per step, summed over all processes
    optimizer: OptimizerName = "adamw"  # sgd: with Nesterov momentum 0.9; muon: AdamW beside it
    learning_rate: PositiveFloat = 2e-3  # peak; muon: 0.2
    adamw_learning_rate: PositiveFloat = 0.005  # peak rate of the AdamW beside muon
    schedule: optimizers.Schedule = "cosine"  # how the rate falls from its peak to 0
    weight_decay: NonNegativeFloat = 1e-4  # adamw: of all weights; muon: of those beside it
    warmup_epochs: NonNegativeFloat = 1  # linear rise before the cosine; fractions are fine
    max_gradient_norm: PositiveFloat = 1.0  # longer gradients are clipped to this length
    # Classifier on the frozen encoder
    hidden_dim: PositiveInt = 1024  # units of its two hidden layers
    dropout: Fraction = 0.1  # share of hidden units left out while it trains
    classifier_epochs: PositiveInt | None = None  # over the latents; None: 20, or for 200 steps
    classifier_batch_size: BatchSize = 256  # latents per step
    classifier_learning_rate: PositiveFloat = 5e-3  # peak rate of its one-cycle schedule
    classifier_weight_decay: NonNegativeFloat = 1e-2  # of its AdamW
    classifier_views: PositiveInt = 8  # of each image: itself, then shifted; mirrored if --flip


def main(config: Config) -> dict[str, float]:
    session = Session(METHOD, config)
    if session.finished:
        return session.summary
    with session:  # on exit: tells W&B how it ended
        # ------------------------------------------------------------ Data
        images = datasets.load(config, show_progress=session.is_main)
        images = images.to(session.measuring_device)
        learned = images.pretrain.to(session.device)  # without their labels
        if config.balance:
            session.say("--balance weighs the classifier alone: the encoder learns without labels")
        references = images.train.sample(config.knn_images)
        classes = len(images.class_names)
        flip = config.dataset in datasets.FLIPPABLE if config.flip is None else config.flip
        # the linear autoencoder
        pca, why_no_pca = report.fit_pca(images.pretrain, config.latent_dim)
        pca_errors = report.pca_errors(pca, images.validation) if pca else {}

        # ------------------------------------------------------------ Model
        architecture = dict(
            encoder=config.encoder,
            channels=images.channels,
            image_size=config.image_size,
            width=config.width,
            blocks=config.blocks,
            latent_dim=config.latent_dim,
            linear_path=config.linear_path,
        )
        network = models.build(
            lambda: models.build_autoencoder(**architecture), "--width, --blocks or --latent_dim"
        )
        half = (0.5,) * images.channels  # images and loss live in [-1, 1], the range of tanh
        preprocess = models.Preprocess(half, half).to(session.device)
        models.fit_whitening(network, preprocess, learned.sample(5000).blocks())
        if config.linear_path:
            if pca is None:
                raise UserError(f"--linear_path begins as PCA, but {why_no_pca}; leave it out")
            network.begin_as_pca(pca.components.cpu(), pca.mean.cpu())

        def new_classifier() -> torch.nn.Module:
            sizes = (config.latent_dim, config.hidden_dim, classes, config.dropout)
            return models.build(lambda: models.MLPClassifier(*sizes), "--hidden_dim")

        new_classifier()  # it fits, or the training need not begin
        optimizer = optimizers.build(config, network, session.accelerator.scaler)
        model, optimizer = session.prepare(network, optimizer, images, learned)  # resumes
        total_steps = session.total_epochs * session.steps_per_epoch
        warmup_steps = round(config.warmup_epochs * session.steps_per_epoch)

        # ------------------------------------------------------------ Training
        @session.compile  # if --compile=True
        def compute(batch: torch.Tensor, random: Random) -> dict[str, torch.Tensor]:
            inputs = preprocess(augmentation.augment(batch, random, config.augment, flip))
            reconstructions = model(inputs)
            return {"loss": reconstruction_loss(reconstructions, inputs, config.alpha)}

        for epoch in session.epochs():  # starts where the checkpoint ended
            network.train()
            for step, indices, batch in session.batches():  # (B,), (B,C,S,S) uint8
                share = optimizers.schedule(config.schedule, step, total_steps, warmup_steps)
                optimizers.set_learning_rate(optimizer, share)

                values = compute(batch, Random(indices, config.seed, epoch))
                session.accelerator.backward(values["loss"])
                norm = session.accelerator.clip_grad_norm_(
                    network.parameters(), config.max_gradient_norm
                )
                optimizer.step()
                optimizer.zero_grad()
                session.log_step(**values, gradient_norm=norm)

            if session.evaluates(network, preprocess):  # the main process only
                row = {
                    **report.autoencoder_errors(network, preprocess, images.validation, "val"),
                    **{f"val/pca_{name}": value for name, value in pca_errors.items()},
                    **report.knn_accuracies(
                        network.encoder, preprocess, references, images.validation
                    ),
                }
                session.log_epoch(row, minimize="val/mse")
        if not session.is_main:
            return {}

        # ------------------------------------------------------------ Evaluation
        session.load_best(network, preprocess)
        encoder = network.encoder
        about = {"method": METHOD, "dataset": config.dataset, "class_names": images.class_names}
        about |= {"mean": half, "std": half, "white": config.white}
        models.save_encoder(session.run_dir, encoder, architecture | about)
        session.say("training the classifier on the frozen encoder, then measuring and drawing")
        batch_size = min(config.classifier_batch_size, len(images.train))
        steps = len(images.train) // batch_size
        epochs, every = epochs_of(config.classifier_epochs, steps, probes.FEWEST_STEPS)
        views = min(config.classifier_views, epochs)  # one for each epoch
        shifted = (images.train, views - 1, flip, config.seed)
        latents = report.encode_splits(
            encoder, preprocess, images, config.test, shifted_views(*shifted)
        )
        recipe = dict(
            epochs=epochs,
            evaluate_every=every,
            batch_size=batch_size,
            learning_rate=config.classifier_learning_rate,
            weight_decay=config.classifier_weight_decay,
            balance=config.balance,
            seed=config.seed,
            precision="bf16" if session.accelerator.mixed_precision == "bf16" else "no",
        )
        torch.manual_seed(config.seed)  # also after a resume, which drew nothing so far
        classifier = new_classifier().to(session.measuring_device)
        with progress(epochs, "classifier", session.is_main) as bar:
            for row in probes.train_classifier(classifier, latents, **recipe):
                session.log(row)
                bar.set_postfix_str(f"val accuracy {row['val/accuracy']:.2%}")
                bar.update(every)
        models.save_weights(session.run_dir / "classifier.safetensors", classifier)

        measured = report.measure(latents, classifier, images)
        metrics = measured.metrics
        kept = (classifier, latents.validation, latents.validation_labels)
        metrics["val/classifier_loss"] = probes.cross_entropy(*kept)
        if config.test:
            metrics |= report.autoencoder_errors(network, preprocess, images.test, "test")
            if pca:  # with the same classifier on its codes
                baseline = new_classifier().to(session.measuring_device)
                metrics |= report.pca_metrics(
                    pca, images, shifted_views(*shifted), baseline, recipe
                )
            else:
                session.say(f"PCA-{config.latent_dim} is left out: {why_no_pca}")
            path = session.run_dir / "latents.npz"
            report.save_latents(path, latents, measured.predictions, images.class_names)
        split = images.test if config.test else images.validation
        decoded = pictures.autoencoder_pictures(network, preprocess, split, images.class_names)
        pictures.publish(session, images, latents, measured.probabilities, metrics, decoded)
        session.say(f"\n{tables.final(metrics)}")
        return session.finish(metrics)


def shifted_views(
    split: datasets.Split, copies: int, flip: bool, seed: int
) -> Iterator[datasets.Split]:
    """The same images, each moved by a few pixels and, where `flip`, perhaps mirrored."""
    numbers = torch.arange(len(split), device=split.labels.device)
    for view in range(copies):

        def shift(images: torch.Tensor, positions: slice, view=view) -> torch.Tensor:
            random = Random(numbers[positions], seed, view=view)
            return (augmentation.augment(images, random, "crop_flip", flip) * 255).round().byte()

        yield replace(split, change=shift)


if __name__ == "__main__":
    main(parse(Config))
