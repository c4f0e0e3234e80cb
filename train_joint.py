"""Joint training: an encoder and a linear classifier on its 128-d latents learn together.

The labels shape the latents directly:  loss = CE(logits, y) + mae_weight * MAE(softmax, one-hot).
As a mean over K classes the second term is 2 (1 - p_y) / K. At the start, of ten classes, its
gradient is 2 % of cross-entropy's; both parts are logged, and both gradient norms before the first
step, so that one sees what it does (Ghosh et al. 2017 study MAE as a loss against wrong labels).

What to expect on 2 CPU cores: digits in two minutes, MNIST (20 epochs) in about four.

    python train_joint.py                                 handwritten digits, no download
    accelerate launch train_joint.py --dataset mnist
    wandb sweep sweeps/joint.yaml
"""

from dataclasses import dataclass

import common  # isort: skip  # noqa: F401  (before torch, which reads how threads wait)

import torch
import torch.nn.functional as F
from accelerate import Accelerator

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
from common.data import augmentation, datasets
from common.data.philox import Random
from common.display import tables
from common.errors import UserError
from common.evaluation import pictures, probes, report
from common.losses import probability_mae
from common.run.session import Session

METHOD = "joint"


@dataclass(frozen=True)
class Config(TrainingConfig):
    # Model
    latent_dim: PositiveInt = 128  # of the latents between encoder and linear classifier
    # Loss
    mae_weight: NonNegativeFloat = 1.0  # of MAE(softmax, one-hot) beside cross-entropy
    label_smoothing: Fraction = 0.0  # of cross-entropy
    augment: augmentation.Kind = "crop_flip"  # crop_flip: shift; cutout: hole; affine: turn, zoom
    flip: bool | None = None  # also mirror it; None: if its labels allow it, never a folder
    # Optimization
    batch_size: BatchSize = 128  # images per step, summed over all processes
    optimizer: OptimizerName = "sgd"  # sgd: with Nesterov momentum 0.9; muon: AdamW beside it
    learning_rate: PositiveFloat = 0.1  # peak; larger with the batch; adamw: 0.002, muon: 0.2
    adamw_learning_rate: PositiveFloat = 0.005  # peak rate of the AdamW beside muon
    schedule: optimizers.Schedule = "cosine"  # how the rate falls from its peak to 0
    weight_decay: NonNegativeFloat = 5e-4  # adamw: about 0.05
    warmup_epochs: NonNegativeFloat = 1  # linear rise before the cosine; fractions are fine
    max_gradient_norm: PositiveFloat = 5.0  # longer gradients are clipped to this length


def main(config: Config) -> dict[str, float]:
    session = Session(METHOD, config)
    if session.finished:
        return session.summary
    with session:  # on exit: tells W&B how it ended
        # ------------------------------------------------------------ Data
        images = datasets.load(config, show_progress=session.is_main)
        images = images.to(session.measuring_device)
        learned = images.train.balanced() if config.balance else images.train
        learned = learned.to(session.device)
        references = images.train.sample(config.knn_images)
        classes = len(images.class_names)
        flip = config.dataset in datasets.FLIPPABLE if config.flip is None else config.flip
        if classes < 2:
            raise UserError("all images are of one class, so there is nothing to tell apart")

        # ------------------------------------------------------------ Model
        architecture = dict(
            encoder=config.encoder,
            channels=images.channels,
            image_size=config.image_size,
            width=config.width,
            blocks=config.blocks,
            latent_dim=config.latent_dim,
        )
        network = models.build(
            lambda: models.JointClassifier(models.build_encoder(**architecture), classes),
            "--width, --blocks or --latent_dim",
        )
        preprocess = models.Preprocess(images.mean, images.std).to(session.device)
        models.fit_whitening(network, preprocess, learned.sample(5000).blocks())
        optimizer = optimizers.build(config, network, session.accelerator.scaler)
        model, optimizer = session.prepare(network, optimizer, images, learned)  # resumes
        total_steps = session.total_epochs * session.steps_per_epoch
        warmup_steps = round(config.warmup_epochs * session.steps_per_epoch)

        # ------------------------------------------------------------ Training
        @session.compile  # if --compile=True
        def compute(
            batch: torch.Tensor, labels: torch.Tensor, random: Random
        ) -> dict[str, torch.Tensor]:
            inputs = preprocess(augmentation.augment(batch, random, config.augment, flip))
            logits = model(inputs)  # (B,K)
            cross_entropy = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            mae = probability_mae(logits, labels)
            return {
                "loss": cross_entropy + config.mae_weight * mae,
                "cross_entropy": cross_entropy,
                "probability_mae": mae,
                "accuracy": (logits.argmax(1) == labels).float().mean(),
            }

        for epoch in session.epochs():  # starts where the checkpoint ended
            network.train()
            for step, indices, batch in session.batches():  # (B,), (B,C,S,S) uint8
                labels = learned.labels[indices]  # (B,)
                share = optimizers.schedule(config.schedule, step, total_steps, warmup_steps)
                optimizers.set_learning_rate(optimizer, share)

                values = compute(batch, labels, Random(indices, config.seed, epoch))

                if step == 0:  # how strongly each part of the loss pulls at the start
                    terms = {name: values[name] for name in ("cross_entropy", "probability_mae")}
                    session.tracker.log(gradient_norms(terms, network, session.accelerator), 0, 0)

                session.accelerator.backward(values["loss"])
                norm = session.accelerator.clip_grad_norm_(
                    network.parameters(), config.max_gradient_norm
                )
                optimizer.step()
                optimizer.zero_grad()
                session.log_step(**values, gradient_norm=norm)

            if session.evaluates(network, preprocess):  # the main process only
                targets = images.validation.labels
                latents = report.encode(network.encoder, preprocess, images.validation)
                with torch.no_grad():
                    logits = network.classifier(latents)
                row = {
                    "val/cross_entropy": F.cross_entropy(logits, targets).item(),
                    "val/probability_mae": probability_mae(logits, targets).item(),
                    "val/accuracy": probes.accuracy(logits.argmax(1), targets),
                    **report.knn_accuracies(
                        network.encoder, preprocess, references, images.validation, latents
                    ),
                }
                session.log_epoch(row, maximize="val/accuracy")
        if not session.is_main:
            return {}

        # ------------------------------------------------------------ Evaluation
        session.load_best(network, preprocess)
        encoder, classifier = network.encoder, network.classifier
        about = {"method": METHOD, "dataset": config.dataset, "class_names": images.class_names}
        about |= {"mean": images.mean, "std": images.std, "white": config.white}
        models.save_encoder(session.run_dir, encoder, architecture | about)
        models.save_weights(session.run_dir / "classifier.safetensors", classifier)
        session.say("measuring and drawing")
        latents = report.encode_splits(encoder, preprocess, images, config.test)

        measured = report.measure(latents, classifier, images)
        metrics = measured.metrics
        if config.test:
            metrics |= report.pca_latent_metrics(images, config.latent_dim)
            path = session.run_dir / "latents.npz"
            report.save_latents(path, latents, measured.predictions, images.class_names)
        pictures.publish(session, images, latents, measured.probabilities, metrics)
        session.say(f"\n{tables.final(metrics)}")
        return session.finish(metrics)


def gradient_norms(
    terms: dict[str, torch.Tensor], network: torch.nn.Module, accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """The length of the gradient of each term () of a loss, mean over processes, for the log."""
    trained, norms = [p for p in network.parameters() if p.requires_grad], {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, trained, retain_graph=True)
        gradients = accelerator.reduce(gradients, "mean")
        norms[f"train/{name}_gradient_norm"] = torch.nn.utils.get_total_norm(gradients)
    return norms


if __name__ == "__main__":
    main(parse(Config))
