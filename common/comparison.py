"""What is measured of a space that is laid beside others?   the same for runs, PCA and pixels

Each space comes as latents of all splits, or as a module from images to latents; every figure goes
back under the keys of `tables.COMPARED`.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import evaluation, geometry, neighbours, probes, robustness

NEIGHBOURS = (1, 5, 20, 100)  # 5 is knn_accuracy, as the training scripts report it
LABELS = (10, 50, 100, 1000)  # per class


@dataclass(frozen=True)
class Space:
    """A measured space.

    Attributes:
        predictions: int64 (N,) of all test images, by the run's own classifier or, where there is
            none, by the linear probe.
        shown: float (M,D), latents of the images in the maps. points: (M,2), their t-SNE.
        spread: standard deviation of labels_10 and so on over the draws.
    """

    name: str
    metrics: dict[str, float]
    predictions: Tensor
    shown: Tensor
    points: np.ndarray
    spread: Mapping[str, float] = field(default_factory=dict)


class Pixels(nn.Module):
    """Images (B,C,S,S), uint8 or floats in [0,1], to their pixels in [0,1], (B,C·S·S)."""

    def forward(self, images: Tensor) -> Tensor:
        return (images / 255 if images.dtype == torch.uint8 else images).flatten(1)


class LinearCode(nn.Module):
    """Images to the code that PCA gives them, (B,C,S,S) -> (B,D)."""

    def __init__(self, pca: geometry.PCA):
        super().__init__()
        self.pca, self.pixels = pca, Pixels()

    def forward(self, images: Tensor) -> Tensor:
        return self.pca.encode(self.pixels(images))


class Projected(nn.Module):
    """Images to unit vectors through an encoder and its projection head, (B,C,S,S) -> (B,P)."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.head(self.encoder(images)), dim=1)


def measure(
    name: str,
    latents: probes.Latents,
    classifier: nn.Module | None,
    in_map: Tensor,
    label_draws: int,
) -> tuple[Space, nn.Linear]:
    """What can be measured of latents alone, and the linear probe that learned from all of them.

    `classifier` is the run's own, if there is one; `in_map` int64 (M,) says which test images the
    maps show.
    """
    classes = int(latents.train_labels.max()) + 1
    probe = probes.fit_linear(latents, classes).layer()
    found = {"linear_accuracy": probes.predict(probe, latents.test)}
    if classifier is not None:
        found["accuracy"] = probes.predict(classifier, latents.test)
    votes = neighbours.predict_by_k(latents.train, latents.train_labels, latents.test, NEIGHBOURS)
    found |= {"knn_accuracy" if k == 5 else f"knn_{k}": votes[k] for k in NEIGHBOURS}
    metrics = {key: probes.accuracy(guess, latents.test_labels) for key, guess in found.items()}

    few = probes.label_efficiency(latents, classes, LABELS, label_draws)
    metrics |= {f"labels_{count}": statistics.fmean(values) for count, values in few.items()}
    spread = {f"labels_{n}": statistics.stdev(v) if len(v) > 1 else 0.0 for n, v in few.items()}

    shape = geometry.shape(latents.test, latents.test_labels, "latent")
    metrics |= {key.removeprefix("latent/"): value for key, value in shape.items()}
    shown = latents.test[in_map]
    points = geometry.tsne(shown, seed=0)
    metrics["trustworthiness"] = geometry.trustworthiness(shown.cpu(), torch.from_numpy(points))
    metrics["dimensions"] = shown.shape[1]
    predictions = found.get("accuracy", found["linear_accuracy"])
    return Space(name, metrics, predictions, shown, points, spread), probe


def disturbed(encoder: nn.Module, classifier: nn.Module, split) -> dict[str, float]:
    """Accuracy on disturbed images of a split, noise_0.1 and so on; undisturbed: robust_clean."""

    def reached(images) -> float:
        latents = evaluation.encode(encoder, nn.Identity(), images)
        return probes.accuracy(probes.predict(classifier, latents), split.labels)

    return {"robust_clean": reached(split)} | {
        f"{kind}_{strength:g}": reached(robustness.disturbed(split, kind, strength))
        for kind, (_, strengths) in robustness.DISTURBANCES.items()
        for strength in strengths
    }


def class_accuracies(spaces: Sequence[Space], labels: Tensor, classes: int) -> np.ndarray:
    """Accuracy of each class, float (K,), the mean over several runs of one kind; NaN: none."""
    counts = labels.bincount(minlength=classes)
    hits = [labels[s.predictions == labels].bincount(minlength=classes) for s in spaces]
    return (torch.stack(hits).double().mean(0) / counts).cpu().numpy()


def confusions(
    spaces: Sequence[Space], labels: Tensor, classes: int, most: int
) -> list[tuple[int, int, float]]:
    """The `most` frequent (class, taken for, share of the class), means over runs of one kind."""
    pairs = torch.stack([labels * classes + space.predictions for space in spaces]).flatten()
    counts = pairs.bincount(minlength=classes**2).view(classes, classes).double()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    shares.fill_diagonal_(0)
    order = shares.flatten().argsort(descending=True, stable=True)[:most].tolist()
    found = [(n // classes, n % classes, shares.flatten()[n].item()) for n in order]
    return [pair for pair in found if pair[2] > 0]


def line(spaces: Sequence[Space], kind: str) -> dict[float, tuple[float, float]]:
    """Accuracy by strength of noise or shift, or by number of labels: mean and deviation.

    The deviation is over runs of one kind; of a single run, labels have that over the draws.
    """
    start = {} if kind == "labels" else {0.0: "robust_clean"}
    first = spaces[0].metrics
    keys = {float(key[len(kind) + 1 :]): key for key in first if key.startswith(f"{kind}_")}
    found = {}
    for x, key in (start | keys).items():
        values = [space.metrics[key] for space in spaces if key in space.metrics]
        alone = spaces[0].spread.get(key, 0.0)
        deviation = statistics.stdev(values) if len(values) > 1 else alone
        found[x] = statistics.fmean(values), deviation
    return found
