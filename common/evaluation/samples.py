"""Large test sets: what compares pairs of images is measured on a sample, with a standard error.

Up to `EXACT` test images all of them count. Beyond, `SAMPLE` of them are compared with all others:
the work grows with the number of images, not with its square. The sample is stratified and depends
on the labels alone, so that two latent spaces are measured on the same images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 10_000  # images; the test sets that are usual in the literature
SAMPLE = 5_000
NOT_ASKED = -1  # in the place of a prediction, for an image outside the sample
NUMBERS_AT_ONCE = 2**26  # of a block of distances in memory, 256 MiB


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` of `total` images, with the standard error of the sampling.

    The error is that against the mean over all of these images, 0 where all count. How far these
    images stand for others is another question, that of `scores.interval`.
    """

    value: float
    error: float
    count: int
    total: int

    def named(self, name: str) -> dict[str, float]:
        """NAME; of a sample also NAME_standard_error and NAME_images, the size of the sample."""
        found = {name: self.value}
        if self.count < self.total:
            found |= {f"{name}_standard_error": self.error, f"{name}_images": self.count}
        return found


def stratified(labels: Tensor, exact: int | None = None, count: int | None = None) -> Tensor:
    """Rows int64 (n,), ascending: all up to `exact` images, else `count` of them, stratified.

    Each class is represented in proportion to its size, to within one image. `exact` and `count`
    are `EXACT` and `SAMPLE` unless given. `labels` int64 (N,).
    """
    exact, count = EXACT if exact is None else exact, SAMPLE if count is None else count
    total = len(labels)
    if total <= exact:
        return torch.arange(total, device=labels.device)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).to(labels.device)
    order = order[labels[order].argsort(stable=True)]  # by class, in random order within it
    places = ((torch.arange(count, dtype=torch.float64) + 0.5) * (total / count)).long()
    return order[places.to(labels.device)].sort().values


def estimate(values: Tensor, labels: Tensor, total: int) -> Estimate:
    """The mean of values (n,) of a stratified sample out of `total` images, and its error.

    With allocation in proportion to the classes the squared error is (1 − n/N) s²/n, s² being the
    variance within classes (Cochran 1977, section 5.6); that of all values where the sample has one
    image of each class.

    Args:
        values: float (n,). labels: int64 (n,), the classes of the same images.
    """
    count, value = len(values), values.mean().item()
    if count >= total:
        return Estimate(value, 0.0, count, total)
    classes, labels = labels.unique(return_inverse=True)
    if count == len(classes):  # one of each: nothing varies within them, so they are taken as one
        classes, labels = classes[:1], torch.zeros_like(labels)
    values = values.double()
    sums = torch.zeros(len(classes), dtype=torch.float64, device=values.device)
    within = values - (sums.index_add(0, labels, values) / labels.bincount())[labels]
    variance = within.square().sum() / max(1, count - len(classes))
    return Estimate(value, ((1 - count / total) * variance / count).sqrt().item(), count, total)


def blocks(rows: Tensor, columns: int, most: int) -> tuple[Tensor, ...]:
    """Rows in blocks of at most `most`, fewer where each has to do with very many columns."""
    return rows.split(max(1, min(most, NUMBERS_AT_ONCE // max(1, columns))))
