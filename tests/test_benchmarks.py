"""What benchmarks/ says of its measurements is what was measured; nothing here is timed."""

import functools
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train_ae
import train_joint
import train_supcon
from common.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import evaluation
import measure
import run_all
import scaling


def count(place: Path, turn: measure.Turn) -> None:
    while True:
        turn()
        with place.open("a") as file:
            file.write("x")


def fail(turn: measure.Turn) -> None:
    turn()
    raise ValueError("nothing to measure")


def test_contenders_do_as_many_units_as_they_are_told(tmp_path):
    places = [tmp_path / name for name in ("one", "two")]
    contenders = {place.name: functools.partial(count, place) for place in places}
    times = measure.alternate(contenders, rounds=3, units=4)
    for place in places:
        assert place.read_text() == "x" * 4 * (2 + 3)  # two turns of warm-up
        assert len(times[place.name].seconds) == len(times[place.name].cpu_seconds) == 3
        assert times[place.name].units == 4


def test_a_contender_that_fails_is_named_with_its_error():
    with pytest.raises(SystemExit, match=r"(?s)broken failed:.*nothing to measure"):
        measure.alternate({"broken": fail}, rounds=1)


def of(*seconds: float) -> measure.Times:
    return measure.Times(seconds=list(seconds))


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [("≥ 4", 5.0, True), ("≥ 8", 5.0, False), ("≤ 0.2", 0.2, True), ("≤ 0.1", 0.2, False)],
)
def test_the_goals_sign_says_what_the_ratio_is(goal, value, met):
    found = measure.row("a claim", of(1, 2, 3), of(5, 10, 15), goal)
    assert found["value"] == pytest.approx(value) and found["met"] is met
    assert ("**no**" in measure.table([found])) is not met


def test_the_ratio_is_taken_within_rounds():
    slow_in_the_middle = measure.row("a claim", of(1, 10, 1), of(2, 20, 2), "≥ 2", images=100)
    assert (slow_in_the_middle["value"], slow_in_the_middle["spread"]) == (2, 0)
    assert slow_in_the_middle["ours"].startswith("100 images/s")


def test_a_power_is_found_again():
    assert scaling.exponent([(n, 3 * n**1.5) for n in (2, 8, 64)]) == pytest.approx(1.5)


@pytest.mark.parametrize("script", [train_ae, train_joint, train_supcon])
def test_a_script_changes_its_turn_at_each_of_its_steps(script, tmp_path, monkeypatch):
    turns = []

    def turn() -> None:
        turns.append(len(turns))
        if len(turns) == 4:
            raise measure.Finished

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    schedule = script.optimizers.schedule
    monkeypatch.setattr(script.optimizers, "schedule", schedule)  # puts it back
    small = {"encoder": "cnn", "width": 4, "batch_size": 32, "limit_train": 96}
    with pytest.raises(measure.Finished):
        measure.script(turn, script, epochs=2, run_dir=str(tmp_path / "run"), **small)
    for number, handler in before.items():
        signal.signal(number, handler)
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows if "train/loss" in json.loads(row)]
    assert len(turns) == 4 and steps == [3]  # 3 steps an epoch; the fourth was not done


@pytest.mark.parametrize("name", ["ae", "joint", "supcon"])
def test_the_phases_of_a_run_are_told_apart(name, tmp_path):
    small = {"encoder": "cnn", "width": 4, "batch_size": 32, "limit_train": 200, "tsne_images": 50}
    if name == "ae":
        small |= {"classifier_epochs": 1, "classifier_views": 1, "hidden_dim": 8}
    started = time.perf_counter()
    epoch, second_stage, rest = evaluation.phases(name, run_dir=str(tmp_path / "run"), **small)
    assert (tmp_path / "run/summary.json").exists()
    assert epoch > 0 and rest > 0 and (second_stage > 0) == (name == "ae")
    assert epoch + second_stage + rest < time.perf_counter() - started


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_folder_is_trained_from_its_map_and_from_memory(in_memory, tmp_path, monkeypatch):
    def turn() -> None:
        turns.append(1)
        if len(turns) == 4:
            raise measure.Finished

    turns, thrown = [], []
    monkeypatch.setattr(scaling, "IMAGES", 300)
    monkeypatch.setattr(scaling, "STEPS_BETWEEN", 2)
    monkeypatch.setattr(scaling, "throw_out", lambda array: thrown.append(type(array)))
    for holder, name in (
        *((train_joint.datasets, "load_folder"), (train_joint.optimizers, "schedule")),
        (measure.session, "epoch_batches"),
    ):
        monkeypatch.setattr(holder, name, getattr(holder, name))  # puts it back
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(measure.Finished):
        scaling.train_from(scaling.make_folder(tmp_path), in_memory, turn)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert thrown == ([] if in_memory else [np.memmap])


def test_only_the_part_between_the_marks_is_written(tmp_path, monkeypatch):
    page = tmp_path / "benchmarks.md"
    monkeypatch.setattr(run_all, "PAGE", page)
    page.write_text(f"before\n{run_all.BEGIN}old\n{run_all.END}after\n")
    place = {"device": "a CPU", "cores": 2, "threads": 2, "load": 0.1, "python": "3"}
    place |= {"versions": {"torch": "2"}, "commit": "abc"}
    rows = [measure.claim("one", 1.0, "≥ 1", "1 s"), measure.claim("two", 1.0, "≤ 0.5", "1 s")]
    found = [{"program": "p", "surroundings": place, "rows": rows}]
    assert "1 of 2 goals are met" in run_all.page_of(found, with_goals=True)
    run_all.write(run_all.page_of(found, with_goals=False))
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{run_all.BEGIN}") and text.endswith(f"{run_all.END}after\n")
    assert "| two | 1 s | – | 1 | lower |" in text and "old" not in text
    assert "goal" not in text
    page.write_text("no marks")
    with pytest.raises(UserError, match="lacks the lines"):
        run_all.write("text")


def test_the_share_of_evaluation_is_extrapolated_by_the_power_of_each_part(monkeypatch):
    def evaluated(count: int) -> dict[str, float]:
        return {"one": 1e-5 * count, "maps": 10.0, "pairs": 1e-10 * count**2}

    monkeypatch.setattr(scaling, "evaluated", evaluated)
    times = {}
    one, maps, pairs, *shares = scaling.evaluation(1000.0, times, threads=1)
    assert one["value"] == pytest.approx(1) and one["met"]
    assert maps["value"] == pytest.approx(0, abs=1e-9)
    assert pairs["value"] == pytest.approx(2) and not pairs["met"]
    for count, share in zip((10_000, 100_000, 200_000, 1_000_000), shares, strict=True):
        seconds, training = sum(evaluated(count).values()), 20 * 0.9 * count / 1000
        assert share["value"] == pytest.approx(seconds / (seconds + training))
        assert ("extrapolated" in share["ours"]) == (count == 1_000_000)
    assert times["evaluation, one, 100000"].seconds == [1.0]
