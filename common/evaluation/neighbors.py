"""k-nearest-neighbor classification of latents.

The distances are exact, and computed for a block of queries at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import samples

BLOCK = 1024  # queries whose distances to all references are in memory at a time
GROUP = 32  # references whose minimum is compared first


def predict(references: Tensor, reference_labels: Tensor, queries: Tensor, k: int = 5) -> Tensor:
    """Majority vote of the nearest references in Euclidean distance; ties go to the nearest.

    Args:
        references: float (M,D). reference_labels: int64 (M,). queries: float (N,D).

    Returns:
        int64 (N,), the predicted labels.
    """
    return predict_by_k(references, reference_labels, queries, (k,))[k]


def predict_by_k(
    references: Tensor, reference_labels: Tensor, queries: Tensor, ks: Sequence[int]
) -> dict[int, Tensor]:
    """`predict` for several k at once, from the same distances.

    A k above the number of references means all of them.
    """
    varying = references.amin(0) < references.amax(0)  # constant features change no order
    if not varying.all():
        references, queries = references[:, varying], queries[:, varying]
    _, references, queries = _centered(references, queries)
    squares = references.square().sum(1)
    classes, predictions = int(reference_labels.max()) + 1, {k: [] for k in ks}
    for block in samples.blocks(queries, len(references), BLOCK):
        distances = torch.addmm(squares, block, references.T, alpha=-2)  # less ‖query‖²
        nearest = smallest(distances, min(max(ks), len(references)))  # (B,largest k)
        for k in ks:
            predictions[k].append(_vote(reference_labels[nearest[:, :k]], classes))
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def predict_both(
    references: Tensor, reference_labels: Tensor, queries: Tensor, k: int = 5
) -> tuple[Tensor, Tensor]:
    """`predict` in Euclidean distance, and the same by cosine similarity, int64 (N,) each.

    Both from one product of all queries with all references, which takes most of the time.
    """
    norms = references.float().norm(dim=1)
    norms = torch.where(norms > 0, norms, torch.inf)  # to 0 every cosine is 0
    center, references, queries = _centered(references, queries)
    squares, to_center = references.square().sum(1), references @ center + center.square().sum()
    k, classes, found = min(k, len(references)), int(reference_labels.max()) + 1, ([], [])
    for block in samples.blocks(queries, len(references), BLOCK):
        products = block @ references.T  # (B,M), of what is centered
        distances = squares - 2 * products  # less ‖query‖²
        # (q + c)·(r + c) / ‖r + c‖; that is ‖q + c‖ times the cosine
        products += to_center
        products += (block @ center)[:, None]
        for values, parts in ((distances, found[0]), (products.div_(-norms), found[1])):
            parts.append(_vote(reference_labels[smallest(values, k)], classes))
    return torch.cat(found[0]), torch.cat(found[1])


def _centered(references: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of the references, and both less it, as float32: rounding errors are smaller."""
    center = references.mean(0)
    return center.float(), (references - center).float(), (queries - center).float()


def _vote(votes: Tensor, classes: int) -> Tensor:
    """The class int64 (B,) with the most of the votes int64 (B,k), the nearest ones first."""
    counts = torch.zeros(len(votes), classes, device=votes.device)
    counts.scatter_add_(1, votes, torch.ones(votes.shape, device=votes.device))
    first = counts.gather(1, votes).argmax(1, keepdim=True)  # the nearest with most votes
    return votes.gather(1, first)[:, 0]


def smallest(values: Tensor, number: int) -> Tensor:
    """Columns int64 (B,number) of the smallest values in each row of float (B,M), ascending.

    Exact, and faster than `topk` over whole rows: the smallest lie in the `number` groups of GROUP
    columns with the smallest minima, or in the columns left over.
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
