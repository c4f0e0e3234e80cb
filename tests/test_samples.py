"""Large test sets are measured on a sample: its size and its error are told, and they are true."""

import math

import pytest
import torch

from common.display import tables
from common.evaluation import comparison, geometry, neighbors, probes, report, samples, scores


def latents_of(seed: int, count: int = 2400, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters of unequal size and spread, float (N,8), and their labels."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.arange(1.0, classes + 1)
    labels = torch.multinomial(sizes, count, replacement=True, generator=generator)
    centers = 0.8 * torch.randn(classes, 8, generator=generator)
    noise = torch.randn(count, 8, generator=generator) * (0.5 + labels[:, None] / classes)
    return centers[labels] + noise, labels


def test_a_sample_has_every_class_in_proportion_and_depends_on_the_labels_alone():
    labels = torch.randint(0, 7, (5000,)) ** 2
    rows = samples.stratified(labels, exact=4999, count=1000)
    assert len(rows.unique()) == 1000 and torch.equal(rows, rows.sort().values)
    shares = labels.bincount() / 5, labels[rows].bincount(minlength=37)
    assert (shares[0] - shares[1]).abs().max() <= 1
    assert torch.equal(rows, samples.stratified(labels.clone(), exact=4999, count=1000))
    assert torch.equal(samples.stratified(labels, exact=5000), torch.arange(5000))
    within = rows[labels[rows] == 0].double().mean()  # not the first ones of a class
    assert within == pytest.approx(2500, abs=500)


def test_the_error_of_an_estimate_is_that_of_repeated_samples():
    """Values that differ between classes: the error is that within them, which is far smaller."""
    labels = torch.arange(20_000) % 4
    values = 3.0 * labels + torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found, errors = [], []
    for seed in range(150):
        shuffled = torch.randperm(20_000, generator=torch.Generator().manual_seed(seed))
        mixed_labels, mixed = labels[shuffled], values[shuffled]
        rows = samples.stratified(mixed_labels, exact=0, count=500)
        one = samples.estimate(mixed[rows], mixed_labels[rows], 20_000)
        found.append(one.value)
        errors.append(one.error)
    spread = torch.tensor(found).std().item()
    assert spread == pytest.approx(sum(errors) / len(errors), rel=0.15)
    assert spread < 0.5 * values.std().item() / math.sqrt(500)
    assert samples.estimate(values, labels, 20_000).error == 0
    assert samples.estimate(torch.ones(3), torch.arange(3), 9) == samples.Estimate(1.0, 0.0, 3, 9)


def all_metrics(latents: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The metrics of the latents as test images, after as many as training images."""
    half = len(labels) // 2
    known, asked = (latents[:half], labels[:half]), (latents[half:], labels[half:])
    split = probes.Latents(*known, *known, *asked)
    found = report.nearest(*known, *asked)
    cosine = {"knn": found, "knn_cosine": report.nearest(*known, *asked)}
    return report.latent_metrics(split, cosine, "test", "latent")


def test_one_image_of_each_class_leaves_an_error():
    labels = torch.arange(50)
    found = samples.estimate(torch.tensor([0.0, 1.0] * 25), labels, 200)
    assert found.error == pytest.approx(math.sqrt((1 - 50 / 200) * (12.5 / 49) / 50))


def test_metrics_of_samples_lie_within_their_stated_error_of_the_full_ones(monkeypatch):
    """Of 15 data sets: few are further off than two standard errors, and the error is no excuse."""
    names = ("test/knn_accuracy", "latent/silhouette", "latent/uniformity")
    names += ("latent/recall_at_1", "latent/mean_average_precision")
    monkeypatch.setattr(scores, "clustering", lambda *_: {})
    away = {name: [] for name in names}
    for seed in range(15):
        latents, labels = latents_of(seed)
        monkeypatch.setattr(samples, "EXACT", 10_000)
        monkeypatch.setattr(scores, "QUERIES", 10_000)
        full = all_metrics(latents, labels)
        assert not any("standard_error" in name or "_images" in name for name in full)
        monkeypatch.setattr(samples, "EXACT", 1000)
        monkeypatch.setattr(samples, "SAMPLE", 300)
        monkeypatch.setattr(scores, "QUERIES", 300)
        found = all_metrics(latents, labels)
        for name in names:
            assert found[f"{name}_images"] == 300
            away[name].append((found[name] - full[name]) / found[f"{name}_standard_error"])
        assert found["latent/alignment"] == full["latent/alignment"]  # by sums, never a sample
    for name, deviations in away.items():
        deviations = torch.tensor(deviations)
        assert (deviations.abs() > 2).sum() <= 3, name
        assert 0.5 < deviations.square().mean().sqrt() < 1.6, name


def test_images_outside_the_sample_are_marked_and_not_counted(monkeypatch):
    monkeypatch.setattr(samples, "EXACT", 50)
    monkeypatch.setattr(samples, "SAMPLE", 20)
    labels = torch.arange(60) % 3
    latents = 10 * torch.eye(3)[labels]
    found = report.nearest(latents, labels, latents, labels)
    asked = found != samples.NOT_ASKED
    assert asked.sum() == 20 and torch.equal(found[asked], labels[asked])
    estimate = report.accuracy(found, labels)
    assert (estimate.value, estimate.error, estimate.count) == (1.0, 0.0, 20)
    split = probes.Latents(latents, labels, latents, labels, latents, labels)
    monkeypatch.setattr(geometry, "tsne", lambda latents, seed: latents[:, :2].numpy())  # slow
    space, _ = comparison.measure("a", split, None, torch.arange(12), label_draws=1)
    assert space.metrics["knn_1"] == 1 and space.metrics["knn_1_images"] == 20
    assert space.metrics["silhouette_images"] == 20 and "accuracy_images" not in space.metrics


def test_blocks_shrink_where_the_references_are_very_many(monkeypatch):
    monkeypatch.setattr(samples, "NUMBERS_AT_ONCE", 100)
    assert [len(block) for block in samples.blocks(torch.arange(7), 40, most=5)] == [2, 2, 2, 1]
    assert [len(block) for block in samples.blocks(torch.arange(3), 1000, most=5)] == [1, 1, 1]
    latents, labels = latents_of(0, count=60)
    expected = neighbors.predict(latents, labels, latents), geometry.silhouette(latents, labels)
    monkeypatch.setattr(samples, "NUMBERS_AT_ONCE", 2**26)
    assert torch.equal(neighbors.predict(latents, labels, latents), expected[0])
    assert geometry.silhouette(latents, labels).value == pytest.approx(expected[1].value, abs=1e-4)


def test_the_final_table_says_the_size_of_the_sample_and_its_error():
    metrics = {"test/accuracy": 0.9, "test/knn_accuracy": 0.91, "pca/knn_accuracy": 0.8}
    exact = tables.final(metrics)
    assert "±" not in exact
    metrics |= samples.Estimate(0.91, 0.004, 5000, 200_000).named("test/knn_accuracy")
    metrics |= samples.Estimate(0.8, 0.005, 5000, 200_000).named("pca/knn_accuracy")
    text = tables.final(metrics)
    (line,) = (line for line in text.splitlines() if "nearest neighbors" in line)
    assert line.startswith("accuracy, 5 nearest neighbors; 5,000 images ")
    assert "91.00% ± 0.40%" in line and "80.00% ± 0.50%" in line
    assert "standard error" in text.splitlines()[-1]
    assert len({len(line) for line in text.splitlines()[:-2]}) == 1  # columns stay aligned
