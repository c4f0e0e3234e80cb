"""Figures of a study: accuracy against labels per class, and against seconds of training."""

import itertools
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy import ndarray

from . import plots

SIZE = (5.6, 3.6)  # inches


@plots.styled
def by_labels(
    curves: Mapping[str, Mapping[str, tuple[float, float, float]]],
    labels: Sequence[str],
    baselines: Mapping[str, Mapping[str, float]],
) -> Figure:
    """A line for each method: its accuracy, and the limits of its interval, by labels per class.

    `labels` in rising order, as texts. `curves`: value, low and high (fractions) by method and by
    label; `baselines`: values by name and by label, drawn dashed. A label may be missing.
    """
    figure = Figure(figsize=SIZE, dpi=plots.DPI, layout="constrained")
    axes = figure.subplots()
    for n, (name, found) in enumerate(curves.items()):
        places = [k for k, label in enumerate(labels) if label in found]
        values = [[100 * x for x in found[labels[k]]] for k in places]
        means = [mean for mean, _, _ in values]
        below = [mean - low for mean, low, _ in values]
        above = [high - mean for mean, _, high in values]
        # a little apart, or the bars of equal methods hide each other
        beside = [k + 0.015 * len(labels) * (n - (len(curves) - 1) / 2) for k in places]
        axes.errorbar(
            beside, means, (below, above), label=name, color=plots.TEN[n % 10], marker="o",
            markersize=3, linewidth=1.2, capsize=2,
        )  # fmt: skip
    for (name, found), dashes in zip(baselines.items(), itertools.cycle(((4, 2), (1, 1.5)))):
        places = [k for k, label in enumerate(labels) if label in found]
        values = [100 * found[labels[k]] for k in places]
        look = {"dashes": dashes, "marker": "x", "markersize": 4, "linewidth": 1}
        axes.plot(places, values, label=name, color=plots.GRAY, **look)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(title="accuracy of the linear probe on test images", xlabel="labels per class")
    return _finished(figure)


@plots.styled
def by_seconds(curves: Mapping[str, Sequence[ndarray]]) -> Figure:
    """A line for each run, in the color of its method: seconds of training, kNN accuracy (2,n)."""
    figure = Figure(figsize=SIZE, dpi=plots.DPI, layout="constrained")
    axes = figure.subplots()
    for n, (name, runs) in enumerate(curves.items()):
        for k, (seconds, accuracy) in enumerate(runs):
            axes.plot(
                seconds, 100 * accuracy, label=name if k == 0 else None, color=plots.TEN[n % 10],
                marker="o" if len(seconds) <= 20 else None, markersize=3, linewidth=1.2,
            )  # fmt: skip
    axes.xaxis.set_minor_locator(NullLocator())
    title = "accuracy of 5 nearest neighbors by cosine similarity, validation images"
    axes.set(title=title, xlabel="seconds of training")
    return _finished(figure)


def _finished(figure: Figure) -> Figure:
    (axes,) = figure.axes
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g} %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=plots.PALE, linewidth=0.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=6)
    return figure
