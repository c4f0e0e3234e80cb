"""Supervised contrastive learning: pull images of one class together, push the others away.

An encoder (a ResNet) and an MLP head map two random views of each image to unit vectors z; the loss
is L_out, equation 2 of Khosla et al. 2020:  mean over views i of
-1/|P(i)| * sum over positives p of log( exp(z_i.z_p / T) / sum over a != i of exp(z_i.z_a / T) ).
Then the encoder is frozen and a linear classifier learns to read the labels from its features,
which come before the head. Without labels (--supervised=False) the loss is SimCLR's.

What to expect on 2 CPU cores: digits with --epochs 20 in a few minutes, ten times as long without;
natural images want a narrow network (--width 16) there, and a GPU for the usual one.

    python train_supcon.py --width 8                      handwritten digits, no download
    accelerate launch train_supcon.py --dataset cifar10
    wandb sweep sweeps/supcon.yaml
"""

import math
from dataclasses import dataclass

import common  # isort: skip  # noqa: F401  (before torch, which reads how threads wait)

import torch
import torch.nn.functional as F
from einops import rearrange

from common import models, optimizers
from common.config import (
    BatchSize,
    EncoderName,
    NonNegativeFloat,
    OptimizerName,
    PositiveFloat,
    PositiveInt,
    TrainingConfig,
    Views,
    parse,
)
from common.data import augmentation, datasets
from common.data.philox import Random
from common.display import tables
from common.errors import UserError
from common.evaluation import pictures, probes, report
from common.losses import supcon_collapse, supcon_floor, supcon_loss
from common.run.session import Session

METHOD = "supcon"


@dataclass(frozen=True)
class Config(TrainingConfig):
    # Model
    encoder: EncoderName = "resnet18"  # its features are the latents
    head: models.HeadName = "mlp"  # from features to embeddings; none: for short trainings
    projection_dim: PositiveInt = 128  # of the embeddings that the loss compares, behind a head
    # Loss
    temperature: PositiveFloat = 0.1  # T: a lower one weighs the nearest negatives more
    supervised: bool = True  # False: only views of one image are positives (SimCLR)
    cross_entropy_weight: NonNegativeFloat = 0.0  # above 0: a linear classifier learns along
    views: Views = 2  # random views of each image
    augment: augmentation.Kind = "contrastive"  # crop_flip: shift; cutout: hole; affine: turn
    flip: bool | None = None  # also mirror them; None: if its labels allow it, never a folder
    # Optimization
    batch_size: BatchSize = 256  # images per step, summed over all processes
    optimizer: OptimizerName = "sgd"  # sgd: with Nesterov momentum 0.9; muon: AdamW beside it
    learning_rate: PositiveFloat = 0.1  # peak; larger with the batch; adamw: 0.002, muon: 0.2
    adamw_learning_rate: PositiveFloat = 0.005  # peak rate of the AdamW beside muon
    schedule: optimizers.Schedule = "cosine"  # how the rate falls from its peak to 0
    weight_decay: NonNegativeFloat = 1e-4  # adamw: about 0.05
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
        learned = images.train if config.supervised else images.pretrain
        if config.balance and config.supervised:
            learned = learned.balanced()
        learned = learned.to(session.device)
        references = images.train.sample(config.knn_images)
        classes = len(images.class_names)
        flip = config.dataset in datasets.FLIPPABLE if config.flip is None else config.flip
        if config.temperature < 0.003:
            raise UserError(
                f"--temperature {config.temperature} is too low for float32; take 0.003 up"
            )
        if config.supervised and classes < 2:
            raise UserError("all images are of one class, so none is pushed away; add another")
        if config.views < 2 and not config.supervised:
            raise UserError("--views 1 leaves no positives without labels; take at least 2")
        if config.cross_entropy_weight and not config.supervised:
            raise UserError("--cross_entropy_weight needs labels; leave it out without them")
        if config.balance and not config.supervised:
            session.say("--balance weighs the classifier alone: the encoder learns without labels")

        # ------------------------------------------------------------ Model
        architecture = dict(
            encoder=config.encoder,
            channels=images.channels,
            image_size=config.image_size,
            width=config.width,
            blocks=config.blocks,
            latent_dim=None,  # the features themselves
        )
        network = models.build(
            lambda: models.SupConNet(
                models.build_encoder(**architecture),
                config.head,
                config.projection_dim,
                classes if config.cross_entropy_weight else None,
            ),
            "--width, --blocks or --projection_dim",
        )
        preprocess = models.Preprocess(images.mean, images.std).to(session.device)
        models.fit_whitening(network, preprocess, learned.sample(5000).blocks())
        optimizer = optimizers.build(config, network, session.accelerator.scaler)
        model, optimizer = session.prepare(network, optimizer, images, learned)  # resumes
        total_steps = session.total_epochs * session.steps_per_epoch
        warmup_steps = round(config.warmup_epochs * session.steps_per_epoch)

        # the loss of one point for each class, and that of equal embeddings
        counts = learned.labels.bincount() if config.supervised else torch.ones(len(learned))
        floor = supcon_floor(counts, config.batch_size, config.views, config.temperature)
        collapse = supcon_collapse(config.batch_size, config.views)
        if not config.cross_entropy_weight:
            session.constants = {"train/loss_floor": floor, "train/loss_collapse": collapse}

        # ------------------------------------------------------------ Training
        @session.compile  # if --compile=True
        def compute(
            batch: torch.Tensor, labels: torch.Tensor, randoms: list[Random]
        ) -> dict[str, torch.Tensor]:
            views = [
                preprocess(augmentation.augment(batch, random, config.augment, flip))
                for random in randoms
            ]
            embeddings, logits = model(torch.cat(views))  # (V·B,P) unit length; (V·B,K), None
            embeddings = rearrange(embeddings, "(v b) p -> b v p", v=config.views)
            positives = labels if config.supervised else None
            loss = supcon_loss(embeddings, positives, config.temperature)
            if logits is None:
                return {"loss": loss}
            cross_entropy = F.cross_entropy(logits, labels.repeat(config.views))
            total = loss + config.cross_entropy_weight * cross_entropy
            return {"loss": total, "contrastive": loss, "cross_entropy": cross_entropy}

        is_checked = not session.constants
        for epoch in session.epochs():  # starts where the checkpoint ended
            network.train()
            for step, indices, batch in session.batches():  # (B,), (B,C,S,S) uint8
                labels = learned.labels[indices]  # (B,)
                randoms = [Random(indices, config.seed, epoch, v) for v in range(config.views)]
                share = optimizers.schedule(config.schedule, step, total_steps, warmup_steps)
                optimizers.set_learning_rate(optimizer, share)

                values = compute(batch, labels, randoms)
                session.accelerator.backward(values["loss"])
                norm = session.accelerator.clip_grad_norm_(
                    network.parameters(), config.max_gradient_norm
                )
                optimizer.step()
                optimizer.zero_grad()
                session.log_step(**values, gradient_norm=norm)

            if session.evaluates(network, preprocess):  # the main process only
                row = report.knn_accuracies(
                    network.encoder, preprocess, references, images.validation
                )
                # without labels none may choose the epoch either, so the last one is kept
                chosen_by = "val/knn_cosine_accuracy" if config.supervised else ""
                session.log_epoch(row, maximize=chosen_by)
            if not is_checked and math.isfinite(session.loss):  # there is a first row
                is_checked = True
                if session.loss > 0.99 * collapse + 0.01 * floor:
                    advice = "a lower --learning_rate, more --warmup_epochs or a higher "
                    advice += "--temperature"
                    session.say(f"warning: all embeddings are nearly equal; try {advice}")
        if not session.is_main:
            return {}

        # ------------------------------------------------------------ Evaluation
        session.load_best(network, preprocess)
        encoder = network.encoder
        about = {"method": METHOD, "dataset": config.dataset, "class_names": images.class_names}
        about |= {"mean": images.mean, "std": images.std, "white": config.white}
        models.save_encoder(session.run_dir, encoder, architecture | about)
        session.say("training the linear classifiers, then measuring and drawing")
        latents = report.encode_splits(encoder, preprocess, images, config.test)
        classifier, row = probes.linear_classifier(latents, classes, config.balance)
        models.save_weights(session.run_dir / "classifier.safetensors", classifier)
        projections = None
        if config.head != "none":  # else the features are what the loss compares
            projections = latents.projected(network.head)
            of_head, found = probes.linear_classifier(projections, classes, config.balance)
            row |= {f"projection/{name.replace('/', '_')}": v for name, v in found.items()}
            models.save_weights(session.run_dir / "head.safetensors", network.head)
        session.log(row)

        # with --balance they are others than the linear probes of all scripts
        probe = None if config.balance else classifier
        measured = report.measure(latents, classifier, images, probe)
        metrics = measured.metrics
        metrics["val/classifier_loss"] = row["val/classifier_loss"]
        if config.test:
            further = {}
            if projections is not None:
                probe = None if config.balance else of_head
                probed = report.probe_predictions(projections, classes, probe)
                metrics |= report.latent_metrics(projections, probed, "projection", "projection")
                further = {"projections": projections.test}
            path = session.run_dir / "latents.npz"
            predictions, names = measured.predictions, images.class_names
            report.save_latents(path, latents, predictions, names, **further)
        pictures.publish(session, images, latents, measured.probabilities, metrics)
        session.say(f"\n{tables.final(metrics)}")
        return session.finish(metrics)


if __name__ == "__main__":
    main(parse(Config))
