"""What does it look like? The numbers in the pictures are the numbers that went in."""

import io
import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import AxesImage

from common.display import plots, sheet
from common.display.plots import Curve, Embedding

LONG = "n02085620-Chihuahua_long_haired"
ODD_NAMES = ["$x_1$ and $y$", "_hidden", "кошка", "猫", "$", LONG, "a\nb"]


def render(figure) -> np.ndarray:
    """The saved picture (H,W,4); fails on a warning, text outside, or an unbounded size."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=60)  # the layout is the same, the test is quicker
    picture = matplotlib.image.imread(io.BytesIO(file.getvalue()))
    assert picture[0, 0].tolist() == [1, 1, 1, 1]
    width, height = figure.get_size_inches()
    assert max(width, height) * figure.dpi <= 1500 and figure.dpi == plots.DPI
    box = figure.get_tightbbox()  # inches
    assert box.x0 >= -0.01 and box.y0 >= -0.01, box
    assert box.x1 <= width + 0.01 and box.y1 <= height + 0.01, box
    return picture


def texts(figure) -> list[str]:
    found = figure.findobj(matplotlib.text.Text)
    return [text.get_text() for text in found if text.get_visible() and text.get_text()]


def shown(figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in figure.findobj(AxesImage)]


def random_images(count: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, channels, 8, 8)).astype(np.float32)


def cluster_points(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.arange(count) % classes
    return generator.normal(size=(count, 2)) + labels[:, None], labels


def scattered(axes) -> tuple[np.ndarray, np.ndarray]:
    """The points drawn in one panel (N,2), rings left out, and their colors (N,4)."""
    dots = [dots for dots in axes.collections if dots.get_gid() != "mistakes"]
    points = [np.ma.getdata(each.get_offsets()) for each in dots]
    colors = [each.get_facecolors() for each in dots]
    return np.concatenate(points), np.concatenate(colors)


@pytest.mark.parametrize(("channels", "count"), [(1, 1), (3, 1), (1, 10), (3, 11)])
def test_reconstructions_show_each_pair_and_its_error(channels, count):
    images, outputs = random_images(count, channels), random_images(count, channels, seed=1)
    names = [f"class {n}" for n in range(count)]
    figure = plots.reconstructions(images, outputs, names)
    render(figure)
    pictures = shown(figure)
    assert len(pictures) == 2 * count
    for n in range(count):
        for picture, image in ((pictures[2 * n], images[n]), (pictures[2 * n + 1], outputs[n])):
            expected = image[0] if channels == 1 else image.transpose(1, 2, 0)
            np.testing.assert_allclose(picture, expected, rtol=1e-6)
        error = ((images[n] - outputs[n]) ** 2).mean()
        assert f"{error:.3g}" in texts(figure)
    assert set(names) <= set(texts(figure))
    above, below = (axes.get_position() for axes in figure.axes[:2])
    assert above.y0 >= below.y1 and above.x0 == below.x0


def test_gray_images_are_gray_from_zero_to_one():
    figure = plots.reconstructions(random_images(1, 1) * 0.1, random_images(1, 1) * 0.1, ["a"])
    for image in figure.findobj(AxesImage):
        assert image.get_clim() == (0, 1) and image.get_cmap().name == "gray"
        assert image.get_interpolation() == "nearest"


def test_bytes_are_the_same_as_fractions_and_the_error_is_not_clipped():
    images = np.full((1, 3, 4, 4), 51, np.uint8)  # 0.2
    figure = plots.reconstructions(images, np.full((1, 3, 4, 4), 1.2, np.float32), ["a"])
    assert "1" in texts(figure)  # (1.2 - 0.2)²
    np.testing.assert_allclose(shown(figure)[0], 0.2)
    assert shown(figure)[1].max() == 1


def test_images_that_are_not_finite_are_drawn_all_the_same():
    outputs = random_images(2)
    outputs[0] = np.nan
    figure = plots.reconstructions(random_images(2), outputs, ["a", "b"])
    render(figure)
    assert "nan" in texts(figure) and np.isfinite(shown(figure)[1]).all()


def test_a_name_too_few_is_an_error():
    with pytest.raises(ValueError):
        plots.reconstructions(random_images(3), random_images(3), ["a", "b"])


@pytest.mark.parametrize(("channels", "steps"), [(1, 1), (3, 8), (1, 11), (3, 24)])
@pytest.mark.parametrize("real", [True, False])
def test_interpolation_shows_its_frames_in_order_between_the_real_images(channels, steps, real):
    frames = random_images(steps, channels)
    ends = random_images(2, channels, seed=1) if real else None
    figure = plots.interpolation(frames, "automobile", "cat", ends)
    render(figure)
    axes = sorted(figure.axes, key=lambda axes: axes.get_position().x0)
    expected = [*ends[:1], *frames, *ends[1:]] if real else [*frames]
    assert len(axes) == len(expected)
    for each, image in zip(axes, expected, strict=True):
        wanted = image[0] if channels == 1 else image.transpose(1, 2, 0)
        np.testing.assert_allclose(np.asarray(each.images[0].get_array()), wanted, rtol=1e-6)
    if real and steps > 1:
        places = [each.get_position() for each in axes]
        gaps = [right.x0 - left.x1 for left, right in itertools.pairwise(places)]
        assert min(gaps[0], gaps[-1]) > 3 * max(gaps[1:-1])
    assert {"automobile", "cat", "t =", "0.0"} <= set(texts(figure))
    if steps == 11:
        assert [f"{n / 10:.1f}" for n in range(11)] == [t for t in texts(figure) if t[0] in "01"]


@pytest.mark.parametrize("classes", [1, 10, 40])
def test_embeddings_have_one_legend_with_every_class(classes):
    points, labels = cluster_points(300, classes)
    names = [f"class {k}" for k in range(classes)]
    figure = plots.embeddings([Embedding(points, "a", "kNN 97 %")] * 2, labels, names)
    render(figure)
    assert len(figure.legends) == 1 and not any(axes.get_legend() for axes in figure.axes)
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == names
    looks = {(to_hex(h.get_color()), h.get_marker()) for h in legend.legend_handles}
    assert len(looks) == classes
    assert {"a", "kNN 97 %"} <= set(texts(figure))


def test_embeddings_show_every_point_in_the_color_of_its_class():
    points, labels = cluster_points(300, 10)
    figure = plots.embeddings(
        [Embedding(points, "a"), Embedding(-points, "b")], labels, "0123456789"
    )
    handles = figure.legends[0].legend_handles
    for axes, sign in zip(figure.axes, (1, -1), strict=True):
        assert axes.get_aspect() == 1 and len(axes.get_xticks()) == len(axes.get_yticks()) == 0
        drawn, colors = scattered(axes)
        label_of = {tuple(point): label for point, label in zip(sign * points, labels, strict=True)}
        assert sorted(map(tuple, drawn)) == sorted(label_of)
        for point, color in zip(drawn, colors, strict=True):
            assert to_hex(color) == to_hex(handles[label_of[tuple(point)]].get_color())


def test_no_class_lies_above_all_others():
    labels = np.repeat([0, 1], 100)
    figure = plots.embeddings([Embedding(np.zeros((200, 2)), "a")], labels, ["a", "b"])
    _, colors = scattered(figure.axes[0])
    last = {to_hex(color) for color in colors[-20:]}
    assert len(last) == 2


def test_rings_are_exactly_the_mistakes():
    points, labels = cluster_points(100, 10)
    predictions = labels.copy()
    predictions[[3, 50]] = (labels[[3, 50]] + 1) % 10
    figure = plots.embeddings([Embedding(points, "a")], labels, "0123456789", predictions)
    render(figure)
    (rings,) = [dots for dots in figure.axes[0].collections if dots.get_gid() == "mistakes"]
    np.testing.assert_array_equal(rings.get_offsets(), points[[3, 50]])
    assert len(rings.get_facecolors()) == 0
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == [*"0123456789", "mistake"]


def test_a_hundred_classes_fit_into_one_picture():
    points, labels = cluster_points(1000, 100)
    names = [f"a_rather_long_name_{k}" for k in range(100)]
    for panels in (1, 6):
        figure = plots.embeddings([Embedding(points, "a")] * panels, labels, names, labels)
        render(figure)
        assert figure.get_figheight() <= 8
        assert len(figure.legends[0].get_texts()) <= 13
        assert "12 of 100 classes" in texts(figure)
    figure = plots.confusion(labels, labels, names)
    render(figure)
    assert figure.get_figheight() <= 9


def test_points_get_smaller_as_they_get_more():
    sizes = []
    for count in (300, 2000, 10_000):
        points, labels = cluster_points(count, 10)
        figure = plots.embeddings([Embedding(points, "a")], labels, "0123456789")
        sizes.append(figure.axes[0].collections[0].get_sizes()[0])
    assert sizes[0] > 2 * sizes[1] > 2 * sizes[2] > 4


def test_points_that_are_not_finite_do_not_stop_the_picture():
    points, labels = cluster_points(30, 3)
    points[4] = np.nan
    render(plots.embeddings([Embedding(points, "a")], labels, "abc", 0 * labels))
    render(plots.embeddings([Embedding(points * np.nan, "a")], labels, "abc", 0 * labels))


def test_points_and_labels_of_different_lengths_are_an_error():
    points, labels = cluster_points(30, 3)
    with pytest.raises((ValueError, IndexError)):
        plots.embeddings([Embedding(points[:20], "a")], labels, "abc")
    with pytest.raises((ValueError, IndexError)):
        plots.embeddings([Embedding(np.tile(points, (2, 1)), "a")], labels, "abc")


def test_confusion_is_the_recall_of_a_hand_made_case():
    labels = np.array([0, 0, 0, 0, 1, 1])  # not symmetric: true and predicted may not be swapped
    predictions = np.array([0, 0, 0, 1, 1, 1])
    figure = plots.confusion(labels, predictions, ["cat", "dog", "never"])
    render(figure)
    np.testing.assert_allclose(shown(figure)[0], [[75, 25, 0], [0, 100, 0], [0, 0, 0]])
    axes = figure.axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "75.0", (1, 0): "25.0", (1, 1): "100.0"}  # x, y
    assert axes.get_title() == "accuracy 83.33 %   n = 6"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "never"]


def test_one_mistake_in_a_thousand_is_seen():
    counts = [1000, 0, 0, 999, 1]  # the last image of class 1 is taken for class 0
    labels = np.repeat([0, 0, 1, 1, 1], counts)
    predictions = np.repeat([0, 1, 0, 1, 0], counts)
    (image,) = plots.confusion(labels, predictions, ["a", "b"]).findobj(AxesImage)
    rgba = image.to_rgba(image.get_array())
    assert np.abs(rgba[1, 0] - rgba[0, 1]).max() > 0.05  # 0.1 % against nothing


@pytest.mark.parametrize("classes", [1, 20, 21, 60])
def test_confusion_has_numbers_where_there_is_room_and_a_scale_where_not(classes):
    labels = np.arange(200) % classes
    names = [f"automobile {k}" for k in range(classes)]
    figure = plots.confusion(labels, labels, names)
    render(figure)
    numbers = len(figure.axes[0].texts)
    assert (numbers, len(figure.axes)) == ((classes, 1) if classes <= 20 else (0, 2))
    ticks = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(ticks))


def test_long_names_do_not_meet_over_an_interpolation():
    figure = plots.interpolation(random_images(1), LONG, LONG)
    render(figure)
    left, right = (t.get_window_extent() for t in figure.texts if t.get_text()[0] == "n")
    assert left.x1 < right.x0


def epoch_rows(count: int) -> list[dict]:
    rows = []
    for epoch in range(1, count + 1):
        rows.append({"step": 10 * epoch - 5, "epoch": epoch - 0.5, "train/loss": 1 / epoch})
        rows.append({"step": 10 * epoch, "epoch": epoch, "val/accuracy": 1 - 0.5 / epoch})
    return rows


def test_curves_draw_what_was_logged_and_nothing_else():
    panels = [
        Curve("loss", ("test/loss", "train/loss"), x="step"),
        Curve("accuracy", ("val/accuracy",), {"PCA": 0.599}, percent=True),
        Curve("absent", ("never/logged",), {"line": 1.0}),
    ]
    figure = plots.curves(epoch_rows(5), panels)
    render(figure)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "accuracy"]
    loss, accuracy = figure.axes
    np.testing.assert_allclose(loss.lines[0].get_xdata(), [5, 15, 25, 35, 45])
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train/loss"]
    assert (loss.get_xlabel(), accuracy.get_xlabel()) == ("step", "epoch")
    np.testing.assert_allclose(accuracy.lines[1].get_ydata(), [0.599, 0.599])
    entries = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert entries == ["val/accuracy", "PCA (59.9 %)"]
    assert "80 %" in [label.get_text() for label in accuracy.get_yticklabels()]


def test_a_key_keeps_its_color_when_others_are_missing():
    rows = epoch_rows(3)
    panels = [Curve("a", ("none", "train/loss"))]
    (alone,) = plots.curves(rows, panels).axes[0].lines
    other, same = plots.curves([*rows, {"epoch": 1, "none": 1}], panels).axes[0].lines
    assert alone.get_color() == same.get_color() != other.get_color()


@pytest.mark.parametrize("logarithmic", [False, True])
def test_values_that_are_not_finite_are_gaps(logarithmic):
    values = [1.0, float("nan"), 0.5, float("inf"), -float("inf"), None, 0.0, 1e38]
    rows = [{"epoch": epoch, "loss": value} for epoch, value in enumerate(values)]
    lines = {"nan": float("nan"), "infinite": float("inf"), "floor": 0.2, "zero": 0.0}
    figure = plots.curves(rows, [Curve("loss", ("loss",), lines, logarithmic=logarithmic)])
    render(figure)
    gaps = np.isnan(figure.axes[0].lines[0].get_ydata())
    assert gaps.tolist() == [False, True, False, True, True, True, logarithmic, False]
    assert len(figure.axes[0].lines) == (2 if logarithmic else 3)
    assert figure.axes[0].get_yscale() == ("log" if logarithmic else "linear")


@pytest.mark.parametrize("values", [[1e-8, 1e4], [0.0041, 0.0044], [3.0, 3.0], [0.9, 0.02]])
def test_a_logarithmic_axis_has_a_few_plain_numbers(values):
    rows = [{"epoch": epoch, "loss": value} for epoch, value in enumerate(values)]
    figure = plots.curves(rows, [Curve("loss", ("loss",), logarithmic=True)])
    render(figure)
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    inside = [tick for tick in axes.yaxis.get_ticklocs() if low <= tick <= high]
    assert 2 <= len(inside) <= 12
    assert not any("$" in text for text in texts(figure))


def test_curves_with_nothing_to_draw_say_so():
    for rows in ([], [{"step": 1, "epoch": 1, "loss": float("nan")}], [{"loss": 1.0}]):
        figure = plots.curves(rows, [Curve("loss", ("loss",))])
        render(figure)
        assert texts(figure) == ["nothing to draw yet"]


def test_curves_of_one_epoch_and_of_many_steps():
    panels = [Curve("a", ("val/accuracy",)), Curve("b", ("train/loss",))]
    figure = plots.curves(epoch_rows(1), panels)
    render(figure)
    low, high = figure.axes[0].get_xlim()
    assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [1]
    rows = [{"step": 100 * n, "epoch": n / 500, "loss": 1 / (n + 1)} for n in range(20_000)]
    figure = plots.curves(rows, [Curve("a", ("loss",), x="step")])
    render(figure)
    assert "1,000,000" in texts(figure)


def every_figure(names: list[str]) -> dict:
    points, labels = cluster_points(40, len(names))
    images = random_images(len(names))
    rows = [{"epoch": n, **dict.fromkeys(names, n)} for n in range(3)]
    curve = Curve(names[0], tuple(names), {f"{name} line": 1.0 for name in names})
    return {
        "reconstructions": plots.reconstructions(images, images, names),
        "interpolation": plots.interpolation(images, names[0], names[-1], images[[0, -1]]),
        "embeddings": plots.embeddings([Embedding(points, names[0])], labels, names),
        "confusion": plots.confusion(labels, labels, names),
        "curves": plots.curves(rows, [curve]),
    }


@pytest.mark.parametrize("names", [ODD_NAMES, ["$"], [""]])
def test_odd_names_are_drawn_as_they_are(names):
    for kind, figure in every_figure(names).items():
        render(figure)
        found = " ".join(texts(figure))
        for name in {names[0]} & {"$x_1$ and $y$", "$"}:
            assert name in found, kind
        written = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
        assert not any(text.get_parse_math() for text in written), kind


def test_what_no_font_can_draw_stays_distinguishable():
    missing = "\U000f0000\U000f0001"  # private use: in no font
    figure = plots.confusion(np.array([0, 1]), np.array([0, 1]), list(missing))
    render(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["\\U000f0000", "\\U000f0001"]


def test_the_look_is_ours_whatever_the_user_has_set_and_the_user_keeps_it():
    names = ["cat", "dog"]
    plain = {kind: render(figure) for kind, figure in every_figure(names).items()}
    theirs = {
        "font.size": 30,
        "axes.facecolor": "black",
        "figure.facecolor": "black",
        "axes.grid": True,
        "text.color": "red",
        "image.interpolation": "bilinear",
    }
    with matplotlib.rc_context(theirs):
        before = matplotlib.rcParams.copy()
        figures = every_figure(names)
        assert dict.items(matplotlib.rcParams) == dict.items(before)
        for kind, figure in figures.items():
            np.testing.assert_array_equal(render(figure), plain[kind], err_msg=kind)


def test_files_and_sheets_are_the_same_whatever_the_user_has_set_for_saving():
    figures = list(every_figure(["cat", "dog"]).values())[:2]
    plain = [plots.saved(figure) for figure in (*figures, sheet.stack(figures))]
    theirs = {"savefig.dpi": 300, "savefig.bbox": "tight", "image.origin": "lower"}
    with matplotlib.rc_context({**theirs, "savefig.transparent": True, "savefig.pad_inches": 1}):
        assert [plots.saved(figure) for figure in (*figures, sheet.stack(figures))] == plain


def test_pyplot_is_never_loaded_and_nothing_is_printed():
    code = (
        "import sys, json, io, numpy as np; from common.display import plots\n"
        "labels = np.arange(4) % 2; images = np.zeros((2, 1, 8, 8)); names = ['a', 'b']\n"
        "figures = [plots.reconstructions(images, images, names),\n"
        "    plots.interpolation(images, 'a', 'b', images),\n"
        "    plots.embeddings([plots.Embedding(np.eye(4, 2), 'a')], labels, names, labels),\n"
        "    plots.confusion(labels, labels, names),\n"
        "    plots.curves([{'epoch': 1, 'loss': 1}], [plots.Curve('a', ('loss',))])]\n"
        "for figure in figures: figure.savefig(io.BytesIO())\n"
        "heavy = ('matplotlib.pyplot', 'torch', 'wandb')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    root = Path(__file__).parent.parent
    # an old matplotlib with a new pyparsing warns of deprecated names
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert json.loads(done.stdout) == []
