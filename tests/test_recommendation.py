import numpy as np
import pytest

from common.evaluation import recommendation
from common.evaluation.recommendation import Need


def right(share: float, count: int = 1000, seed: int = 0) -> np.ndarray:
    """1 for that share of the images, the same ones for any larger share."""
    order = np.random.RandomState(seed).permutation(count)
    values = np.zeros(count)
    values[order[: round(share * count)]] = 1
    return values


def test_a_lead_beyond_its_uncertainty_is_recommended():
    need = Need("accuracy", {"ae": [right(0.7)], "joint": [right(0.9)], "supcon": [right(0.8)]})
    assert (
        recommendation.recommend(need) == "accuracy: joint (90.0%), 10.0 ± 1.9 points above supcon"
    )
    assert recommendation.leader(need.values) == "joint"


def test_what_cannot_be_told_is_said_with_all_who_may_be_best():
    values = {"ae": [right(0.7)], "joint": [right(0.9)], "supcon": [right(0.899, seed=1)]}
    text = recommendation.recommend(Need("accuracy", values))
    assert text.startswith("accuracy: no clear winner between joint (90.0%) and supcon (89.9%); ")
    assert "joint is 0.1 ± " in text
    assert recommendation.leader(values) is None
    values["simclr"] = [right(0.897, seed=2)]
    text = recommendation.recommend(Need("accuracy", values))
    assert "between joint (90.0%), supcon (89.9%) and simclr (89.7%);" in text


def test_runs_that_differ_much_decide_nothing():
    one, other = [right(0.9), right(0.6)], [right(0.7), right(0.65)]
    values = {"joint": one, "supcon": other}
    assert "no clear winner" in recommendation.recommend(Need("accuracy", values))
    alone = {"joint": one[:1], "supcon": other[:1]}
    assert "no clear winner" not in recommendation.recommend(Need("accuracy", alone))


def test_baselines_that_the_best_does_not_exceed_are_named():
    values = {"joint": [right(0.9), right(0.89)], "ae": [right(0.7), right(0.71)]}
    baselines = {"pixels": [right(0.899)] * 2, "PCA": [right(0.6)] * 2}
    text = recommendation.recommend(Need("accuracy", values, baselines))
    assert text.startswith("accuracy: joint (89.5%), 19.0 ± ")
    assert "; joint is not clearly above pixels (89.9%), which needs" in text
    worse = recommendation.recommend(Need("accuracy", values, {"pixels": [right(0.8)] * 2}))
    assert "pixels" not in worse
    better = {"pixels": [right(0.96)] * 2, "PCA": [right(0.99)] * 2}
    text = recommendation.recommend(Need("accuracy", values, better))
    expected = "; but pixels (96.0%) and PCA (99.0%) are better still, and need no network"
    assert text.startswith("accuracy: joint (89.5%)") and text.endswith(expected)
    spread = {"joint": [right(0.90), right(0.86)], "ae": [right(0.5)] * 2}
    text = recommendation.recommend(Need("accuracy", spread, {"pixels": [right(0.875)] * 2}))
    assert "above pixels (87.5%)" in text  # its seeds differ by more than its lead


def test_a_single_method_is_no_choice():
    text = recommendation.recommend(Need("accuracy", {"joint": [right(0.9)]}))
    assert text == "accuracy: joint (90.0%), the only method"
    assert recommendation.leader({"joint": [right(0.9)]}) is None


def test_the_cheapest_is_within_a_point_of_the_best():
    need = Need("", {"joint": [right(0.9)], "supcon": [right(0.895)], "ae": [right(0.8)]})
    seconds = {"joint": 100.0, "supcon": 1500.0, "ae": 10.0}
    text = recommendation.cheapest(need, seconds)
    assert text.endswith("accuracy: joint (90.0%, 100 s of training)")
    text = recommendation.cheapest(need, seconds | {"supcon": 50.0})
    assert text.endswith("accuracy: supcon (89.5%, 50 s of training)")
    text = recommendation.cheapest(need, seconds | {"supcon": 85.0})
    both = "supcon (89.5%, 85 s of training) and joint (90.0%, 100 s of training)"
    assert text.endswith(f"accuracy: no clear winner between {both}")
    assert "no method" in recommendation.cheapest(need, {"ae": 1.0})


@pytest.mark.parametrize("pca", [None, 0.01])
def test_only_a_decoder_reconstructs(pca):
    text = recommendation.reconstruction({"ae": 0.009}, pca, augmented=False)
    assert text.startswith("reconstruction: ae, the only method with a decoder")
    assert ("0.90 times that of PCA" in text) == (pca is not None)
    assert "none of these methods" in recommendation.reconstruction({}, pca, augmented=False)
    views = recommendation.reconstruction({"ae": 0.009}, pca, augmented=True)
    assert "0.00900 (it learned from augmented images)" in views
