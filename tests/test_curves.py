"""The picture of accuracy over training time."""

import json
import sys
from pathlib import Path

import pytest

import train_joint
from common.errors import UserError
from common.run.runs import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import collect_results
import curves

ROWS = [
    {"step": 1, "epoch": 0.5, "train/loss": 2.0},
    {"step": 2, "epoch": 1, "time/epoch_seconds": 30.0},
    {"step": 4, "epoch": 2, "time/epoch_seconds": 90.0, "val/knn_cosine_accuracy": 0.5},
    {"step": 4, "epoch": 2, "val/knn_cosine_accuracy": 0.6, "test/accuracy": 0.5},
]


def kept(seed: int = 0, epochs: int = 2, data: str = "here", **facts: object) -> dict:
    """A record of a run of one minute an epoch, as results.jsonl keeps it."""
    settings = vars(train_joint.Config(encoder="cnn", width=8, epochs=epochs, seed=seed))
    known = {"fingerprint": "f", "train_images": 10, "device": "a CPU", "threads": 2}
    times = {"seconds": 60.0 * epochs, "curve": [[1, 0.3], [2, 0.5]]}
    return {"data": data, "method": "joint", "settings": settings, "facts": known | facts} | times


def test_a_curve_has_the_measured_epochs():
    run = Run(Path("run"), "joint", {}, {}, {}, ROWS, [])
    assert collect_results.curve_of(run) == [(2, 0.5)]
    assert curves.points(kept()) == ([1.0, 2.0], [30.0, 50.0])


def test_a_run_elsewhere_is_refused(monkeypatch):
    runs = {"a": kept(), "b": kept(device="another CPU")}
    monkeypatch.setattr(collect_results, "read_run", runs.get)
    with pytest.raises(UserError, match="these runs differ in device: a CPU, another CPU"):
        curves.main(["a", "b"], "here", Path("never.png"))


def test_runs_of_one_method_differ_in_their_dashes():
    figure = curves.draw([kept(), kept()])
    solid, dashed = figure.axes[0].lines
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert solid.get_color() == dashed.get_color()
    assert solid.get_label() == "joint: cnn, width 8, sgd"


def test_kept_runs_of_one_hardware_are_drawn_a_seed_a_setting(monkeypatch, tmp_path):
    runs = [
        *(kept(), kept(seed=1), kept(epochs=3)),
        *(kept(epochs=4, device="another CPU"), kept(epochs=5) | {"curve": []}),
    ]
    runs += [kept(data="elsewhere", epochs=n) for n in range(6, 10)]
    monkeypatch.setattr(collect_results, "KEPT", tmp_path / "results.jsonl")
    lines = "".join(json.dumps(run) + "\n" for run in runs)
    collect_results.KEPT.write_text(lines)
    assert curves.kept_runs("here") == [kept(), kept(epochs=3)]
    curves.main([], "here", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no run of nothing"):
        curves.main([], "nothing", tmp_path / "never.png")
