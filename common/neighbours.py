"""Whose label have the nearest known latents?   k-nearest-neighbour classification

The distances are exact, and computed for a block of queries at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1024  # queries whose distances to all references are in memory at a time
GROUP = 32  # references of which only the nearest competes at first


def predict(
    references: Tensor, reference_labels: Tensor, queries: Tensor, neighbours: int = 5
) -> Tensor:
    """Majority vote of the nearest references in Euclidean distance; of equals, the nearest wins.

    Args:
        references: float (M,D). reference_labels: int64 (M,). queries: float (N,D).

    Returns:
        int64 (N,), the predicted labels.
    """
    return predict_by_k(references, reference_labels, queries, (neighbours,))[neighbours]


def predict_by_k(
    references: Tensor, reference_labels: Tensor, queries: Tensor, numbers: Sequence[int]
) -> dict[int, Tensor]:
    """The same for several numbers of neighbours at once: the distances are computed once.

    A number beyond that of the references means all of them.
    """
    most = min(max(numbers), len(references))
    classes = int(reference_labels.max()) + 1
    varying = references.amin(0) < references.amax(0)  # the others are as far from all references
    if not varying.all():
        references, queries = references[:, varying], queries[:, varying]
    centre = references.mean(0)  # small numbers: distances lose fewer digits
    references, queries = (references - centre).float(), (queries - centre).float()
    squares = references.square().sum(1)
    predictions = {number: [] for number in numbers}
    for block in queries.split(BLOCK):
        distances = torch.addmm(squares, block, references.T, alpha=-2)  # less ‖query‖²
        nearest = smallest(distances, most)  # (B,most)
        for number in numbers:
            voices = reference_labels[nearest[:, :number]]  # (B,number), the nearest first
            counts = torch.zeros(len(block), classes, device=block.device)
            counts.scatter_add_(1, voices, torch.ones(voices.shape, device=block.device))
            first = counts.gather(1, voices).argmax(1, keepdim=True)  # of those with most votes
            predictions[number].append(voices.gather(1, first)[:, 0])
    return {number: torch.cat(parts) for number, parts in predictions.items()}


def smallest(values: Tensor, number: int) -> Tensor:
    """Columns int64 (B,number) of the smallest of each row of values float (B,M), ascending.

    Exact, and faster than `topk` over the whole rows: the smallest lie in those of M/GROUP groups
    of columns whose own smallest is smallest, and in the columns left over.
    """
    count = values.shape[1] // GROUP
    if number >= count:
        return values.topk(number, largest=False, sorted=True).indices
    grouped = values[:, : count * GROUP].unflatten(1, (GROUP, count))  # column j in group j % count
    groups = grouped.amin(1).topk(number, largest=False).indices  # (B,number)
    first = torch.arange(0, count * GROUP, count, device=values.device)  # of group 0
    left_over = torch.arange(count * GROUP, values.shape[1], device=values.device)
    members = (groups[:, :, None] + first).flatten(1)  # (B,number·GROUP)
    columns = torch.cat([members, left_over.expand(len(values), -1)], dim=1)
    nearest = values.gather(1, columns).topk(number, largest=False, sorted=True).indices
    return columns.gather(1, nearest)
