"""Geometry of a latent space: silhouette, separation, alignment, uniformity, rank, PCA, t-SNE.

Pure functions of latents (N,D) and labels (N,). All pairs count: by sums over classes where
possible, else in blocks of rows, which are a sample where there are very many (`samples.py`).
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import samples

BLOCK = 1024  # rows of the N×N distances in memory at a time
TSNE_STEPS = 500  # twice as many take twice the time and give the same trustworthiness
EXACT_PCA = 4096  # pixels up to which all eigenvectors of the covariance are computed


def silhouette(latents: Tensor, labels: Tensor) -> samples.Estimate:
    """Mean silhouette score (b − a) / max(a, b).

    a is the mean Euclidean distance to the other members of its class, b the smallest mean
    distance to another class (Rousseeuw 1987). From −1 (in the wrong class) to 1; an image that
    is alone in its class counts 0. NaN with fewer than two classes. Of a sample, the distances are
    those to all images, so that each score is exact.

    Args:
        latents: float (N,D). labels: int64 (N,).
    """
    chosen = samples.stratified(labels)
    classes, labels = labels.unique(return_inverse=True)
    if len(classes) < 2:
        return samples.Estimate(float("nan"), 0.0, len(labels), len(labels))
    latents = (latents - latents.mean(0)).float()  # centered, for smaller rounding errors
    counts = labels.bincount()  # (K,)
    members = latents.new_zeros(len(labels), len(classes)).scatter_(1, labels[:, None], 1)  # (N,K)
    scores = []
    for rows in samples.blocks(chosen, len(latents), BLOCK):
        own = labels[rows, None]  # (B,1)
        sums = torch.cdist(latents[rows], latents) @ members  # (B,K)
        a = sums.gather(1, own) / (counts[own] - 1).clamp(min=1)
        b = (sums / counts).scatter(1, own, float("inf")).amin(1, keepdim=True)
        score = (b - a) / torch.maximum(a, b).clamp(min=1e-12)
        scores.append(torch.where(counts[own] > 1, score, 0.0)[:, 0])
    return samples.estimate(torch.cat(scores), labels[chosen], len(labels))


def class_separation(latents: Tensor, labels: Tensor) -> float:
    """Between-class over within-class scatter.

    tr S_B / tr S_W = Σ_k n_k ‖μ_k − μ‖² / Σ_i ‖x_i − μ_k(i)‖²   (Fukunaga 1990, section 10.2,
    criterion J₄). From 0 (all classes have one mean) to infinity (classes are points), invariant
    to rotation and scale. NaN with fewer than two classes, or if all latents coincide.

    Args:
        latents: float (N,D). labels: int64 (N,).
    """
    classes, labels = labels.unique(return_inverse=True)
    if len(classes) < 2:
        return float("nan")
    latents = latents.double()
    latents = latents - latents.mean(0)
    sums = latents.new_zeros(len(classes), latents.shape[1]).index_add_(0, labels, latents)
    means = sums / labels.bincount()[:, None]  # (K,D)
    within = (latents - means[labels]).square().sum()
    return (means[labels].square().sum() / within).item()


def alignment(latents: Tensor, labels: Tensor) -> float:
    """Mean ‖x − y‖² over all pairs of one class, on the unit sphere; lower is tighter.

    Wang & Isola 2020, equation 6 with α = 2, positives being the images of a class. Over ordered
    pairs Σ ‖x − y‖² is 2n Σ ‖x‖² − 2‖Σ x‖², so no pairs are formed. A latent of zeros stays at
    the center of the sphere. NaN where no class has two images.
    """
    unit = F.normalize(latents.double(), dim=1)
    counts = labels.bincount()  # (K,)
    squares = unit.new_zeros(len(counts)).index_add_(0, labels, unit.square().sum(1))
    sums = unit.new_zeros(len(counts), unit.shape[1]).index_add_(0, labels, unit)  # (K,D)
    pairs = (counts * (counts - 1)).sum()
    return ((2 * counts * squares - 2 * sums.square().sum(1)).sum() / pairs).item()


def uniformity(latents: Tensor, labels: Tensor) -> samples.Estimate:
    """log of the mean of exp(−2‖x − y‖²) over all pairs, on the unit sphere; lower is more even.

    Wang & Isola 2020, equation 7 with t = 2. 0 where all images coincide. A latent of zeros stays
    in the center of the sphere. The labels stratify the sample and have no other part in it.
    """
    chosen = samples.stratified(labels)
    unit = F.normalize(latents.float(), dim=1)
    squares = unit.square().sum(1)  # 1, or 0
    sums = []
    for rows in samples.blocks(chosen, len(latents), BLOCK):
        # ‖x − y‖² = x² + y² − 2 x·y
        exponents = torch.addmm(-2 * squares, unit[rows], unit.T, alpha=4)
        exponents.sub_(2 * squares[rows, None]).exp_()
        sums.append(exponents.sum(1, dtype=torch.float64))
    means = (torch.cat(sums) - 1) / (len(unit) - 1)  # over the others, without the image itself
    found = samples.estimate(means, labels[chosen], len(labels))
    mean = torch.tensor(found.value, dtype=torch.float64)
    # d log x = dx / x
    return replace(found, value=mean.log().item(), error=found.error / found.value)


def effective_rank(latents: Tensor) -> float:
    """Effective rank: exp of the entropy of the normalized singular values, 1 to D.

    p_k = σ_k / Σ σ,  rank = exp(−Σ p_k log p_k)   (RankMe, Garrido et al. 2023, equation 1;
    Roy & Vetterli 2007). Of the latents as they are, not centered, as in the paper.
    """
    latents = latents.double()
    gram = latents.T @ latents if latents.shape[0] >= latents.shape[1] else latents @ latents.T
    singular_values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular_values / singular_values.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp().item()


def shape(latents: Tensor, labels: Tensor, prefix: str) -> dict[str, float]:
    """All metrics of a latent space, as PREFIX/silhouette and so on."""
    return {
        **silhouette(latents, labels).named(f"{prefix}/silhouette"),
        f"{prefix}/class_separation": class_separation(latents, labels),
        f"{prefix}/alignment": alignment(latents, labels),
        **uniformity(latents, labels).named(f"{prefix}/uniformity"),
        f"{prefix}/effective_rank": effective_rank(latents),
    }


@dataclass(frozen=True)
class PCA:
    """PCA of flattened images: (N,P) to (N,D) and back.

    Attributes:
        mean: float32 (P,). components: float32 (D,P), orthonormal rows.
    """

    mean: Tensor
    components: Tensor

    def encode(self, images: Tensor) -> Tensor:
        """Flattened images (N,P) to principal components (N,D)."""
        return (images - self.mean) @ self.components.T

    def decode(self, latents: Tensor) -> Tensor:
        """Principal components (N,D) to flattened images (N,P), not clipped."""
        return latents @ self.components + self.mean


def fit_pca(blocks: Callable[[], Iterable[Tensor]], dimensions: int) -> PCA:
    """Fit PCA by the eigenvectors of the covariance (P,P), in two passes over the images.

    Args:
        blocks: returns an iterator over the images, float (B,P) at a time; called twice.
        dimensions: D, at most P; components beyond the number of images are arbitrary.
    """
    count, total = 0, 0.0
    for block in blocks():
        count, total = count + len(block), total + block.sum(0, dtype=torch.float64)
    mean = (total / count).float()
    covariance = mean.new_zeros(len(mean), len(mean))
    for block in blocks():
        centered = block - mean
        covariance.addmm_(centered.T, centered)
    covariance /= count
    if len(mean) <= EXACT_PCA:
        _, directions = torch.linalg.eigh(covariance)  # ascending
        directions = directions.flip(1)
    else:  # eigh would take minutes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            directions, _, _ = torch.svd_lowrank(covariance, q=dimensions + 32, niter=6)
    return PCA(mean, directions[:, :dimensions].T.contiguous())


def tsne(latents: Tensor, seed: int, perplexity: float = 30.0) -> np.ndarray:
    """t-SNE to two dimensions (van der Maaten & Hinton 2008), float32 (N,2).

    scikit-learn's, with PCA initialization and automatic learning rate. More than 50 dimensions
    are reduced to 50 by PCA first, as its documentation advises. Sizes of clusters and gaps
    between them mean nothing: report kNN accuracy and silhouette with the map.
    """
    latents = latents.float().cpu()
    latents = latents - latents.mean(0)
    if latents.shape[1] > len(latents):  # the same distances in at most N dimensions
        values, directions = torch.linalg.eigh(latents @ latents.T)
        latents = directions * values.clamp(min=0).sqrt()
    if latents.shape[1] > 50:
        latents = fit_pca(lambda: [latents], 50).encode(latents)
    # nothing to reduce; on coincident points scikit-learn returns NaNs or crashes
    if latents.shape[1] < 2 or len(latents) < 5 or (latents == latents[:1]).all():
        return F.pad(latents, (0, 2))[:, :2].numpy()
    perplexity = min(perplexity, max(1.0, (len(latents) - 1) / 3))
    words = latents.shape[1], seed, perplexity, TSNE_STEPS
    return _tsne(latents.numpy().tobytes(), *words).copy()


@functools.lru_cache(maxsize=16)  # runs that follow each other in one process draw the same images
def _tsne(latents: bytes, dimensions: int, seed: int, perplexity: float, steps: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    settings = {"init": "pca", "learning_rate": "auto", "max_iter": steps}
    model = TSNE(perplexity=perplexity, random_state=seed, **settings)
    points = np.frombuffer(latents, np.float32).reshape(-1, dimensions)
    return model.fit_transform(points).astype(np.float32)


def trustworthiness(latents: Tensor, points: Tensor, k: int = 12) -> float:
    """Trustworthiness of a map: whether neighbors in it are neighbors in the latent space, 0 to 1.

    T = 1 − 2 / (N k (2N − 3k − 1)) · Σ_i Σ_j max(0, r(i,j) − k),  j over the k nearest of i in the
    map, r its rank among the neighbors of i in the latent space, 1 the nearest (Venna & Kaski
    2001, equation 1). NaN with fewer than 3 images; k is at most (N − 1)/2, where the
    normalization is defined.

    Args:
        latents: float (N,D). points: float (N,2), their map. k: number of neighbors.
    """
    count = len(latents)
    k = min(k, (count - 1) // 2)
    if k < 1:
        return float("nan")
    latents, points = (a.float() - a.float().mean(0) for a in (latents, points))
    intrusion = 0
    for rows in torch.arange(count, device=latents.device).split(BLOCK):
        themselves = (torch.arange(len(rows), device=rows.device), rows)
        far, near = (torch.cdist(a[rows], a) for a in (latents, points))  # (B,N)
        far[themselves] = near[themselves] = float("inf")
        shown = near.topk(k, largest=False).indices  # (B,k)
        # rank = 1 + number of nearer ones: one sort, where ranks by argsort would need two
        ranks = torch.searchsorted(far.sort(dim=1).values, far.gather(1, shown)) + 1
        intrusion += (ranks - k).clamp(min=0).sum().item()
    return 1 - 2 * intrusion / (count * k * (2 * count - 3 * k - 1))
