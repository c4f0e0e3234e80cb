"""The picture of accuracy over training time."""

import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.run.runs import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import curves

ROWS = [
    {"step": 1, "epoch": 0.5, "train/loss": 2.0},
    {"step": 2, "epoch": 1, "time/epoch_seconds": 30.0, "time/images_per_second": 1.0,
     "memory/peak_gib": 1.0},
    {"step": 4, "epoch": 2, "time/epoch_seconds": 90.0, "time/images_per_second": 1.0,
     "memory/peak_gib": 1.0, "val/knn_accuracy": 0.5},
    {"step": 4, "epoch": 2, "val/knn_accuracy": 0.6, "test/accuracy": 0.5},
]  # fmt: skip


def make_run(**facts: object) -> Run:
    known = {"fingerprint": "f", "train_images": 10, "device": "a CPU", "threads": 2}
    settings = {"encoder": "cnn", "width": 8, "blocks": 0, "optimizer": "sgd", "epochs": 2}
    known |= {"parameters": 1} | facts
    return Run(Path("run"), "joint", settings, known, {}, ROWS, [])


def test_points_are_those_of_measured_epochs():
    assert curves.points(make_run()) == ([2.0], [50.0])


def test_a_run_elsewhere_is_refused(monkeypatch):
    runs = {"a": make_run(), "b": make_run(device="another CPU")}
    monkeypatch.setattr(curves, "read_run", runs.get)
    with pytest.raises(UserError, match="these runs differ in device: a CPU, another CPU"):
        curves.main(["a", "b"], Path("never.png"))


def test_runs_of_one_method_differ_in_their_dashes(monkeypatch, tmp_path):
    figure = curves.draw([make_run(), make_run()])
    solid, dashed = figure.axes[0].lines
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert solid.get_color() == dashed.get_color()
    assert solid.get_label() == "joint: cnn, width 8, sgd"
    monkeypatch.setattr(curves, "read_run", lambda _: make_run())
    curves.main([tmp_path], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
