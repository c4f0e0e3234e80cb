"""Figures of a comparison: accuracy by class, confusions, accuracy curves; stacked to one sheet.

Numbers in, figure out, in the style of `plots`.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy import ndarray

from . import plots

WIDTH = 9.3  # inches, of three maps in a row
MOST_CLASSES = 20  # columns; of more classes the hardest are shown
BASELINES = ("--", ":", "-.")  # line styles, all in gray
GAP = 24  # pixels between two parts of the sheet


def class_colors(count: int) -> list[str]:
    """A color per class as #rrggbb: the ten of `plots`, beyond ten a continuous colormap."""
    few = plots.TEN if count <= 10 else matplotlib.colormaps["turbo"](np.linspace(0, 1, count))
    return [to_hex(color) for color in few[:count]]


@plots.styled
def classes(accuracies: Mapping[str, ndarray], class_names: Sequence[str]) -> Figure:
    """Heatmap of the accuracy of each class in each space; NaN: no such test image.

    `accuracies` (K,) by name of the space. Of many classes the hardest on average are shown.
    """
    names, table = list(accuracies), np.stack(list(accuracies.values()))  # (spaces,K)
    order = np.arange(len(class_names))
    if len(order) > MOST_CLASSES:
        hardest = np.argsort(np.nan_to_num(table.mean(0), nan=9), kind="stable")
        order = np.sort(hardest[:MOST_CLASSES])
    table = 100 * table[:, order]
    columns, widths = plots._labels([class_names[n] for n in order], 14)
    rows, _ = plots._labels(names)
    upright = max(widths) > 0.75 * (WIDTH - 2.2) / len(order)
    size = (WIDTH, 0.55 + 0.3 * len(rows) + (max(widths) if upright else 0.2))
    figure = Figure(figsize=size, dpi=plots.DPI, layout="constrained")
    axes = figure.subplots()
    norm = PowerNorm(1 / 3, vmin=0, vmax=100)  # as in the confusion matrix: small errors show
    axes.imshow(100 - table, cmap="Blues", norm=norm, aspect="auto")
    for y, x in np.argwhere(np.isfinite(table)):
        ink = "white" if norm(100 - table[y, x]) > 0.7 else plots.DARK
        look = {"size": plots.SMALL if len(order) <= 12 else 6, "color": ink, "in_layout": False}
        axes.text(x, y, f"{table[y, x]:.1f}", ha="center", va="center", **look)
    axes.set_xticks(range(len(order)), columns, rotation=90 * upright)
    axes.set_yticks(range(len(rows)), rows)
    note = ""
    if len(order) < len(class_names):
        note = f", the {len(order)} hardest of {len(class_names)}"
    axes.set_title(f"accuracy of each class in % (darker: more mistakes){note}")
    return figure


@plots.styled
def mistakes(
    confusions: Mapping[str, Sequence[tuple[int, int, float]]], class_names: Sequence[str]
) -> Figure:
    """Bars of the most frequent confusions of each space: (true, predicted, rate)."""
    texts = {
        name: [" → ".join(plots._labels([class_names[k] for k in two], 16)[0]) for *two, _ in pairs]
        for name, pairs in confusions.items()
    }
    _, widths = plots._labels((text for some in texts.values() for text in some), 40)
    across = min(3 if max(widths, default=0) < 1.6 else 2, len(confusions))
    down = math.ceil(len(confusions) / across)
    most = max(1, *(len(pairs) for pairs in confusions.values()))
    size = (WIDTH, 0.3 + down * (0.5 + 0.2 * most))
    figure = Figure(figsize=size, dpi=plots.DPI, layout="constrained")
    figure.suptitle("most frequent mistakes: true → predicted, in % of the true class", size=10)
    highest = max((rate for pairs in confusions.values() for *_, rate in pairs), default=0.01)
    parts = figure.subfigures(down, across, squeeze=False)
    for n, (name, pairs) in enumerate(confusions.items()):
        axes = parts.flat[n].subplots()
        rates = [100 * rate for *_, rate in pairs]
        axes.barh(range(len(pairs)), rates, color="#9ecae1", height=0.7)
        for y, rate in enumerate(rates):
            axes.text(rate, y, f" {rate:.1f}", va="center", size=plots.SMALL)
        axes.set_yticks(range(len(pairs)), texts[name])
        axes.set(xlim=(0, 118 * highest), ylim=(most - 0.4, -0.6), xticks=[])
        # centered on the subfigure: with long class names the axes are narrow
        parts.flat[n].suptitle(plots._labels([name], 34)[0][0], size=9)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        if not pairs:
            look = {"transform": axes.transAxes, "ha": "center", "color": plots.GRAY}
            axes.text(0.5, 0.5, "no mistakes", **look)
    return figure


Line = Mapping[float, tuple[float, float]]  # x: mean and standard deviation, fractions


@plots.styled
def lines(panels: Mapping[tuple[str, str], Mapping[str, Line]], baselines: Sequence[str]) -> Figure:
    """Accuracy over labels or corruption severity: a panel per (title, x label), a line per space.

    The x values are drawn at equal distances. Bars are standard deviations. Spaces that are
    `baselines` are gray.
    """
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    own = [name for name in names if name not in baselines]
    across = max(1, len(panels))
    figure = Figure(figsize=(WIDTH, 3.6), dpi=plots.DPI, layout="constrained")
    handles = {}
    for n, ((title, unit), series) in enumerate(panels.items()):
        axes = figure.add_subplot(1, across, n + 1)
        ticks = sorted({x for line in series.values() for x in line})
        for name, line in series.items():
            points = [(ticks.index(x), *line[x]) for x in sorted(line)]
            x, mean, std = 100 * np.array(points).T / [[100], [1], [1]]
            look = {"color": plots.GRAY, "marker": "s", "linewidth": 1}
            if name in baselines:
                look["linestyle"] = BASELINES[list(baselines).index(name) % len(BASELINES)]
            else:
                k = own.index(name)
                color, marker = plots.TEN[k % 10], plots.MARKERS[k % 4]
                look = {"color": color, "marker": marker, "linewidth": 1.4}
            bars = std if std.any() else None
            handles[name] = axes.errorbar(x, mean, bars, markersize=4, capsize=2, **look)
        axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g} %")
        axes.set(title=title, xlabel=unit)
        axes.margins(x=0.08)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", color=plots.PALE, linewidth=0.5)
    entries, widths = plots._labels(handles)
    columns = plots._legend_columns(widths, 0.5, WIDTH - 0.3)
    figure.legend(handles.values(), entries, ncols=columns, loc="outside lower center")
    return figure


@plots.styled
def stack(figures: Sequence[Figure]) -> Figure:
    """Figures stacked vertically pixel by pixel, centered."""
    pictures = [_pixels(figure) for figure in figures]
    width = max(picture.shape[1] for picture in pictures)
    padded = []
    for picture in pictures:
        left = (width - picture.shape[1]) // 2
        sides = ((0, GAP), (left, width - picture.shape[1] - left), (0, 0))
        padded.append(np.pad(picture, sides, constant_values=255))
    sheet = np.concatenate(padded)
    figure = Figure(figsize=(width / plots.DPI, len(sheet) / plots.DPI), dpi=plots.DPI)
    figure.figimage(sheet)
    return figure


def _pixels(figure: Figure) -> ndarray:
    """The rendered figure, uint8 (H,W,4)."""
    width, height = figure.canvas.get_width_height()
    return np.frombuffer(plots.saved(figure, "rgba"), np.uint8).reshape(height, width, 4)
