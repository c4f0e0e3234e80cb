"""Figures of a run: reconstructions, interpolation, t-SNE maps, confusion matrix, curves.

Arrays in, figure out, without pyplot; nothing is logged, shown or written here.
"""

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib import colors, lines, textpath
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font, get_font_names
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy import ndarray

DPI = 150
SMALL = 8  # font size in points, for numbers below images and in cells
DARK, GRAY, PALE = "#222222", "#666666", "#dddddd"
TEN = matplotlib.color_sequences["petroff10"]  # safe for color-blind readers
MARKERS = "o^sD"  # with ten colors each: 40 distinguishable classes

_STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.linewidth": 0.6, "axes.edgecolor": "#aaaaaa",
    "xtick.major.size": 2, "ytick.major.size": 2, "text.color": DARK, "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.06, "figure.constrained_layout.h_pad": 0.06,
    "legend.handlelength": 1.8, "image.interpolation": "nearest", "text.parse_math": False,
}  # fmt: skip
_FAMILIES = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Arial Unicode MS")


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with Matplotlib's defaults and our style, whatever the user's rcParams are.

    The figure is laid out here, once: saving it would do so twice.
    """

    @functools.wraps(draw)
    def wrapper(*args, **kwargs) -> Figure:
        with _our_style():
            figure = draw(*args, **kwargs)
            if figure.get_layout_engine():
                figure.draw_without_rendering()  # also creates the ticks while the style is set
                figure.set_layout_engine("none")
        return figure

    return wrapper


def saved(figure: Figure, kind: str = "png") -> bytes:
    """The figure as a file of this kind, with its own dpi, whatever the user's rcParams are."""
    with _our_style():
        figure.savefig(file := io.BytesIO(), format=kind)
    return file.getvalue()


def _our_style() -> contextlib.AbstractContextManager:
    plain = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
    return matplotlib.rc_context({**plain, **_STYLE, "font.family": list(_fonts())})


@dataclass(frozen=True)
class Embedding:
    """One scatter panel: `points` float (N,2), a title and a note below it."""

    points: ndarray
    title: str
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """One panel of `curves`: its keys over `x`, and `lines`: reference values by name."""

    title: str
    keys: tuple[str, ...]
    lines: Mapping[str, float] = field(default_factory=dict)
    logarithmic: bool = False
    percent: bool = False  # keys and lines are fractions, shown as per cent
    x: str = "epoch"


@styled
def reconstructions(images: ndarray, reconstructions: ndarray, names: Sequence[str]) -> Figure:
    """Images above their reconstructions, with class names and mean squared errors.

    Both (N,C,H,W), C = 1 or 3, float in [0,1] or uint8; N names. The error is that of values in
    [0,1], not clipped. A band holds up to ten images.
    """
    images, outputs = _unit(images), _unit(reconstructions)
    names, widths = _labels(names)
    bands = math.ceil(len(images) / 10)
    columns = math.ceil(len(images) / bands)
    side = min(1.0, 8.0 / columns)  # this and all below in inches
    rotation = 90 if max(widths) > side else 0
    band = 2 * side + 0.5 + (max(widths) if rotation else 0.05)
    figure = Figure(figsize=(0.4 + max(columns * (side + 0.06), 1.0), bands * band), dpi=DPI)
    write = functools.partial(figure.text, transform=figure.dpi_scale_trans)
    for n, (image, output, name) in enumerate(zip(images, outputs, names, strict=True)):
        left, bottom = 0.4 + n % columns * (side + 0.06), (bands - 1 - n // columns) * band + 0.25
        top = bottom + side + 0.05
        _show(figure, image, (left, top, side))
        _show(figure, output, (left, bottom, side), f"{((image - output) ** 2).mean():.3g}")
        write(left + side / 2, top + side + 0.02, name, ha="center", va="bottom", rotation=rotation)
        if n % columns == 0:
            write(left - 0.06, bottom - 0.05, "MSE", size=SMALL, ha="right", va="top")
            for y, word in ((top, "original"), (bottom, "decoded")):
                write(left - 0.06, y + side / 2, word, rotation=90, ha="right", va="center")
    return figure


@styled
def interpolation(
    frames: ndarray, first_name: str, last_name: str, ends: ndarray | None = None
) -> Figure:
    """Decoded interpolation between two latents in one row, in equal steps from t = 0 to 1.

    `frames` (S,C,H,W), `ends` (2,C,H,W), C = 1 or 3, float in [0,1] or uint8: `ends` are the two
    real images, drawn at the left and the right.
    """
    steps, real = len(frames), ends is not None
    names, widths = _labels([first_name, last_name])
    timed = np.linspace(0, steps - 1, steps if steps <= 11 else 5).round()  # labels of more overlap
    side = min(1.0, 8.4 / (steps + 2 * real))  # this and all below in inches
    start = side + 0.5 if real else 0.35
    places = start + (side + 0.03) * np.arange(steps)
    outer = (0.05, places[-1] + side + 0.25) if real else places[[0, -1]]
    width = max(outer[1] + side, outer[0] + sum(widths) + 0.2)
    figure = Figure(figsize=(width + 0.05, side + 0.45), dpi=DPI)
    write = functools.partial(figure.text, transform=figure.dpi_scale_trans)
    for n, frame in enumerate(_unit(frames)):
        time = str(round(n / max(steps - 1, 1), 2)) if n in timed else ""
        _show(figure, frame, (places[n], 0.22, side), time)
    for image, left in zip(_unit(ends), outer, strict=True) if real else ():
        _show(figure, image, (left, 0.22, side), "real")
    write(start - 0.04, 0.17, "t =", size=SMALL, ha="right", va="top")
    write(outer[0], side + 0.28, names[0])
    write(width, side + 0.28, names[1], ha="right")
    return figure


@styled
def embeddings(
    panels: Sequence[Embedding],
    labels: ndarray,
    class_names: Sequence[str],
    predictions: ndarray | None = None,
) -> Figure:
    """Scatter plots of the same N points in one or several spaces, colored by class.

    `labels`, `predictions` int (N,): where they differ, the point has a dark ring. Up to 10 classes
    have a color each, up to 40 a color and a marker, more a continuous colormap with some classes
    in the legend. Points that are not finite are left out.
    """
    wrong = labels != (labels if predictions is None else predictions)  # (N,)
    classes = np.arange(len(class_names))
    palette, shapes, named = colors.to_rgba_array(TEN)[classes % 10], classes // 10, classes
    if len(classes) > 10 * len(MARKERS):
        palette = matplotlib.colormaps["viridis"](np.linspace(0, 1, len(classes)))
        shapes, named = 0 * classes, np.linspace(0, classes[-1], 12).round().astype(int)
    entries, widths = _labels(class_names[k] for k in named)
    dot = functools.partial(lines.Line2D, [], [], linestyle="none", markersize=5)
    dots = [dot(marker=MARKERS[shapes[k]], color=palette[k]) for k in named]
    if predictions is not None:
        dots.append(dot(marker="o", markerfacecolor="none", color=DARK))
        entries, widths = [*entries, "mistake"], [*widths, 0.5]
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    side = (5.4, 4.2, 3.1)[columns - 1]  # inches
    across = _legend_columns(widths, 0.32, side * columns)
    height = (side + 0.4) * rows + 0.2 * math.ceil(len(entries) / across)
    figure = Figure(figsize=(side * columns, height), dpi=DPI, layout="constrained")
    area = side / 5.4 * min(24, 400 / math.sqrt(len(labels) + 1))  # points²
    order = np.random.default_rng(0).permutation(len(labels))  # so that no class covers the others
    for n, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, n + 1)
        points = np.asarray(panel.points, np.float64)
        for shape in np.unique(shapes):
            some = order[shapes[labels[order]] == shape]
            axes.scatter(*points[some].T, area, palette[labels[some]], marker=MARKERS[shape], lw=0)
        ring = {"facecolors": "none", "edgecolors": DARK, "linewidths": 0.6, "gid": "mistakes"}
        axes.scatter(*points[wrong].T, s=1.6 * area + 4, **ring)
        [title], _ = _labels([panel.title], 60)
        axes.set(xticks=[], yticks=[], title=title, aspect="equal", adjustable="datalim")
        axes.xaxis.set_label_position("top")
        axes.set_xlabel(panel.note, color=GRAY)
    title = f"{len(named)} of {len(classes)} classes" if len(named) < len(classes) else None
    spaces = {"handlelength": 1, "handletextpad": 0.4, "columnspacing": 1.0, "ncols": across}
    figure.legend(dots, entries, title=title, loc="outside lower center", **spaces)
    return figure


@styled
def confusion(labels: ndarray, predictions: ndarray, class_names: Sequence[str]) -> Figure:
    """Confusion matrix: in row y, column x, the percentage of class y that is predicted as x.

    `labels`, `predictions` int (N,). The color scale is a cube root, so that small errors are
    visible. Up to 20 classes have numbers, more a color bar.
    """
    classes = len(class_names)
    counts = np.zeros((classes, classes), np.int64)  # true, predicted
    np.add.at(counts, (labels, predictions), 1)
    percents = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names, widths = _labels(class_names)
    widest, numbered = max(widths), classes <= 20
    side = max(2.8, (0.46 if classes <= 12 else 0.37) * classes) if numbered else 5.6  # inches
    stride = math.ceil(classes / 25)
    upright = widest > 0.9 * side * stride / classes
    size = (side + widest + 0.5 + 0.8 * (not numbered), side + 0.9 + (widest if upright else 0.1))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    norm = colors.PowerNorm(1 / 3, vmin=0, vmax=100)
    picture = axes.imshow(percents, cmap="Blues", norm=norm)
    if not numbered:
        bar = figure.colorbar(picture, label="% of the true class", format="%g", shrink=0.85)
        bar.set_ticks([0, 0.1, 1, 5, 20, 50, 100])
    for y, x in np.argwhere(counts) if numbered else ():
        ink = "white" if norm(percents[y, x]) > 0.6 else DARK
        look = {"size": SMALL if classes <= 12 else 7, "color": ink, "in_layout": False}
        axes.text(x, y, f"{percents[y, x]:.1f}", ha="center", va="center", **look)
    axes.set_xticks(range(0, classes, stride), names[::stride], rotation=90 * upright)
    axes.set_yticks(range(0, classes, stride), names[::stride])
    title = f"accuracy {100 * np.trace(counts) / max(counts.sum(), 1):.2f} %   n = {counts.sum():,}"
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    return figure


@styled
def curves(rows: Sequence[Mapping[str, float]], panels: Sequence[Curve]) -> Figure:
    """Logged values over time: one panel per `Curve`, with its reference lines.

    `rows` as in metrics.jsonl: a step, an epoch, some of the keys. A value that is not finite (on
    a logarithmic scale: not positive) is a gap. Keys and panels without values are left out.
    """
    drawn = [(panel, series) for panel in panels if (series := _series(rows, panel))]
    across, width = (2, 4.3) if len(drawn) > 1 else (1, 5.6)  # panels in a row, inches of each
    down = math.ceil(len(drawn) / across)
    figure = Figure(figsize=(width * across, 3.2 * max(down, 0.3)), dpi=DPI, layout="constrained")
    figure.text(0.5, 0.5, "" if drawn else "nothing to draw yet", ha="center", va="center")
    for n, (panel, series) in enumerate(drawn):
        axes = figure.add_subplot(down, across, n + 1)
        for key, points in series.items():
            color = TEN[panel.keys.index(key) % 10]  # independent of the other keys
            marker = "o" if points.shape[1] <= 50 else None
            axes.plot(*points, color=color, linewidth=1.2, marker=marker, markersize=3)
        entries, factor, unit = list(series), *((100, " %") if panel.percent else (1, ""))
        for k, (name, value) in enumerate(panel.lines.items()):
            if math.isfinite(value) and (value > 0 or not panel.logarithmic):
                axes.axhline(value, color=GRAY, linewidth=1, linestyle=("--", ":", "-.")[k % 3])
                entries.append(f"{name} ({factor * value:.3g}{unit})")
        if panel.logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
        axes.yaxis.set_major_formatter(lambda y, _, unit=unit, f=factor: f"{f * y:g}{unit}")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5]))
        axes.set(title=_labels([panel.title], 60)[0][0], xlabel=panel.x)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)  # set explicitly, it limits the number of ticks
        axes.grid(True, color=PALE, linewidth=0.5)
        # the legend below the axes, since inside it would cover curves
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 3.3}
        entries, widths = _labels(entries)
        axes.legend(axes.lines, entries, ncols=_legend_columns(widths, 0.5, width - 0.3), **place)
    return figure


def _series(rows: Sequence[Mapping[str, float]], panel: Curve) -> dict[str, ndarray]:
    """x and values (2,n) of each key with values, float64; NaN is a gap."""
    series = {}
    for key in panel.keys:
        pairs = [(row.get(panel.x), row[key]) for row in rows if key in row]  # None becomes NaN
        x, values = np.array(pairs, np.float64).reshape(-1, 2).T
        shown = np.isfinite(x) & np.isfinite(values) & ((values > 0) | (not panel.logarithmic))
        if shown.any():
            series[key] = np.where(shown, (x, values), np.nan)
    return series


@functools.cache
def _fonts() -> dict[str, set[int]]:
    """The installed ones of our font families (the first always is), with their characters."""
    families = [family for family in _FAMILIES if family in get_font_names()]
    return {family: set(get_font(findfont(family)).get_charmap()) for family in families}


def _labels(names: Iterable[str], longest: int = 26) -> tuple[list[str], list[float]]:
    """Names with escapes for missing glyphs and long ones shortened; their widths in inches."""
    drawable = set().union(*_fonts().values())
    names = ["".join(c if ord(c) in drawable else ascii(c)[1:-1] for c in str(n)) for n in names]
    names = [n if len(n) <= longest else f"{n[: longest - 12]}…{n[-11:]}" for n in names]
    paths = [textpath.TextPath((0, 0), f"{name}.", size=9) for name in names]
    return names, [np.ptp(path.vertices[:, 0]) / 72 for path in paths]


def _legend_columns(widths: Sequence[float], gap: float, room: float) -> int:
    """The most columns that fit into `room` with `gap` between texts, all in inches."""
    columns = len(widths)
    while columns > 1 and sum(max(c) + gap for c in np.array_split(widths, columns)) > room:
        columns -= 1
    return columns


def _unit(images: ndarray) -> ndarray:
    """(N,C,H,W) float or uint8 as float64 in [0,1], not clipped."""
    return np.divide(images, 255 if images.dtype == np.uint8 else 1, dtype=np.float64)


def _show(figure: Figure, image: ndarray, square: Sequence[float], below: str = "") -> None:
    """Draw (C,H,W) into a square (left, bottom, side), in inches; NaN is black."""
    axes = figure.add_axes(np.array([*square, square[2]]) / np.tile(figure.get_size_inches(), 2))
    pixels = np.clip(np.nan_to_num(image), 0, 1).transpose(1, 2, 0)  # (H,W,C)
    axes.imshow(pixels[..., 0] if len(image) == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title(below, y=0, pad=-3.6, size=SMALL, va="top")
