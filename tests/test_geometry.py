import math

import pytest
import threadpoolctl
import torch

from common.evaluation import geometry


def test_silhouette_of_a_hand_made_case():
    # two classes on a line: {0, 1} and {4, 6}
    latents = torch.tensor([[0.0], [1.0], [4.0], [6.0]])
    labels = torch.tensor([0, 0, 1, 1])
    expected = [(5 - 1) / 5, (4 - 1) / 4, (3.5 - 2) / 3.5, (5.5 - 2) / 5.5]
    assert geometry.silhouette(latents, labels).value == pytest.approx(sum(expected) / 4, abs=1e-6)


def test_silhouette_equals_scikit_learns(monkeypatch):
    from sklearn.metrics import silhouette_score

    monkeypatch.setattr(geometry, "BLOCK", 7)
    torch.manual_seed(0)
    latents, labels = torch.randn(50, 5) + 3, torch.randint(0, 4, (50,)) * 2  # labels with gaps
    latents[:, 0] += labels
    labels[0] = 99  # alone in its class
    expected = silhouette_score(latents.numpy(), labels.numpy())
    assert geometry.silhouette(latents, labels).value == pytest.approx(expected, abs=1e-5)
    assert math.isnan(geometry.silhouette(latents, torch.zeros(50, dtype=torch.long)).value)


def test_class_separation_of_a_hand_made_case():
    # means (0, 1) and (4, 1), of all (1, 1): 3·1² + 1·3² between; (0, ±1), 0 and 0 within
    latents = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 1.0], [4.0, 1.0]])
    labels = torch.tensor([3, 3, 3, 7])
    assert geometry.class_separation(latents, labels) == pytest.approx(12 / 2)
    turned = latents @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) * 5 + 100  # other axes, unit, place
    assert geometry.class_separation(turned, labels) == pytest.approx(12 / 2, rel=1e-4)
    assert geometry.class_separation(torch.tensor([[1.0], [2.0]]), labels[2:]) == math.inf
    assert math.isnan(geometry.class_separation(latents, torch.zeros(4, dtype=torch.long)))
    assert geometry.shape(latents, labels, "x")["x/class_separation"] == pytest.approx(6)


def test_alignment_and_uniformity_equal_loops_over_pairs(monkeypatch):
    monkeypatch.setattr(geometry, "BLOCK", 7)
    torch.manual_seed(0)
    latents, labels = torch.randn(30, 4), torch.randint(0, 3, (30,))
    unit = latents / latents.norm(dim=1, keepdim=True)
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    squared = {(i, j): (unit[i] - unit[j]).square().sum().item() for i, j in pairs}
    same = [squared[i, j] for i, j in pairs if labels[i] == labels[j]]
    assert geometry.alignment(latents, labels) == pytest.approx(sum(same) / len(same), abs=1e-5)
    kernel = sum(math.exp(-2 * squared[pair]) for pair in pairs) / len(pairs)
    assert geometry.uniformity(latents, labels).value == pytest.approx(math.log(kernel), abs=1e-5)


def test_alignment_and_uniformity_of_points_that_are_known():
    # two opposite points, each a class of two: aligned perfectly
    latents = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [-3.0, 0.0]])
    assert geometry.alignment(latents, torch.tensor([0, 0, 1, 1])) == pytest.approx(0, abs=1e-9)
    # 4 ordered pairs coincide, 8 are at squared distance 4
    expected = math.log((4 + 8 * math.exp(-8)) / 12)
    found = geometry.uniformity(latents, torch.zeros(4).long())
    assert found.value == pytest.approx(expected, abs=1e-5) and found.error == 0
    found = geometry.uniformity(torch.ones(5, 3), torch.zeros(5).long())
    assert found.value == pytest.approx(0, abs=1e-5)


def test_effective_rank_of_hand_made_spectra():
    equal = torch.eye(6)[:, :4].repeat(3, 1)  # four equal singular values
    assert geometry.effective_rank(equal) == pytest.approx(4)
    assert geometry.effective_rank(torch.ones(10, 5)) == pytest.approx(1, abs=1e-3)
    uneven = torch.diag(torch.tensor([3.0, 1.0]))  # shares 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert geometry.effective_rank(uneven) == pytest.approx(math.exp(entropy))
    wide = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    assert geometry.effective_rank(wide) == pytest.approx(geometry.effective_rank(wide.T))


@pytest.mark.parametrize("exact", [True, False])
def test_pca_equals_the_singular_value_decomposition(monkeypatch, exact):
    if not exact:
        monkeypatch.setattr(geometry, "EXACT_PCA", 1)
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(3, 0.1, 60)
    images = torch.randn(200, 60, generator=generator) * scale + 1
    pca = geometry.fit_pca(lambda: images.split(70), 8)
    centered = images - images.mean(0)
    directions = torch.linalg.svd(centered, full_matrices=False).Vh[:8]
    assert torch.allclose(pca.mean, images.mean(0), atol=1e-5)
    # the same subspace, whatever the signs
    overlap = (pca.components @ directions.T).abs()
    assert torch.allclose(overlap, torch.eye(8), atol=2e-2)
    best = (centered - centered @ directions.T @ directions).square().mean()
    reached = (pca.decode(pca.encode(images)) - images).square().mean()
    assert reached == pytest.approx(best.item(), rel=1e-3)


def test_tsne_of_few_dimensions_few_points_and_very_many_dimensions():
    assert geometry.tsne(torch.arange(9.0)[:, None], seed=0).shape == (9, 2)
    assert geometry.tsne(torch.randn(1, 60), seed=0).shape == (1, 2)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(30, 50_000, generator=generator)  # its covariance would fill 10 GB
    wide[15:] += 1
    points = torch.from_numpy(geometry.tsne(wide, seed=0))
    assert geometry.silhouette(points, torch.arange(30) // 15).value > 0.5


@threadpoolctl.threadpool_limits.wrap(limits=2)  # three or more add in any order
def test_tsne_keeps_two_far_clusters_apart_and_repeats_itself():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(40, 60, generator=generator)
    latents[20:] += 20
    points = geometry.tsne(latents, seed=0)
    assert points.shape == (40, 2)
    geometry._tsne.cache_clear()
    again = geometry.tsne(latents, seed=0)
    assert (points == again).all()
    again += 1  # the caller's own: what is remembered stays as it is
    assert (points == geometry.tsne(latents, seed=0)).all()
    assert not (points == geometry.tsne(latents + torch.randn(40, 60) / 10, seed=0)).all()
    labels = torch.arange(40) // 20
    assert geometry.silhouette(torch.from_numpy(points), labels).value > 0.6


def test_trustworthiness_of_a_hand_made_case():
    # on a line 0 … 6 with k = 2; the picture puts 6 between 0 and 1
    latents = torch.tensor([[0.0], [1.0], [2.1], [3.3], [4.6], [6.0]])
    picture = torch.tensor([[0.0], [1.0], [2.1], [3.3], [4.6], [0.4]])
    # ranks beyond 2 among the two nearest in the picture:
    # 0: {6: 5}; 1: {6: 5}; 2.1: {1: 1, 3.3: 2}; 3.3: none; 4.6: {3.3: 1, 2.1: 3}; 6: {0: 5, 1: 4}
    intrusion = 3 + 3 + 0 + 0 + 1 + (3 + 2)
    expected = 1 - 2 / (6 * 2 * (12 - 6 - 1)) * intrusion
    assert geometry.trustworthiness(latents, picture, 2) == pytest.approx(expected)
    assert geometry.trustworthiness(latents, 3 * latents, 2) == 1
    assert math.isnan(geometry.trustworthiness(latents[:2], picture[:2], 2))


def test_trustworthiness_equals_scikit_learns(monkeypatch):
    from sklearn.manifold import trustworthiness

    monkeypatch.setattr(geometry, "BLOCK", 13)
    torch.manual_seed(0)
    latents = torch.randn(80, 10) + 5
    points = latents[:, :2] + 0.1 * torch.randn(80, 2)
    expected = trustworthiness(latents.numpy(), points.numpy(), n_neighbors=7)
    assert 0.5 < expected < 0.95
    assert geometry.trustworthiness(latents, points, 7) == pytest.approx(expected, abs=1e-9)


def test_images_that_coincide_are_no_reason_to_crash():
    for same in (torch.zeros(40, 8), torch.full((40, 128), 1 / 3)):
        assert torch.from_numpy(geometry.tsne(same, seed=0)).isfinite().all()
        assert geometry.uniformity(same, torch.arange(40) % 2).value == pytest.approx(0, abs=1e-5)
        assert geometry.alignment(same, torch.arange(40) % 2) == pytest.approx(0, abs=1e-12)


def test_a_latent_of_zeros_lies_in_the_centre_of_the_sphere():
    latents = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, -1.0]])
    labels = torch.tensor([0, 0, 1])
    squares = torch.tensor([1.0, 2.0, 1.0])  # of the distances of the three pairs
    expected = torch.log(torch.exp(-2 * squares).mean()).item()
    assert geometry.uniformity(latents, labels).value == pytest.approx(expected, abs=1e-5)
    assert geometry.alignment(latents, labels) == pytest.approx(1)
