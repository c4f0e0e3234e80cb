"""Loss functions: reconstruction, probability MAE, supervised contrastive.

reconstruction_loss(reconstructions, images, alpha)    alpha * MSE + (1 - alpha) * MAE
probability_mae(logits, labels)                        mean |softmax(logits) - one-hot|
supcon_loss(embeddings, labels, temperature)           supervised contrastive; SimCLR without labels
supcon_floor, supcon_collapse                          reference values of supcon_loss
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# exp((z_i·z_j - 1) / temperature) lies in [exp(-2 / temperature), 1] for unit vectors. As long as
# its lower end is a normal number, no maximum has to be subtracted: about exp(-80) in float32,
# exp(-667) in float64.
LOWEST_TEMPERATURE_FLOAT32 = 0.025
LOWEST_TEMPERATURE = 0.003

ROWS_ON_CPU = 256  # such a block of rows fits into the cache at usual batch sizes
CELLS_AT_ONCE_ON_CPU = 2**20  # up to so many similarities, one block is faster than several
CELLS_ON_ACCELERATOR = 2**25  # 128 MiB of float32: few launches, little memory


def reconstruction_loss(reconstructions: Tensor, images: Tensor, alpha: float) -> Tensor:
    """Mix squared and absolute error: alpha · mean (x̂ - x)² + (1 - alpha) · mean |x̂ - x|.

    `reconstructions` and `images` are (B,C,H,W) in [-1,1], so the squared error is 4 times and the
    absolute error 2 times what they are for images in [0,1]. Means over all elements; half types
    are raised to float32 first. Returns a scalar.

    ValueError: shapes differ (they would broadcast), alpha outside [0,1].
    """
    if reconstructions.shape != images.shape:
        raise ValueError(
            f"reconstructions {tuple(reconstructions.shape)} and images {tuple(images.shape)} "
            "must have the same shape"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0,1], not {alpha}")
    dtype = torch.promote_types(reconstructions.dtype, torch.float32)
    error = reconstructions.to(dtype) - images.to(dtype)  # (B,C,H,W)
    return alpha * error.square().mean() + (1 - alpha) * error.abs().mean()


def probability_mae(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean absolute error between softmax and one-hot: mean |p - onehot(y)| = mean 2(1 - p_y)/K.

    `logits` (B,K) of any float type, `labels` (B,) int64. The identity holds because the K - 1
    other probabilities sum to 1 - p_y; it is this sum that is computed, in float32 (float64 stays),
    so that nothing is lost where p_y rounds to 1. Returns a scalar in [0, 2/K].

    As a mean over K classes it is small: at uniform output and K = 10 its gradient is 2 % of cross-
    entropy's. The softmax is inside. Probabilities as input are a second softmax and not refused
    (no value of theirs is impossible for logits, and looking would stall a GPU each step); their
    trace is a loss that never falls below 2(1 - e/(e + K - 1))/K, 0.154 for K = 10.

    ValueError: shapes do not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (B,K) and labels (B,), not {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    others = logits.to(dtype).softmax(dim=1).scatter(1, labels[:, None], 0)  # (B,K)
    return 2 * others.mean()


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor | None,
    temperature: float,
    block_size: int | None = None,
) -> Tensor:
    """Supervised contrastive loss L_out, equation 2 of Khosla et al. 2020 (arXiv 2004.11362).

    L = mean over anchors i of -1/|P(i)| Σ_{p in P(i)} ln[exp(z_i·z_p/T) / Σ_{a≠i} exp(z_i·z_a/T)]

    with P(i) all other views of the anchor's class. No factor T/T_base. `embeddings` (B,V,D) are V
    views of B images (stack views in dimension 1; a `.view()` of concatenated views mixes images);
    they are scaled to unit length here, since what autocast made of a unit vector no longer is one
    and the bound 1/T on similarities is used below; unit vectors stay what they are, a zero vector
    stays zero. `labels` (B,) integers, or None: each image is its own class, which is SimCLR's
    loss for V = 2. Half types are raised to float32, everything to float64 for T below 0.025.
    Returns a scalar, float32 or float64 as the embeddings.

    An anchor without positives (V = 1, alone in its class) adds nothing to the sum and is not
    counted in its mean; it stays a negative of the others. A batch without any positive gives 0
    with zero gradient.

    With torch.distributed running, each process passes its own, equally many, images. Anchors are
    local, what they are compared with comes from all processes, and the loss is W · (local sum) /
    (global number of anchors): averaged over the W processes, as DDP averages gradients, loss and
    gradient are those of one process with the whole batch. Every process has to call this, and
    to weigh the result alike, since the gradient is that of the sum over processes.

    Memory is O(BV · D + block_size · BV); `block_size` rows of similarities are held at once (None:
    chosen by size and device). First derivatives only.

    ValueError: embeddings not (B,V,D) or empty, labels not (B,), V < 2 without labels, temperature
    below 0.003, block_size below 1.
    """
    if embeddings.ndim != 3 or embeddings.numel() == 0:
        raise ValueError(f"embeddings must be (B,V,D), not {tuple(embeddings.shape)}")
    batch_size, views, _ = embeddings.shape
    if labels is None and views < 2:
        raise ValueError("without labels each image needs at least 2 views")
    if labels is not None and labels.shape != (batch_size,):
        raise ValueError(f"labels must be ({batch_size},), not {tuple(labels.shape)}")
    if not temperature >= LOWEST_TEMPERATURE:
        raise ValueError(f"temperature must be at least {LOWEST_TEMPERATURE}, not {temperature}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    if labels is None:  # unique over all processes
        labels = torch.arange(batch_size, device=embeddings.device) + batch_size * _rank()
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    needed = torch.float32 if temperature >= LOWEST_TEMPERATURE_FLOAT32 else torch.float64
    raised = embeddings.to(torch.promote_types(dtype, needed))
    length = torch.linalg.vector_norm(raised, dim=-1, keepdim=True)  # (B,V,1)
    unit = raised / torch.where(length > 0, length, 1)
    loss = _SupConLoss.apply(
        unit.flatten(0, 1),  # (B*V,D)
        labels.to(unit.device).repeat_interleave(views),  # (B*V,)
        temperature,
        block_size,
    )
    return loss.to(dtype)


class _SupConLoss(torch.autograd.Function):
    """The loss of unit vectors, and its gradient from the same call, in blocks of rows.

    With E_ij = exp((z_i·z_j - 1)/T), E_ii = 0, R_i = Σ_j E_ij, A anchors that have a positive,
    m_i the mean of the anchor's positives (a class sum less z_i, so no pairs are needed), and
    r_i = 1/R_i, or 0 where the anchor has no positive:

        L = 1/A Σ_i [ ln R_i + (1 - z_i·m_i)/T ]
        dL/dz_i = 1/(A·T) [ Σ_j E_ij (r_i + r_j) z_j - 2 m_i ]

    r_j of all anchors makes the gradient a local sum: the processes exchange embeddings, labels
    and r before, and nothing in the backward pass. One process has all rows and uses E_ij = E_ji:
    each block begins at its own diagonal. Products are written in place, which autocast leaves
    in their own precision.
    """

    @staticmethod
    def forward(ctx, local: Tensor, labels: Tensor, temperature: float, block_size: int | None):
        everything, all_labels = _gather(local), _gather(labels)  # (N,D), (N,)
        is_alone = len(everything) == len(local)
        first = _rank() * len(local)
        own = slice(first, first + len(local))

        ordered = all_labels.sort().values
        group = torch.searchsorted(ordered, all_labels)  # (N,) equal where the labels are
        positives = torch.searchsorted(ordered, all_labels, right=True) - group - 1  # (N,)
        has_positive = positives[own] > 0
        scale = _world_size() / (positives > 0).sum().clamp(min=1).to(local.dtype)
        mean_positive = torch.zeros_like(everything).index_add_(0, group, everything)[group[own]]
        mean_positive.sub_(local).div_(positives[own].clamp(min=1)[:, None])  # (n,D)

        block_size = block_size or _default_block_size(local, everything)
        block_size = min(block_size, len(local))
        memory = local.new_empty(2, block_size * len(everything))  # reused: faster

        def blocks() -> Iterator[tuple[slice, int, Tensor]]:
            shift = local.new_full((), -1 / temperature)  # made on the device
            for start in range(0, len(local), block_size):
                rows = slice(start, min(start + block_size, len(local)))
                left = start if is_alone else 0
                shape = rows.stop - start, len(everything) - left
                block = memory[0, : math.prod(shape)].view(shape)
                other = everything[left:].T
                torch.addmm(shift, local[rows], other, alpha=1 / temperature, out=block).exp_()
                block.diagonal(first + start - left).fill_(0)
                yield rows, left, block

        row_sums = local.new_zeros(len(local))
        for rows, left, block in blocks():
            row_sums[rows] += block.sum(1)
            if is_alone:
                row_sums[rows.stop :] += block[:, rows.stop - left :].sum(0)
        per_anchor = row_sums.log() + (1 - (local * mean_positive).sum(1)) / temperature  # (n,)
        loss = scale * torch.where(has_positive, per_anchor, 0).sum()

        if ctx.needs_input_grad[0]:
            inverse = torch.where(has_positive, 1 / row_sums, 0)  # (n,)
            all_inverse = _gather(inverse)  # (N,)
            gradient = -2 * mean_positive  # (n,D)
            # a single block is still in memory, several are recomputed
            again = blocks() if block_size < len(local) else [(rows, left, block)]
            for rows, left, block in again:
                weights = memory[1, : block.numel()].view(block.shape)
                torch.add(inverse[rows, None], all_inverse[left:], out=weights)
                block.mul_(weights)
                gradient[rows].addmm_(block, everything[left:])
                if is_alone:
                    gradient[rows.stop :].addmm_(block[:, rows.stop - left :].T, local[rows])
            ctx.save_for_backward(gradient.mul_(scale / temperature))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None


def _default_block_size(local: Tensor, everything: Tensor) -> int:
    """Rows of similarities to hold at once: they fit a CPU's cache; few launches elsewhere."""
    if local.device.type != "cpu":
        return max(1, CELLS_ON_ACCELERATOR // len(everything))
    at_once = len(local) * len(everything) <= CELLS_AT_ONCE_ON_CPU
    return len(local) if at_once else ROWS_ON_CPU


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world_size() > 1 else 0


def _gather(tensor: Tensor) -> Tensor:
    """The tensors of all processes, in the order of rank, along dimension 0; equal shapes."""
    if _world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def supcon_floor(
    class_counts: Sequence[int] | Tensor, batch_size: int, views: int, temperature: float
) -> float:
    """The expected `supcon_loss` when each class is one point and the points are a simplex.

    Batches of B images, of V views each, are drawn from M images, n_k of them of class k out of K.
    An anchor has -1/(K-1) as similarity to all negatives and 1 to its positives. If j other images
    of the batch are of its class, of the N = V·B views m = V·(1+j) are, and its loss is

        ln( m - 1 + (N - m) · exp(-K/((K-1)·T)) ),   averaged over anchors that have a positive

    and over j, which is hypergeometric: B - 1 draws from M - 1 images, of which n_k - 1 count.
    Where all batches have as many images of each class no embedding of any size is lower (Jensen
    over positives, negatives and anchors; Graf et al. 2021, arXiv 2102.08817), and K - 1 dimensions
    are enough to reach it; at low temperature it is then ln(N/K - 1). Else it is reached but need
    not be the lowest value; none is below the average of ln(m - 1), its limit for T → 0.

    `class_counts` int (K,) images of each class in the training set, zeros left out. 0 where no
    anchor has a positive, as the loss. ValueError: temperature not above 0; fewer than B images.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    counts = torch.as_tensor(class_counts).cpu().double()
    counts = counts[counts > 0]
    images, classes = counts.sum(), len(counts)
    if images < batch_size:
        raise ValueError(f"{images:.0f} images are fewer than the {batch_size} of a batch")
    sizes, times = counts.unique(return_counts=True)  # classes of one size are alike
    sizes, others = sizes[:, None], torch.arange(batch_size).double()  # (S,1), j (B,)
    rest = batch_size - 1 - others

    def log_choose(total: Tensor, chosen: Tensor) -> Tensor:
        ways = torch.lgamma(total + 1) - torch.lgamma(chosen + 1)
        return (ways - torch.lgamma(total - chosen + 1)).where(chosen <= total, -torch.inf)

    chance = log_choose(sizes - 1, others) + log_choose(images - sizes, rest)
    chance = (chance - log_choose(images - 1, others[-1])).exp()  # (S,B)
    weights = chance * sizes * times[:, None] / images  # of anchors
    alike = views * (1 + others)  # m
    weights = weights * (alike > 1)
    negative = math.exp(-classes / (classes - 1) / temperature) if classes > 1 else 0.0
    losses = (alike - 1 + (views * batch_size - alike) * negative).log()
    total = weights.sum()
    return float((weights * losses.where(alike > 1, 0)).sum() / total) if total > 0 else 0.0


def supcon_collapse(batch_size: int, views: int) -> float:
    """The value of `supcon_loss` when all embeddings are equal: ln(views · batch_size - 1).

    True at any temperature and for any labels that give some anchor a positive; `batch_size` is
    the global one. ValueError: fewer than two views in all.
    """
    if views * batch_size < 2:
        raise ValueError(f"{views} views of {batch_size} images make no pair")
    return math.log(views * batch_size - 1)
