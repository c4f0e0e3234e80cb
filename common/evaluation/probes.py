"""Classifiers on frozen latents: linear probe, label efficiency, MLP.

All of them take latents (N,D); none changes the encoder.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

BLOCK = 1024  # latents at a time
LARGEST_LOGITS = 2**24  # numbers at a time while the linear probe is fitted, 64 MiB
FEWEST_STEPS = 200  # of the MLP, by default; fewer leave batch norm's running statistics behind
STRENGTHS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # of the linear probe's L2 penalty
CURVATURE = 0.1  # of the cross-entropy where classes are unsure, p (1 - p), roughly


@dataclass(frozen=True)
class Latents:
    """Latents float32 (N,D) and labels int64 (N,) of the splits; `test` None if it stays unseen.

    `views` are latents of augmented views of the training images.
    """

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor | None = None
    test_labels: Tensor | None = None
    views: tuple[Tensor, ...] = ()

    def projected(self, head: nn.Module) -> "Latents":
        """Their projections by a head (B,D) -> (B,P), of unit length; without the views."""
        splits = {name: getattr(self, name) for name in ("train", "validation", "test")}
        with torch.no_grad():
            projections = {
                name: F.normalize(head(split), dim=1)
                for name, split in splits.items()
                if split is not None
            }
        return replace(self, views=(), **projections)


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on centered latents of one scale.

    Attributes:
        weight: float (K,D). bias: float (K,). mean: float (D,).
        scale: float (), the root of the total variance, the sum over the dimensions.
        strength: of the L2 penalty that was best on validation. accuracy: on validation.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    strength: float
    accuracy: float

    def predict(self, latents: Tensor) -> Tensor:
        """Predicted labels int64 (N,) of latents (N,D)."""
        return predict(self.layer(), latents)

    def layer(self) -> nn.Linear:
        """The same classifier as one linear layer, with mean and scale folded in."""
        layer = nn.utils.skip_init(nn.Linear, *self.weight.T.shape, device=self.weight.device)
        scaled = self.weight / self.scale
        layer.weight = nn.Parameter(scaled, requires_grad=False)
        layer.bias = nn.Parameter(self.bias - scaled @ self.mean, requires_grad=False)
        return layer


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights float32 (K,) with which all classes among `labels` count alike; their mean is 1."""
    counts = labels.bincount(minlength=classes)
    return len(labels) / (counts.clamp(min=1) * (counts > 0).sum()).float()


def fit_linear(latents: Latents, classes: int, balance: bool = False) -> LinearProbe:
    """Fit the linear probe by L-BFGS for several penalties; validation accuracy selects one.

    minimize  mean cross-entropy + strength/2 · ‖W‖²  from strong to weak, with warm starts;
    with `balance` every class has the same share of the mean, and of the accuracy.

    All dimensions are divided by the same scale, so that neither a rotation of the space nor
    further constant dimensions change anything but the path of the solver. Divided by its own, each
    would count alike, and the last principal components of images, which are noise, as much as the
    first: with few labels PCA would look far worse than the pixels.
    """
    even, even_val = (
        class_weights(labels, classes) if balance else None
        for labels in (latents.train_labels, latents.validation_labels)
    )
    mean, std = latents.train.mean(0), latents.train.std(0, correction=0)
    scale = std.square().sum().sqrt().clamp(min=1e-6)
    if not (latents.train.isfinite().all() and scale.isfinite()):
        raise UserError(
            "no linear probe fits these latents: some of them, or their standard deviation, are "
            "not finite; start a new run with a lower learning rate"
        )
    spread = (std / scale).square()  # (D,), of the dimensions to be fitted; their sum is 1
    centered = (latents.train - mean) / scale
    weight, bias = centered.new_zeros(classes, len(spread)), centered.new_zeros(classes)
    best = None
    for strength in STRENGTHS:
        # the curvature is about CURVATURE·spread + strength: in these units it is 1 everywhere
        unit = (CURVATURE * spread + strength).rsqrt()
        weight, bias = _minimize(
            (centered * unit).T, latents.train_labels, even, strength * unit**2, weight / unit, bias
        )
        weight = weight * unit
        probe = LinearProbe(weight, bias, mean, scale, strength, 0)
        predictions = probe.predict(latents.validation)
        val_accuracy = accuracy(predictions, latents.validation_labels, even_val)
        if best is None or val_accuracy > best.accuracy:
            best = replace(probe, accuracy=val_accuracy)
    return best


@torch.enable_grad()
def _minimize(
    inputs: Tensor, labels: Tensor, even: Tensor | None, penalty: Tensor, weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weight (K,D) and bias (K,) of least cross-entropy + penalty/2 · W², from those given.

    `inputs` are float (D,N), `labels` int64 (N,), `even` weights (K,) of the classes or None,
    `penalty` is float (D,).
    """
    weight, bias = weight.clone().requires_grad_(), bias[:, None].clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=100,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )
    total = len(labels) if even is None else even[labels].sum()
    columns = max(BLOCK, LARGEST_LOGITS // len(weight))

    def objective() -> Tensor:
        solver.zero_grad()
        value = (penalty * weight.square()).sum() / 2
        value.backward()
        for block, true in zip(inputs.split(columns, 1), labels.split(columns), strict=True):
            # softmax over the K classes is several times slower where they are the last dimension
            logits = torch.addmm(bias, weight, block)[None]  # (1,K,B)
            loss = F.cross_entropy(logits, true[None], even, reduction="sum") / total
            loss.backward()
            value = value + loss
        return value.detach()

    solver.step(objective)
    return weight.detach(), bias.detach()[:, 0]


def label_efficiency(
    latents: Latents, classes: int, counts: Sequence[int], draws: int
) -> dict[int, list[float]]:
    """Test accuracy of the linear probe by number of labels per class, one value per draw.

    A fifth of the labels (at least one per class) is the validation set that selects the penalty,
    the rest is fitted: with few labels nobody has a large validation set. The images depend on
    count and draw alone, so all spaces learn from the same ones. Counts that exceed the size of
    some class are left out.
    """
    labels = latents.train_labels.cpu()
    members = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    accuracies = {}
    for count in counts:
        if count < 2 or min(len(rows) for rows in members) < count:
            continue
        held_out = max(1, count // 5)
        accuracies[count] = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(count * 1000 + draw)
            drawn = torch.stack(
                [rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in members]
            ).to(latents.train.device)  # (K,count)
            train, validation = drawn[:, held_out:].flatten(), drawn[:, :held_out].flatten()
            few = Latents(
                latents.train[train], latents.train_labels[train],
                latents.train[validation], latents.train_labels[validation],
            )  # fmt: skip
            predictions = fit_linear(few, classes).predict(latents.test)
            accuracies[count].append(accuracy(predictions, latents.test_labels))
    return accuracies


def linear_classifier(
    latents: Latents, classes: int, balance: bool = False
) -> tuple[nn.Linear, dict[str, float]]:
    """The linear probe as a layer (B,D) -> (B,K), and its losses and accuracies as one row."""
    layer = fit_linear(latents, classes, balance).layer()
    row = {}
    for name, inputs, labels in (
        ("train", latents.train, latents.train_labels),
        ("val", latents.validation, latents.validation_labels),
    ):
        row[f"{name}/classifier_loss"] = cross_entropy(layer, inputs, labels)
        row[f"{name}/accuracy"] = accuracy(predict(layer, inputs), labels)
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
    balance: bool = False,
    evaluate_every: int = 1,
) -> Iterator[dict[str, float]]:
    """Train a classifier on frozen latents by cross-entropy; yield its metrics.

    The epochs cycle through `latents.train` and then `latents.views`. AdamW with a one-cycle
    learning rate (warm-up for a third of the steps, then annealed to zero; Smith & Topin 2019).
    It is evaluated every `evaluate_every` epochs and after the last one. When the iterator ends,
    `classifier` has the weights of the best of these epochs on validation and is in eval mode.
    With `balance` all classes weigh alike, in the loss and in the choice of the epoch.
    The result is a pure function of the arguments.

    Yields:
        `train/classifier_loss`, `train/accuracy` (of the epoch, during training, with dropout),
        `val/classifier_loss`, `val/accuracy`.

    Raises:
        UserError: the loss or the gradients were not finite.
    """
    views, labels = (latents.train, *latents.views), latents.train_labels
    device = labels.device
    batch_size = min(batch_size, len(labels))
    steps = len(labels) // batch_size
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, epochs * steps)
    even, even_val = (
        class_weights(each, classifier[-1].out_features) if balance else None
        for each in (labels, latents.validation_labels)
    )
    best_accuracy, best_state = -1.0, None
    shuffle = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    for epoch in range(epochs):
        inputs = views[epoch % len(views)]
        classifier.train()
        loss_sum, correct = torch.zeros(2, device=device)
        order = torch.randperm(len(labels), generator=shuffle)[: steps * batch_size]
        for rows in order.to(device).split(batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = classifier(inputs[rows])
            loss = F.cross_entropy(logits.float(), labels[rows], even)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach()
            correct += (logits.argmax(1) == labels[rows]).sum()
        # an earlier gradient that is not finite shows in the losses after it
        norm = torch.nn.utils.get_total_norm([p.grad for p in classifier.parameters()])
        if not (loss_sum + norm).isfinite():
            raise UserError(
                "training the classifier on the latents: the loss or the gradients are not finite "
                f"(epoch {epoch + 1}, learning rate {learning_rate:g}); lower "
                "--classifier_learning_rate"
            )
        if (epoch + 1) % evaluate_every and epoch + 1 < epochs:
            continue
        classifier.eval()
        with torch.no_grad():
            logits = classifier(latents.validation)
        row = {
            "train/classifier_loss": (loss_sum / steps).item(),
            "train/accuracy": (correct / (steps * batch_size)).item(),
            "val/classifier_loss": F.cross_entropy(logits, latents.validation_labels).item(),
            "val/accuracy": accuracy(logits.argmax(1), latents.validation_labels),
        }
        chosen_by = accuracy(logits.argmax(1), latents.validation_labels, even_val)
        if chosen_by > best_accuracy:
            best_accuracy, best_state = chosen_by, copy.deepcopy(classifier.state_dict())
        yield row
    classifier.load_state_dict(best_state)


@torch.no_grad()
def predict(classifier: nn.Module, latents: Tensor) -> Tensor:
    """Predicted labels int64 (N,) of latents (N,D); the classifier in eval mode."""
    return torch.cat([classifier(block).argmax(1) for block in latents.split(BLOCK)])


@torch.no_grad()
def cross_entropy(classifier: nn.Module, latents: Tensor, labels: Tensor) -> float:
    """The mean cross-entropy of a classifier in eval mode, of latents (N,D) and labels (N,)."""
    blocks = zip(latents.split(BLOCK), labels.split(BLOCK), strict=True)
    losses = [F.cross_entropy(classifier(x), true, reduction="sum").item() for x, true in blocks]
    return sum(losses) / len(labels)


@torch.no_grad()
def probabilities(classifier: nn.Module, latents: Tensor) -> Tensor:
    """Class probabilities float32 (N,K) of latents (N,D); the classifier in eval mode."""
    return torch.cat([classifier(block).float().softmax(1) for block in latents.split(BLOCK)])


def accuracy(predictions: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """The fraction of equal entries, 0 to 1; of the `weights` (K,) of their labels, if given."""
    equal = (predictions == labels).float()
    if weights is None:
        return equal.mean().item()
    return (equal @ weights[labels] / weights[labels].sum()).item()
