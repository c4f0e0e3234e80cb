import math

import numpy as np
import pytest
import torch

from common.evaluation import scores


def test_classification_weighs_classes_alike():
    labels = torch.tensor([0] * 8 + [1, 1])
    predictions = torch.tensor([0] * 8 + [0, 1])
    found = scores.classification(labels, predictions)
    assert found["accuracy"] == pytest.approx(0.9)
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    f1 = [2 * 8 / (2 * 8 + 1), 2 / 3]
    assert found["macro_f1"] == pytest.approx(sum(f1) / 2)


def test_calibration_error_is_the_gap_of_each_bin():
    # 4 images with confidence 0.9, of which half are right; 4 with 0.6, of which 3 are right
    confidence = torch.tensor([0.9] * 4 + [0.6] * 4)
    probabilities = torch.stack([confidence, 1 - confidence], dim=1)
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1])
    error = scores.calibration_error(labels, probabilities)
    assert error == pytest.approx(0.5 * abs(0.5 - 0.9) + 0.5 * abs(0.75 - 0.6))
    sure = torch.eye(2)[labels]
    assert scores.calibration_error(labels, sure) == 0


def test_the_nearest_class_mean_is_by_angle():
    latents = torch.tensor([[1.0, 0], [10, 1], [0, 1], [0.1, 2]])
    labels = torch.tensor([3, 3, 7, 7])
    queries = torch.tensor([[100.0, 20], [0.1, 0.2]])
    assert scores.nearest_class_mean(latents, labels, queries).tolist() == [3, 7]


def average_precision(hits: list[bool]) -> float:
    found = [sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit]
    return sum(found) / len(found)


def test_retrieval_equals_loops():
    latents, labels = torch.randn(60, 5), torch.randint(0, 4, (60,))
    labels[0] = 9  # alone: no query
    unit = latents / latents.norm(dim=1, keepdim=True)
    firsts, precisions = [], []
    for i in range(1, 60):
        others = [j for j in range(60) if j != i]
        others.sort(key=lambda j: -float(unit[i] @ unit[j]))
        hits = [bool(labels[j] == labels[i]) for j in others]
        firsts.append(hits[0])
        precisions.append(average_precision(hits))
    found = scores.retrieval(latents, labels)
    assert found["recall_at_1"] == pytest.approx(sum(firsts) / 59)
    assert found["mean_average_precision"] == pytest.approx(sum(precisions) / 59, abs=1e-6)


def test_retrieval_of_points_per_class_is_perfect_in_any_block_size(monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", 7)
    labels = torch.arange(40) % 4
    found = scores.retrieval(torch.eye(4)[labels] + 0.01 * torch.randn(40, 4), labels)
    assert found == {"recall_at_1": 1, "mean_average_precision": 1}
    monkeypatch.setattr(scores, "QUERIES", 9)
    assert scores.retrieval(torch.eye(4)[labels], labels)["mean_average_precision"] == 1
    assert scores.retrieval(torch.randn(3, 2), torch.arange(3)) == {}  # nobody to retrieve


def test_clusters_that_are_the_classes():
    labels = torch.arange(60) % 3
    latents = 10 * torch.eye(3)[labels] + 0.1 * torch.randn(60, 3)
    assert scores.clustering(latents, labels) == pytest.approx({"nmi": 1, "ari": 1})
    nothing = scores.clustering(torch.randn(600, 3), torch.arange(600) % 3)
    assert abs(nothing["ari"]) < 0.05 and nothing["nmi"] < 0.05


def test_classes_that_are_not_there_count_nowhere():
    labels = torch.tensor([0] * 50 + [1] * 50)
    into_another, into_none = labels.clone(), labels.clone()
    into_another[0], into_none[0] = 1, 2
    found = [scores.classification(labels, wrong) for wrong in (into_another, into_none)]
    assert found[0]["macro_f1"] == pytest.approx(0.99, abs=1e-3)
    assert found[1]["macro_f1"] == pytest.approx((2 * 49 / 99 + 1) / 2)
    assert found[0]["balanced_accuracy"] == found[1]["balanced_accuracy"] == 0.99


@pytest.mark.parametrize(("share", "count"), [(0.8, 500), (0.97, 100), (0.5, 20)])
def test_an_interval_covers_the_truth_as_often_as_it_says(share, count):
    random = np.random.RandomState(0)
    covered = 0
    for _ in range(400):
        found = scores.interval([random.binomial(1, share, count).astype(float)])
        covered += found.low <= share <= found.high
    assert 0.92 <= covered / 400 <= 0.99


@pytest.mark.parametrize("spread", [0.003, 0.01])
@pytest.mark.parametrize("runs", [(1, 1), (2, 2), (3, 3), (3, 2), (2, 1), (5, 1)])
def test_equal_methods_are_rarely_told_apart(spread, runs):
    """Methods whose runs vary with the seed, on images of which some are hard for all of them."""
    random, told = np.random.RandomState(0), 0
    for _ in range(300):
        easy = random.beta(8, 2, 2000)
        one, other = (
            [random.binomial(1, (easy + random.normal(0, spread)).clip(0, 1)) for _ in range(n)]
            for n in runs
        )
        told += scores.difference(one, other).excludes_zero
    unknown = 0.3 if runs == (1, 1) else 0  # one run says nothing of others, which the docs say
    assert told / 300 <= 0.08 + unknown


def test_few_images_leave_doubt():
    sure = scores.interval([np.ones(120)])
    assert sure.value == 1 and 0.97 < sure.low < 0.99
    first, second = np.ones(20), np.ones(20)
    second[:4] = 0  # McNemar's exact test: p = 0.125
    assert not scores.difference([first], [second]).excludes_zero
    second[:8] = 0  # p = 0.008
    assert scores.difference([first], [second]).excludes_zero


def test_an_interval_is_wider_where_runs_differ():
    images = np.array([0.0, 1.0] * 5000)
    alone, same = scores.interval([images]), scores.interval([images, images])
    assert same == alone
    assert (alone.low, alone.high) == pytest.approx((0.5 - 0.0098, 0.5 + 0.0098), abs=1e-5)
    spread = scores.interval([np.zeros(100), np.ones(100)])
    assert spread.value == 0.5
    assert spread.low == pytest.approx(0.5 - 12.7 * math.sqrt(0.5 / 2), rel=0.01)  # t of one degree
    assert not scores.Interval(0.1, -0.1, 0.3).excludes_zero
    assert scores.Interval(0.1, 0.05, 0.15).excludes_zero


def test_paired_differences_are_sharper_than_two_intervals():
    random = np.random.RandomState(1)
    first = random.binomial(1, 0.8, 2000).astype(float)
    second = np.where(random.rand(2000) < 0.02, 1, first)  # nearly the same images are right
    paired, alone = scores.difference([second], [first]), scores.interval([first])
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
