"""Scores that put methods on an equal footing: classification, retrieval, clustering, intervals.

Pure functions of labels, predictions and latents. scikit-learn computes what it has.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import samples

BLOCK = 512  # queries whose similarities to all images are in memory at a time
QUERIES = 2000  # of retrieval; sorting all images for each of 10,000 takes half a minute on a core
BINS = 15  # of the calibration error, as in Guo et al. 2017


def classification(labels: Tensor, predictions: Tensor) -> dict[str, float]:
    """accuracy, balanced_accuracy (the mean over classes) and macro_f1 of predictions int64 (N,).

    The means are over the classes of `labels`; on balanced ones the first two are equal.
    """
    from sklearn import metrics

    true, found = labels.cpu().numpy(), predictions.cpu().numpy()
    macro = {"labels": np.unique(true), "average": "macro", "zero_division": 0}
    with warnings.catch_warnings(action="ignore"):  # a class that is predicted but not there
        return {
            "accuracy": float(metrics.accuracy_score(true, found)),
            "balanced_accuracy": float(metrics.balanced_accuracy_score(true, found)),
            "macro_f1": float(metrics.f1_score(true, found, **macro)),
        }


def calibration_error(labels: Tensor, probabilities: Tensor) -> float:
    """Expected calibration error: Σ over bins of n_b/N · |accuracy_b − confidence_b|, 0 to 1.

    The bins are 15 equal intervals of the confidence, the largest probability of each row of
    `probabilities` float (N,K) (Guo et al. 2017, equation 3). `labels` int64 (N,).
    """
    confidence, predictions = probabilities.double().max(dim=1)
    surplus = (predictions == labels).double() - confidence  # (N,)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    sums = torch.zeros(BINS, dtype=torch.float64, device=labels.device).index_add_(0, bins, surplus)
    return (sums.abs().sum() / len(labels)).item()


def nearest_class_mean(latents: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """The class whose mean has the highest cosine similarity to each query, int64 (N,).

    `latents` float (M,D) and `labels` int64 (M,) give the means, those of unit vectors.
    """
    present = labels.unique()
    unit = F.normalize(latents, dim=1)
    means = torch.stack([unit[labels == label].mean(0) for label in present])
    return present[(F.normalize(queries, dim=1) @ F.normalize(means, dim=1).T).argmax(1)]


def retrieval(latents: Tensor, labels: Tensor) -> dict[str, float]:
    """recall_at_1 and mean_average_precision: the means over the queries of `retrieve`.

    Nothing where no class has two images.
    """
    asked, total = labels[queries(labels)], int((labels.bincount() > 1)[labels].sum())
    if not len(asked):
        return {}
    first, precision = retrieve(latents, labels)
    recall = samples.estimate(first.float(), asked, total)
    return recall.named("recall_at_1") | samples.estimate(precision, asked, total).named(
        "mean_average_precision"
    )


def queries(labels: Tensor) -> Tensor:
    """Which images query, int64 (Q,): a stratified sample of at most `QUERIES`.

    Those without another image of their class are left out. By labels int64 (N,) alone, so that
    the queries of two spaces are the same.
    """
    rows = samples.stratified(labels, QUERIES, QUERIES)
    return rows[labels.bincount()[labels[rows]] > 1]


def retrieve(latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each of the `queries` among all other images, by cosine similarity: (Q,) bool, (Q,) float.

    Whether the first is a hit, an image of the query's class; and the average precision, the mean,
    over the hits, of the precision at the rank of each. `latents` float (N,D), `labels` int64 (N,).
    """
    unit = F.normalize(latents.float(), dim=1)
    ranks = torch.arange(1, len(labels), device=labels.device)
    firsts, precisions = [], []
    for rows in samples.blocks(queries(labels), len(labels), BLOCK):
        similarity = unit[rows] @ unit.T
        similarity.scatter_(1, rows[:, None], -torch.inf)  # the query itself comes last
        order = similarity.argsort(dim=1, descending=True)[:, :-1]
        hits = labels[order] == labels[rows, None]  # (B,N−1)
        firsts.append(hits[:, 0])
        precisions.append((hits.cumsum(1) / ranks * hits).sum(1) / hits.sum(1))
    return torch.cat(firsts), torch.cat(precisions)


def clustering(latents: Tensor, labels: Tensor, seed: int = 0) -> dict[str, float]:
    """How well k-means, with as many clusters as classes, finds the classes: nmi and ari.

    Normalized mutual information, 0 to 1, and adjusted Rand index, about 0 for random clusters and
    1 for the classes themselves. `latents` float (N,D), `labels` int64 (N,).
    """
    from sklearn import cluster, metrics

    kmeans = cluster.KMeans(len(labels.unique()), n_init=4, random_state=seed)
    with warnings.catch_warnings(action="ignore"):  # fewer distinct latents than clusters
        found = kmeans.fit_predict(latents.cpu().numpy())
    true = labels.cpu().numpy()
    return {
        "nmi": float(metrics.normalized_mutual_info_score(true, found)),
        "ari": float(metrics.adjusted_rand_score(true, found)),
    }


@dataclass(frozen=True)
class Interval:
    """A value with the limits of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def interval(values: Sequence[np.ndarray]) -> Interval:
    """Mean of per-image values over images and runs, with its 95 % interval.

    Args:
        values: one float array (N,) for each run with another seed, of the same N test images:
            0 to 1, such as whether a prediction is right.

    The squared standard error is s²/N, s being the standard deviation over images of the mean over
    runs, plus, with several runs, the variance over runs of their means divided by their number.
    It is multiplied by the quantile of Student's t, with the degrees of freedom of a sum of
    variances (Welch 1947, Satterthwaite 1946): few runs tell little of how much runs differ. For s
    an image with each of the limits, 0 and 1, joins the others (Agresti & Caffo 2000): where all
    are right, the next may be wrong.
    """
    table = np.stack(values).astype(float)  # (runs,N)
    return _interval(table.mean(0), (0, 1), [table.mean(1)])


def difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Interval:
    """How much two methods differ, first − second, paired on the same test images.

    As `interval`, with the limits -1 and 1. The runs of the two are paired where they are equally
    many; else the variances over runs of both are added, where a single run is taken to vary as
    those of the other method.
    """
    tables = [np.stack(values).astype(float) for values in (first, second)]
    images = tables[0].mean(0) - tables[1].mean(0)
    runs = [table.mean(1) for table in tables]
    if len(runs[0]) == len(runs[1]):
        runs = [runs[0] - runs[1]]
    return _interval(images, (-1, 1), runs)


def _interval(
    images: np.ndarray, limits: tuple[float, float], runs: Sequence[np.ndarray]
) -> Interval:
    """The mean of values (N,) of images, and its interval; `runs` are the means of each run, of one
    method or two.
    """
    from scipy import stats

    sample = np.append(images, limits)
    parts = [(sample.var(ddof=1) / len(sample), len(sample) - 1)]  # squared error, its freedom
    several = [means for means in runs if len(means) > 1]
    for means in runs if several else []:
        known = means if len(means) > 1 else several[0]
        parts.append((known.var(ddof=1) / len(means), len(known) - 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    mean = float(images.mean())
    return Interval(mean, mean - half, mean + half)
