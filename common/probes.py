"""What can a classifier read from frozen latents?   linear, MLP

Each probe sees latents (N,D) as they are; none of them changes the encoder.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.health import Gradients
from common.runtime import autocast

BLOCK = 1024  # latents at a time
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of the linear probe's weight penalty, strong to weak


@dataclass(frozen=True)
class Latents:
    """Latents float32 (N,D), labels int64 (N,) of the splits; `test` None where it stays unseen.

    `views` are further latents of the training images, changed a little each time.
    """

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor | None = None
    test_labels: Tensor | None = None
    views: tuple[Tensor, ...] = ()

    def projected(self, head: nn.Module) -> "Latents":
        """What a head (B,D) -> (B,P) makes of them, scaled to unit length; without the views."""
        names = [
            name for name in ("train", "validation", "test") if getattr(self, name) is not None
        ]
        with torch.no_grad():
            made = {name: F.normalize(head(getattr(self, name)), dim=1) for name in names}
        return replace(self, views=(), **made)


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardised latents.

    Attributes:
        weight: float (K,D). bias: float (K,). mean, std: float (D,).
        strength: the weight penalty that was best on validation. accuracy: there.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    strength: float
    accuracy: float

    def predict(self, latents: Tensor) -> Tensor:
        """Latents (N,D) to labels int64 (N,)."""
        return self.layer()(latents).argmax(1)

    def layer(self) -> nn.Linear:
        """The same classifier as one linear layer, the standardisation inside."""
        layer = nn.utils.skip_init(nn.Linear, *self.weight.T.shape, device=self.weight.device)
        scaled = self.weight / self.std
        layer.weight = nn.Parameter(scaled, requires_grad=False)
        layer.bias = nn.Parameter(self.bias - scaled @ self.mean, requires_grad=False)
        return layer


def fit_linear(latents: Latents, classes: int) -> LinearProbe:
    """Fit the linear probe by L-BFGS for several penalties; validation chooses among them.

    minimise  mean cross-entropy + strength/2 · ‖W‖²  from strong to weak, each start the last end.
    """
    mean, std = latents.train.mean(0), latents.train.std(0, correction=0)
    std = torch.where(std > 1e-6, std, 1.0)
    standard = (latents.train - mean) / std
    # L-BFGS would break with an error of its own
    if not (standard.isfinite().all() and std.isfinite().all()):
        raise UserError(
            "no linear probe fits these latents: some of them, or their spread, are not finite; "
            "start anew with a lower learning rate"
        )
    weight = standard.new_zeros(classes, standard.shape[1], requires_grad=True)
    bias = standard.new_zeros(classes, 1, requires_grad=True)
    best = None
    for strength in STRENGTHS:
        solver = torch.optim.LBFGS(
            [weight, bias],
            max_iter=100,
            tolerance_grad=1e-5,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )

        def objective(solver=solver, strength=strength) -> Tensor:
            solver.zero_grad()
            # softmax over the K classes is several times slower where they are the last dimension
            logits = torch.addmm(bias, weight, standard.T)[None]  # (1,K,N)
            loss = F.cross_entropy(logits, latents.train_labels[None])
            loss = loss + strength / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(objective)
        found = weight.detach().clone(), bias.detach()[:, 0].clone()
        probe = LinearProbe(*found, mean, std, strength, 0)
        reached = accuracy(probe.predict(latents.validation), latents.validation_labels)
        if best is None or reached > best.accuracy:
            best = replace(probe, accuracy=reached)
    return best


def label_efficiency(
    latents: Latents, classes: int, counts: Sequence[int], draws: int
) -> dict[int, list[float]]:
    """Test accuracy of the linear probe that knows so many labels per class, one for each draw.

    A fifth of these labels (at least one per class) chooses the penalty and the rest is fitted:
    whoever has ten labels per class has no larger validation set either. Which images are drawn
    depends on count and draw alone, so all spaces learn from the same ones. Counts are left out
    that some class does not have.
    """
    labels = latents.train_labels.cpu()
    members = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    found = {}
    for count in counts:
        if count < 2 or min(len(rows) for rows in members) < count:
            continue
        chooses = max(1, count // 5)
        found[count] = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(count * 1000 + draw)
            drawn = torch.stack(
                [rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in members]
            ).to(latents.train.device)  # (K,count)
            fitted, held = drawn[:, chooses:].flatten(), drawn[:, :chooses].flatten()
            few = Latents(
                latents.train[fitted], latents.train_labels[fitted],
                latents.train[held], latents.train_labels[held],
            )  # fmt: skip
            predicted = fit_linear(few, classes).predict(latents.test)
            found[count].append(accuracy(predicted, latents.test_labels))
    return found


def linear_classifier(latents: Latents, classes: int) -> tuple[nn.Linear, dict[str, float]]:
    """The linear probe as a layer (B,D) -> (B,K), with its losses and accuracies as one row."""
    layer = fit_linear(latents, classes).layer()
    row = {}
    for name, inputs, labels in (
        ("train", latents.train, latents.train_labels),
        ("val", latents.validation, latents.validation_labels),
    ):
        logits = layer(inputs)
        row[f"{name}/classifier_loss"] = F.cross_entropy(logits, labels).item()
        row[f"{name}/accuracy"] = accuracy(logits.argmax(1), labels)
    return layer, row


def train_classifier(
    classifier: nn.Module,
    latents: Latents,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    precision: str = "no",
) -> Iterator[dict[str, float]]:
    """Train a classifier on frozen latents by cross-entropy; yield its metrics after each epoch.

    The first epoch sees `latents.train`, the next ones `latents.views` in turn, then again from
    the start. AdamW with a one-cycle rate (a third of the epochs up, then down to nothing; Smith &
    Topin 2019). When the iterator ends, `classifier` holds the weights of the epoch that was best
    on validation and is in eval mode. The result is a pure function of the arguments.

    Yields:
        `train/classifier_loss`, `train/accuracy` (as seen while training, dropout active),
        `val/classifier_loss`, `val/accuracy`.

    Raises:
        UserError: a loss or gradient that is not finite; the classifier is of no use then.
    """
    views, labels, device = (
        (latents.train, *latents.views),
        latents.train_labels,
        latents.train.device,
    )
    batch_size = min(batch_size, len(labels))
    steps = len(labels) // batch_size
    rates = {"lr": learning_rate, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW(classifier.parameters(), **rates, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, epochs * steps)
    best_accuracy, best_state = -1.0, None
    gradients = Gradients(classifier)
    shuffle = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    for epoch in range(epochs):
        inputs = views[epoch % len(views)]
        classifier.train()
        loss_sum = torch.zeros((), device=device)
        correct = torch.zeros((), device=device)
        order = torch.randperm(len(labels), generator=shuffle)[: steps * batch_size]
        for rows in order.to(device).split(batch_size):
            with autocast(device, precision):
                logits = classifier(inputs[rows])
            loss = F.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            is_wrong = ~(loss.detach() + gradients.clip()).isfinite()
            gradients.add(schedule.last_epoch + 1, schedule.get_last_lr()[0], loss, is_wrong)
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach()
            correct += (logits.argmax(1) == labels[rows]).sum()
        if wrong := gradients.problem(precision):
            raise UserError(f"training the classifier on the latents: {wrong}")
        classifier.eval()
        with torch.no_grad():
            logits = classifier(latents.validation)
        row = {
            "train/classifier_loss": (loss_sum / steps).item(),
            "train/accuracy": (correct / (steps * batch_size)).item(),
            "val/classifier_loss": F.cross_entropy(logits, latents.validation_labels).item(),
            "val/accuracy": accuracy(logits.argmax(1), latents.validation_labels),
        }
        if row["val/accuracy"] > best_accuracy:
            best_accuracy, best_state = row["val/accuracy"], copy.deepcopy(classifier.state_dict())
        yield row
    classifier.load_state_dict(best_state)


@torch.no_grad()
def predict(classifier: nn.Module, latents: Tensor) -> Tensor:
    """Labels int64 (N,) that a classifier in eval mode gives to latents (N,D)."""
    return torch.cat([classifier(block).argmax(1) for block in latents.split(BLOCK)])


@torch.no_grad()
def probabilities(classifier: nn.Module, latents: Tensor) -> Tensor:
    """Class probabilities float32 (N,K) that a classifier in eval mode gives to latents (N,D)."""
    return torch.cat([classifier(block).float().softmax(1) for block in latents.split(BLOCK)])


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The fraction of equal entries, 0 to 1."""
    return (predictions == labels).float().mean().item()
