"""The metrics of one latent space in a comparison, the same for runs, PCA and pixels.

A space is given by its latents of all splits, or by a module from images to latents; metrics are
named as in `display.tables.COMPARED`.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import geometry, neighbors, probes, report, samples

NEIGHBORS = (1, 5, 20, 100)  # 5 is knn_accuracy, as the training scripts report it
MAP_NEIGHBORS = 20  # of each image of a map, among the images of the map
LABELS_PER_CLASS = (10, 50, 100, 1000)


@dataclass(frozen=True)
class Space:
    """A latent space with its metrics.

    Attributes:
        predictions: int64 (N,) of all test images, by the run's own classifier or, where there is
            none, by the linear probe. confidences: float (N,), the probability of the prediction.
        map_latents: float (M,D), of the images in the maps. points: (M,2), their t-SNE.
        std: standard deviation of labels_10 and so on over the draws.
    """

    name: str
    metrics: dict[str, float]
    predictions: Tensor
    confidences: Tensor
    map_latents: Tensor
    points: np.ndarray
    std: Mapping[str, float] = field(default_factory=dict)


class Pixels(nn.Module):
    """Images (B,C,S,S), uint8 or floats in [0,1], to their pixels in [0,1], (B,C·S·S)."""

    def forward(self, images: Tensor) -> Tensor:
        return report.flattened(images)


class PCAEncoder(nn.Module):
    """Images to their principal components, (B,C,S,S) -> (B,D)."""

    def __init__(self, pca: geometry.PCA):
        super().__init__()
        self.pca, self.pixels = pca, Pixels()

    def forward(self, images: Tensor) -> Tensor:
        return self.pca.encode(self.pixels(images))


class Projection(nn.Module):
    """An encoder and its projection head: images (B,C,S,S) to unit vectors (B,P)."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.head(self.encoder(images)), dim=1)


def measure(
    name: str,
    latents: probes.Latents,
    classifier: nn.Module | None,
    map_indices: Tensor,
    label_draws: int,
) -> tuple[Space, nn.Linear]:
    """The metrics that depend on the latents alone, and the linear probe of all training latents.

    `classifier` is the run's own, if there is one; `map_indices` int64 (M,) are the test images
    that the maps show.
    """
    classes = int(latents.train_labels.max()) + 1
    probe = probes.fit_linear(latents, classes).layer()
    predictions = {"linear_accuracy": probes.predict(probe, latents.test)}
    if classifier is not None:
        predictions["accuracy"] = probes.predict(classifier, latents.test)
    metrics = {key: probes.accuracy(p, latents.test_labels) for key, p in predictions.items()}
    rows = samples.stratified(latents.test_labels)
    asked, true = latents.test[rows], latents.test_labels[rows]
    # as many neighbors as there are references would be the most frequent class
    ks = [k for k in NEIGHBORS if k <= 5 or k < len(latents.train)]
    by_k = neighbors.predict_by_k(latents.train, latents.train_labels, asked, ks)
    for k, found in by_k.items():
        hits = samples.estimate((found == true).float(), true, len(latents.test))
        metrics |= hits.named("knn_accuracy" if k == 5 else f"knn_{k}")

    few = probes.label_efficiency(latents, classes, LABELS_PER_CLASS, label_draws)
    metrics |= {f"labels_{count}": statistics.fmean(values) for count, values in few.items()}
    std = {f"labels_{n}": statistics.stdev(v) if len(v) > 1 else 0.0 for n, v in few.items()}

    shape = geometry.shape(latents.test, latents.test_labels, "latent")
    metrics |= {key.removeprefix("latent/"): value for key, value in shape.items()}
    map_latents = latents.test[map_indices]
    points = geometry.tsne(map_latents, seed=0)
    trust = geometry.trustworthiness(map_latents.cpu(), torch.from_numpy(points))
    metrics |= {"trustworthiness": trust, "dimensions": map_latents.shape[1]}
    own = predictions.get("accuracy", predictions["linear_accuracy"])
    confidences = probes.probabilities(classifier or probe, latents.test).amax(1)
    return Space(name, metrics, own, confidences, map_latents, points, std), probe


def nearest(latents: Tensor, k: int) -> Tensor:
    """The k nearest neighbors of each latent among the others, in Euclidean distance.

    Args:
        latents: float (M,D), as `Space.map_latents`.

    Returns:
        int64 (M,k), the nearest first; (M,M-1) if there are no k others.
    """
    centered = latents - latents.mean(0)  # smaller rounding errors
    distances = torch.cdist(centered, centered)  # (M,M)
    distances.fill_diagonal_(torch.inf)
    return neighbors.smallest(distances, min(k, len(latents) - 1))


def robustness(
    encoder: nn.Module, classifiers: Sequence[nn.Module], splits: Mapping[str, Any]
) -> list[tuple[dict[str, float], np.ndarray]]:
    """Of each classifier its accuracy on the named splits, those of `corruptions.all_corrupted`.

    Beside it, of each image (M,), the share of corruptions under which its class is found.
    """
    found = [({}, []) for _ in classifiers]  # accuracies, and hits (M,) on what is corrupted
    for name, split in splits.items():
        latents = report.encode(encoder, nn.Identity(), split)
        for (accuracies, hits), classifier in zip(found, classifiers, strict=True):
            predictions = probes.predict(classifier, latents)
            accuracies[name] = probes.accuracy(predictions, split.labels)
            if name != "robust_clean":
                hits.append((predictions == split.labels).double())
    return [(accuracies, torch.stack(hits).mean(0).cpu().numpy()) for accuracies, hits in found]


def class_accuracies(spaces: Sequence[Space], labels: Tensor, classes: int) -> np.ndarray:
    """Accuracy of each class, float (K,), mean over runs; NaN for a class without test images."""
    counts = labels.bincount(minlength=classes)
    hits = [labels[s.predictions == labels].bincount(minlength=classes) for s in spaces]
    return (torch.stack(hits).double().mean(0) / counts).cpu().numpy()


def confusions(
    spaces: Sequence[Space], labels: Tensor, classes: int, most: int
) -> list[tuple[int, int, float]]:
    """The `most` frequent confusions (class, predicted class, rate), means over runs."""
    pairs = torch.stack([labels * classes + space.predictions for space in spaces]).flatten()
    counts = pairs.bincount(minlength=classes**2).view(classes, classes).double()
    rates = counts / counts.sum(1, keepdim=True).clamp(min=1)
    rates.fill_diagonal_(0)
    order = rates.flatten().argsort(descending=True, stable=True)[:most].tolist()
    found = [(n // classes, n % classes, rates.flatten()[n].item()) for n in order]
    return [pair for pair in found if pair[2] > 0]


def accuracy_curve(spaces: Sequence[Space], kind: str) -> dict[float, tuple[float, float]]:
    """Mean and standard deviation over runs of the accuracy, by severity or number of labels.

    `kind` is noise, shift or labels; of a single run, labels have the std over the draws.
    """
    start = {} if kind == "labels" else {0.0: "robust_clean"}
    first = spaces[0].metrics
    keys = {float(key[len(kind) + 1 :]): key for key in first if key.startswith(f"{kind}_")}
    curve = {}
    for x, key in (start | keys).items():
        values = [space.metrics[key] for space in spaces if key in space.metrics]
        std = statistics.stdev(values) if len(values) > 1 else spaces[0].std.get(key, 0.0)
        curve[x] = statistics.fmean(values), std
    return curve
