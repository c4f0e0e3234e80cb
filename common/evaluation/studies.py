"""What a study found: the scores of its runs, their table, curves and recommendation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from ..display import tables
from ..errors import UserError
from . import probes, recommendation, report, samples, scores
from .recommendation import Need

PROJECTED = "projected_precision"  # of retrieval in the space that a contrastive loss shapes
PROBE = "the linear probe on "  # in front of PCA or pixels
NO_PAIRS = "not measured, since no class has two test images"
# The rows of the table: how a score is named in a run's summary, what it is, its format, and its
# name among `Result.values`.
SCORES = (
    ("test/linear_accuracy", "linear probe", "{:.2%}", "linear"),
    ("test/accuracy", "the method's own classifier", "{:.2%}", "own"),
    ("test/knn_accuracy", "5 nearest neighbors", "{:.2%}", "knn"),
    ("test/knn_cosine_accuracy", "5 nearest neighbors, cosine", "{:.2%}", "knn_cosine"),
    ("test/class_mean_accuracy", "nearest class mean", "{:.2%}", "class_mean"),
    ("latent/recall_at_1", "retrieval, recall at 1", "{:.2%}", "first_hit"),
    ("latent/mean_average_precision", "retrieval, mean average precision", "{:.2%}", "precision"),
    ("projection/mean_average_precision", "the same, in the projection", "{:.2%}", PROJECTED),
    ("", "linear probe, noise and shift", "{:.2%}", "robust"),
    ("test/balanced_accuracy", "own classifier, balanced accuracy", "{:.2%}", ""),
    ("test/macro_f1", "own classifier, macro F1", "{:.3f}", ""),
    ("test/calibration_error", "own classifier, calibration error", "{:.3f}", ""),
    ("latent/nmi", "k-means and the classes, NMI", "{:.3f}", ""),
    ("latent/ari", "k-means and the classes, ARI", "{:.3f}", ""),
    ("latent/silhouette", "silhouette", "{:.3f}", ""),
    ("test/mse", "reconstruction MSE", "{:.5f}", ""),
)


@dataclass(frozen=True)
class Member:
    """One run of the study: its folder's name, the method, labels per class (or all), the seed."""

    name: str
    method: str
    labels: str
    seed: int


@dataclass(frozen=True)
class Result:
    """A finished member: what its folder tells, and what is right on each test image.

    `values` are float (N,) by the names in `SCORES`: 0 or 1 for a classifier; for retrieval, of the
    images that query, and for neighbors, where there are very many images, of those in the sample.
    The comparison adds "robust" to those with the most labels.
    """

    member: Member
    run: Any  # of common.run.runs
    values: dict[str, np.ndarray]
    dimensions: int  # of the latents


def number_of(labels: str) -> float:
    """Labels per class as a number; all of them are the most."""
    return float("inf") if labels == "all" else int(labels)


def named(labels: str) -> str:
    """Labels per class in words."""
    return "all labels" if labels == "all" else f"{labels} labels per class"


def recommendation_of(
    groups: dict[str, list[Result]],
    baselines: dict[str, dict[str, list[np.ndarray]]],
    robust_baselines: dict[str, np.ndarray],
    failed: dict[str, str],
    same_time: bool,
) -> list[str]:
    """A sentence for each need, from the results by labels per class, the largest number last.

    `baselines` are those of `baselines_of` by labels per class, an array for each seed;
    `robust_baselines` are of the same kind as "robust", for the most labels. With `same_time` all
    trained for the same time, so that none is the cheapest.
    """
    *_, (most, largest) = groups.items()
    shown = dict.fromkeys([most, next(iter(groups))])  # with all labels, and with the fewest
    accuracy = {
        labels: Need(
            f"highest accuracy with {named(labels)}",
            by_method(groups[labels], "linear"),
            baselines[labels],
            PROBE,
        )
        for labels in shown
    }
    projections = by_method(largest, PROJECTED).items()
    spaces = by_method(largest, "precision") | {f"{m}'s projection": x for m, x in projections}
    robust = by_method(largest, "robust")
    seeds = {method: len(values) for method, values in accuracy[most].values.items()}
    # all labels are the same for each seed; of few, those of one seed were measured
    copies = max(seeds.values()) if most == "all" else 1
    repeated = {name: [values] * copies for name, values in robust_baselines.items()}
    needs = [
        *accuracy.values(),
        Need("retrieval of similar images", spaces),
        Need("robust to noise and shift", robust, repeated, PROBE),
    ]
    lines = [
        recommendation.recommend(need) if need.values else f"{need.title}: {NO_PAIRS}"
        for need in needs
    ]
    errors = means(largest, lambda run: run.summary.get("test/mse"))
    pca = means(largest, lambda run: run.summary.get("pca/mse")).values()
    augmented = any(result.run.settings["augment"] != "none" for result in largest)
    lines.append(recommendation.reconstruction(errors, next(iter(pca), None), augmented))
    if not same_time:
        seconds = means(largest, lambda run: run.cost().get("training_seconds"))
        lines.append(recommendation.cheapest(accuracy[most], seconds))
    if once := [method for method, count in seeds.items() if count == 1]:
        whose = "" if len(once) == len(seeds) else f" of {', '.join(once)}"
        lines.append(f"one seed{whose}: the intervals say nothing of how another one would end")
    return lines + [f"failed, left out: {name} ({reason})" for name, reason in failed.items()]


def read(run: Any, member: Member) -> Result:
    """What a finished member found; `run` is its `common.run.runs.Run`.

    `UserError` where its latents are missing or damaged.
    """
    path = run.folder / "latents.npz"
    try:
        with path.open("rb") as file, np.load(file) as found:
            arrays = dict(found)
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from None
    labels, latents = arrays["labels"], torch.from_numpy(arrays["latents"])
    projections = arrays["projections"] if has_projection(run) else None
    values = {}
    for name in ("linear", "knn", "knn_cosine", "class_mean"):
        found = arrays[f"{name}_predictions"]
        values[name] = (found == labels)[found != samples.NOT_ASKED]
    values["own"] = arrays["predictions"] == labels
    first, precision = scores.retrieve(latents, torch.from_numpy(labels))
    values |= {"first_hit": first.numpy(), "precision": precision.numpy()}
    if projections is not None:
        _, precision = scores.retrieve(torch.from_numpy(projections), torch.from_numpy(labels))
        values[PROJECTED] = precision.numpy()
    values = {name: x.astype(float) for name, x in values.items() if len(x)}
    return Result(member, run, values, latents.shape[1])


def has_projection(run: Any) -> bool:
    """Whether the loss of a run shaped another space than its latents."""
    return run.settings.get("head", "none") != "none"


def by_method(results: Sequence[Result], name: str) -> dict[str, list[np.ndarray]]:
    """The values of a score by method, an array for each seed; methods without it are left out."""
    found: dict[str, list[np.ndarray]] = {}
    for result in results:
        if name in result.values:
            found.setdefault(result.member.method, []).append(result.values[name])
    return found


def means(results: Sequence[Result], number: Callable[[Any], float | None]) -> dict[str, float]:
    """The mean of a number of each run by method, of those methods whose runs have it."""
    found: dict[str, list[float]] = {}
    for result in results:
        if (value := number(result.run)) is not None:
            found.setdefault(result.member.method, []).append(value)
    return {method: float(np.mean(values)) for method, values in found.items()}


def baselines_of(images: Any, pca: Any) -> dict[str, np.ndarray]:
    """Whether a linear probe on what no network has learned is right on each test image, (N,).

    "PCA", unless `pca` is None, as `report.fit_pca` gives it, and "pixels", unless too large.
    """
    found = {}
    if pca is not None:
        found["PCA"] = report.pca_latents(pca, images)
    if not report.pixels_too_large(images):
        splits = (images.train, images.validation, images.test)
        pairs = ((torch.cat(list(report.pixels(split))), split.labels) for split in splits)
        found["pixels"] = probes.Latents(*(tensor for pair in pairs for tensor in pair))
    classes = len(images.class_names)
    return {
        name: (probes.fit_linear(latents, classes).predict(latents.test) == latents.test_labels)
        .numpy()
        .astype(float)
        for name, latents in found.items()
    }


def table(
    groups: dict[str, list[Result]],
    baselines: dict[str, dict[str, list[np.ndarray]]],
    robust_baselines: dict[str, np.ndarray],
) -> list[tables.Row]:
    """A section for each number of labels: score ± half of its 95 % interval, by method.

    PCA and pixels stand beside them, from the summaries of the runs and, for the linear probe,
    from `baselines` and `robust_baselines`. The best method is marked only where it is clearly
    above all others.
    """
    methods = list(dict.fromkeys(r.member.method for group in groups.values() for r in group))
    rows = [tables.Row("on the test images", (*methods, "PCA", "pixels"))]
    for labels, group in groups.items():
        rows.append(tables.Row(named(labels)))
        known = {"linear": baselines[labels]}
        if by_method(group, "robust"):  # they are of this group
            known["robust"] = {name: [values] for name, values in robust_baselines.items()}
        for score in SCORES:
            cells, best = _of_methods(group, methods, score)
            cells += _of_baselines(group, known.get(score[-1], {}), score)
            if set(cells) != {"–"}:
                rows.append(tables.Row(score[1], tuple(cells), best))
        sizes = {r.member.method: f"{r.dimensions:,}" for r in group}
        cells = [sizes.get(method, "–") for method in methods]
        rows.append(tables.Row("dimensions of the latents", (*cells, "–", "–")))
        seconds = means(group, lambda run: run.cost().get("training_seconds"))
        cells = [f"{seconds[method]:,.0f}" if method in seconds else "–" for method in methods]
        rows.append(tables.Row("seconds of training", (*cells, "–", "–")))
    return rows


def _of_methods(
    group: Sequence[Result], methods: Sequence[str], score: tuple[str, str, str, str]
) -> tuple[list[str], frozenset[int]]:
    """A cell for each method, and the index of the one that is clearly above all others."""
    key, _, form, name = score
    values, cells = by_method(group, name), []
    for method in methods:
        found = [
            r.run.summary[key] for r in group if r.member.method == method and key in r.run.summary
        ]
        found = found or values.get(method, [])
        cell = form.format(np.mean(found)) if found else "–"
        if method in values:
            bounds = scores.interval(values[method])
            cell += f" ± {form.format((bounds.high - bounds.low) / 2)}"
        cells.append(cell)
    everyone = values.keys() >= {result.member.method for result in group}
    leader = recommendation.leader(values) if everyone else None
    return cells, frozenset([methods.index(leader)] if leader else [])


def _of_baselines(
    group: Sequence[Result],
    known: dict[str, list[np.ndarray]],
    score: tuple[str, str, str, str],
) -> list[str]:
    """A cell for PCA and one for the pixels, from `known` or the runs; each seed counts once."""
    key, _, form, _ = score
    cells = []
    for prefix, name in (("pca", "PCA"), ("image", "pixels")):
        key_there = f"{prefix}/{key.removeprefix('test/').removeprefix('latent/')}"
        by_seed = {r.member.seed: r.run.summary for r in group if key_there in r.run.summary}
        found = known.get(name) or [summary[key_there] for summary in by_seed.values()]
        cells.append(form.format(np.mean(found)) if found else "–")
    return cells


def curves(groups: dict[str, list[Result]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Accuracy of the linear probe with its interval, by method and labels per class."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for labels, group in groups.items():
        for method, values in by_method(group, "linear").items():
            bounds = scores.interval(values)
            found.setdefault(method, {})[labels] = (bounds.value, bounds.low, bounds.high)
    return found


def baseline_curves(
    baselines: dict[str, dict[str, list[np.ndarray]]],
) -> dict[str, dict[str, float]]:
    """Accuracy of the linear probe on PCA and pixels, by name and labels per class."""
    found: dict[str, dict[str, float]] = {}
    for labels, values in baselines.items():
        for name, by_seed in values.items():
            found.setdefault(name, {})[labels] = float(np.mean(by_seed))
    return found


def progress(results: Sequence[Result]) -> dict[str, list[np.ndarray]]:
    """Seconds of training and cosine kNN accuracy on validation (2,n) of each run, by method."""
    found: dict[str, list[np.ndarray]] = {}
    for result in results:
        rows = [row for row in result.run.rows if "time/epoch_seconds" in row]
        timed = np.array([row["time/epoch_seconds"] for row in rows])
        means = timed.cumsum() / np.arange(1, len(rows) + 1)  # of an epoch; some were not timed
        seconds = means * [row["epoch"] for row in rows]
        accuracy = [row["val/knn_cosine_accuracy"] for row in rows]
        found.setdefault(result.member.method, []).append(np.array([seconds, accuracy]))
    return found
