"""The figures of a comparison hold the numbers that went in, and nothing is cut off."""

import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from common.display import plots, sheet

LONG = "n02085620-Chihuahua_long_haired"


def inside(figure: Figure) -> None:
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    assert box.x0 >= -0.01 and box.y0 >= -0.01, box
    assert box.x1 <= width + 0.01 and box.y1 <= height + 0.01, box


def texts(figure: Figure) -> list[str]:
    found = figure.findobj(matplotlib.text.Text)
    return [text.get_text() for text in found if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_accuracies_of_classes_few_and_many(classes):
    names = [f"{LONG}{n}" if n % 2 else str(n) for n in range(classes)]
    table = np.linspace(0.5, 1, classes)
    figure = sheet.classes({"joint": table, LONG * 2: table[::-1]}, names)
    inside(figure)
    assert "50.0" in texts(figure)
    cells = [t for t in texts(figure) if t.replace(".", "").isdigit() and "." in t]
    assert len(cells) == 2 * min(classes, sheet.MOST_CLASSES)


@pytest.mark.parametrize("spaces", [1, 3, 5])
def test_mistakes_name_true_and_predicted_class(spaces):
    confusions = {f"space {n} {LONG}": [(0, 1, 0.125), (1, 0, 0.02)] for n in range(spaces)}
    confusions[f"space 0 {LONG}"] = []
    figure = sheet.mistakes(confusions, ["cat", LONG])
    inside(figure)
    found = texts(figure)
    assert "no mistakes" in found
    assert (" 12.5" in found) == (spaces > 1)
    titles = [part._suptitle.get_window_extent() for part in figure.subfigs[: min(3, spaces)]]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(titles))


def test_lines_show_all_spaces_and_gray_is_for_baselines():
    line = {10.0: (0.5, 0.01), 1000.0: (0.9, 0.0)}
    panels = {
        ("few labels", "labels per class"): {"joint": line, "pixels": line},
        ("noise", "std"): {"joint": {0.0: (0.9, 0), 0.1: (0.8, 0)}},
        ("empty", "labels per class"): {"joint": {}},
    }
    figure = sheet.lines(panels, ["pixels"])
    inside(figure)
    first, second, _ = figure.axes
    joint, pixels = (next(iter(c.lines)) for c in first.containers)
    assert joint.get_ydata().tolist() == [50, 90]
    assert joint.get_xdata().tolist() == [0, 1]  # equal distances
    assert [t.get_text() for t in first.get_xticklabels()] == ["10", "1000"]
    assert pixels.get_color() == plots.GRAY != joint.get_color()
    assert [t.get_text() for t in second.get_xticklabels()] == ["0", "0.1"]


def test_a_stack_keeps_every_pixel():
    figures = []
    for width, color in ((2.0, "#ff0000"), (1.0, "#0000ff")):
        figures.append(Figure(figsize=(width, 0.5), dpi=plots.DPI, facecolor=color))
    figure = sheet.stack(figures)
    pixels = sheet._pixels(figure)
    assert pixels.shape == (150 + 2 * sheet.GAP, 300, 4)
    assert pixels[10, 10].tolist() == [255, 0, 0, 255]  # the first is at the top
    middle = 75 + sheet.GAP + 10
    assert pixels[middle, 150].tolist() == [0, 0, 255, 255]
    assert pixels[middle, 10].tolist() == [255, 255, 255, 255]


def test_a_color_for_every_class():
    for count in (2, 10, 100):
        colors = sheet.class_colors(count)
        assert len(set(colors)) == count
