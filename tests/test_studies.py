"""What a study says of several runs of each method."""

from types import SimpleNamespace

import numpy as np

from common.evaluation import studies
from common.evaluation.studies import Member, Result


def result(method: str, seed: int, share: float, seconds: float, **summary: float) -> Result:
    """A run that is right on that share of 1,000 images, the first ones."""
    right = np.arange(1000) < 1000 * share
    values = {name: right.astype(float) for *_, name in studies.SCORES if name}
    found = {"test/linear_accuracy": share} | {
        k.replace("_", "/", 1): v for k, v in summary.items()
    }
    settings = {"augment": "contrastive"}
    cost = {"training_seconds": seconds}
    run = SimpleNamespace(summary=found, settings=settings, cost=lambda: cost)
    return Result(Member(f"{method}-all-seed{seed}", method, "all", seed), run, values, 8)


GROUP = [
    result("ae", 0, 0.895, 10, test_mse=0.01, pca_mse=0.02, image_knn_accuracy=0.5),
    result("joint", 0, 0.90, 200, image_knn_accuracy=0.5),
    result("ae", 1, 0.895, 400, test_mse=0.02, pca_mse=0.03, image_knn_accuracy=0.6),
    result("joint", 1, 0.90, 210, image_knn_accuracy=0.6),
]
BASELINES = {"all": {"pixels": [np.zeros(1000), np.ones(1000)]}}


def test_every_number_is_a_mean_over_the_seeds():
    lines = studies.recommendation_of({"all": GROUP}, BASELINES, {}, {}, same_time=False)
    errors, cheapest = lines[-2:]
    assert "its MSE is 0.01500 (it learned from augmented images), 0.60 times that of PCA" in errors
    assert cheapest.endswith(
        "no clear winner between ae (89.5%, 205 s of training) and joint (90.0%, 205 s of training)"
    )
    rows = {row.text: row.cells for row in studies.table({"all": GROUP}, BASELINES, {})}
    assert rows["reconstruction MSE"] == ("0.01500", "–", "0.02500", "–")
    assert rows["seconds of training"] == ("205", "205", "–", "–")
    assert rows["linear probe"][-1] == "50.00%"


def test_a_baseline_is_the_mean_over_the_images_that_each_seed_has():
    group = [result("joint", n, 0.9, 1, test_knn_accuracy=0.8) for n in (0, 1)]
    for one, value in zip(group, (0.50, 0.60), strict=True):
        one.run.summary["image/knn_accuracy"] = value
    rows = {row.text: row.cells for row in studies.table({"all": group}, {"all": {}}, {})}
    assert rows["5 nearest neighbors"][-1] == "55.00%"


def test_none_is_the_cheapest_where_all_had_the_same_time():
    lines = studies.recommendation_of({"all": GROUP}, BASELINES, {}, {}, same_time=True)
    assert not any(line.startswith("cheapest") for line in lines)


def test_a_run_that_failed_leaves_the_spread_of_the_others():
    group = [
        *(result("joint", seed, share, 1) for seed, share in enumerate((0.93, 0.90, 0.87))),
        *(result("supcon", seed, share, 1) for seed, share in enumerate((0.92, 0.89, 0.86))),
    ]
    failed = {"supcon-all-seed2": "the disk is on fire"}
    for some in (group, group[:-1]):
        lines = studies.recommendation_of({"all": some}, {"all": {}}, {}, failed, same_time=True)
        whole = some is group
        assert ("no clear winner" in lines[0]) == (not whole)
    assert lines[-1] == "failed, left out: supcon-all-seed2 (the disk is on fire)"


def test_a_space_that_the_loss_shapes_retrieves_as_one_of_its_own():
    group = [result("joint", 0, 0.8, 1), result("supcon", 0, 0.7, 1)]
    del group[0].values[studies.PROJECTED]
    group[1].values[studies.PROJECTED] = np.ones(1000)
    lines = studies.recommendation_of({"all": group}, {"all": {}}, {}, {}, same_time=True)
    assert lines[1].startswith("retrieval of similar images: supcon's projection (100.0%), 20.0")
    rows = {row.text: row for row in studies.table({"all": group}, {"all": {}}, {})}
    assert rows["the same, in the projection"].cells[0] == "–"
    assert not rows["the same, in the projection"].best  # it is the only one


def test_what_needs_no_network_is_asked_whether_it_is_robust_too():
    robust = {"PCA": np.ones(1000), "pixels": np.zeros(1000)}
    lines = studies.recommendation_of({"all": GROUP}, BASELINES, robust, {}, same_time=True)
    (line,) = [line for line in lines if line.startswith("robust")]
    assert "but the linear probe on PCA (100.0%) is better still" in line and "pixels" not in line
    rows = {row.text: row.cells for row in studies.table({"all": GROUP}, BASELINES, robust)}
    assert rows["linear probe, noise and shift"][-2:] == ("100.00%", "0.00%")
    assert rows["linear probe, noise and shift"][1].startswith("90.00% ± ")


def test_of_few_labels_the_baselines_have_one_draw_that_may_differ_as_the_methods_do():
    shares = (0.905, 0.90, 0.895)
    group = [result("joint", seed, share, 1) for seed, share in enumerate(shares)]
    robust = {"PCA": (np.arange(1000) < 886).astype(float)}
    for labels, clear in (("all", True), ("10", False)):
        lines = studies.recommendation_of({labels: group}, {labels: {}}, robust, {}, True)
        (line,) = [line for line in lines if line.startswith("robust")]
        assert ("not clearly above the linear probe on PCA" in line) == (not clear)


def test_one_seed_is_said_to_tell_nothing_of_others():
    for group, said in ((GROUP, ""), (GROUP[:2], "one seed: "), (GROUP[:3], "one seed of joint: ")):
        lines = studies.recommendation_of({"all": group}, BASELINES, {}, {}, same_time=True)
        assert lines[-1].startswith(said or "reconstruction")


def test_retrieval_is_not_measured_without_two_images_of_a_class():
    group = [result("joint", 0, 0.8, 1), result("supcon", 0, 0.7, 1)]
    for one in group:
        for name in ("precision", "first_hit", studies.PROJECTED):
            del one.values[name]
    lines = studies.recommendation_of({"all": group}, {"all": {}}, {}, {}, same_time=True)
    assert lines[1] == f"retrieval of similar images: {studies.NO_PAIRS}"
    rows = [row.text for row in studies.table({"all": group}, {"all": {}}, {})]
    assert not any("retrieval" in row for row in rows)
