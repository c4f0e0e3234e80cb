"""W&B's own variables and settings files count, and what it cannot hold stops nothing."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
from test_tracking import nobody, open_run, read_rows  # noqa: F401

from common.run import runs, tracking, wandb_backend

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # W&B leaves files open


def started(mode="offline", **settings):
    """A run with these flags, just started; W&B's own object of it."""
    import wandb

    settings = {"project": None, "group": None, "tags": "", **settings}
    tracker = open_run("run", mode=mode, settings=settings)
    return tracker, wandb.run


def test_the_environment_counts_where_no_flag_is_given(monkeypatch):
    names = {"PROJECT": "mine", "RUN_GROUP": "ours", "JOB_TYPE": "job", "NAME": "a run"}
    names |= {"TAGS": "one, two,,one", "ENTITY": "team", "NOTES": "a note"}
    for name, value in names.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker, run = started()
    assert (run.project, run.group, run.job_type, run.name) == ("mine", "ours", "job", "a run")
    assert set(run.tags) == {"digits", "one", "two"}
    assert (run.entity, run.notes) == ("team", "a note")
    tracker.stop(0)


def test_a_resumed_run_stays_in_its_project_and_its_team(monkeypatch):
    for name, value in {"PROJECT": "mine", "ENTITY": "team"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker, run = started()
    tracker.stop(0)
    for name, value in {"PROJECT": "other", "ENTITY": "others"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = open_run("run", mode="offline", keep_rows=0)
    import wandb

    assert (wandb.run.project, wandb.run.entity, wandb.run.id) == ("mine", "team", run.id)
    tracker.stop(0)


def test_a_flag_goes_before_the_environment(monkeypatch):
    for name in ("PROJECT", "RUN_GROUP", "TAGS"):
        monkeypatch.setenv(f"WANDB_{name}", "other")
    tracker, run = started(project="test", group="digits", tags="digits")
    assert (run.project, run.group, run.tags) == ("test", "digits", ("digits",))
    tracker.stop(0)


def test_a_settings_file_in_the_working_folder_counts():
    Path("wandb").mkdir()
    Path("wandb/settings").write_text("[default]\nproject = filed\nentity = team\n")
    tracker, run = started()
    assert (run.project, run.entity) == ("filed", "team")
    tracker.stop(0)


def test_wandb_dir_is_where_its_files_go(monkeypatch, tmp_path, capfd):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    tracker, _ = started()
    lines = tracker.finish({})
    (part,) = Path("elsewhere/wandb").glob("offline-run-*")
    assert not Path("run/wandb").exists()
    assert f"wandb leet {tmp_path}/elsewhere/wandb/{part.name}" in lines[1]


@pytest.mark.parametrize("how", ["disabled", "WANDB_DISABLED"])
def test_wandb_that_is_turned_off_stays_off(monkeypatch, how):
    if how == "disabled":
        Path("wandb").mkdir()
        Path("wandb/settings").write_text("[default]\nmode = disabled\n")
    else:
        monkeypatch.setenv(how, "true")
    open_run("run", mode="auto").finish({"x": 1})
    assert runs.finished("run") == {"x": 1} and not Path("run/wandb").exists()
    assert "WANDB_SERVICE" not in os.environ


@pytest.mark.parametrize("how", ["offline", "dryrun"])
def test_wandb_that_is_set_to_offline_says_nothing_of_a_login(monkeypatch, capfd, how):
    if how == "offline":
        Path("wandb").mkdir()
        Path("wandb/settings").write_text("[default]\nmode = offline\n")
    else:
        monkeypatch.setenv("WANDB_MODE", how)
    tracker = open_run("run", mode="auto")
    assert "logged in" not in capfd.readouterr().out
    assert len(list(Path("run/wandb").glob("offline-run-*"))) == 1
    tracker.stop(0)


def test_settings_that_are_broken_cost_no_training(capfd):
    Path("wandb").mkdir()
    Path("wandb/settings").write_text("[default\nmode = ][")
    open_run("run", mode="auto").finish({"x": 1})
    assert runs.finished("run") == {"x": 1}


@pytest.mark.parametrize(
    ("recorded", "used", "same"),
    [
        ("1e-3", 0.001, True),
        ("1", 1.0, True),
        (1, 1.0, True),
        ("1E2", 100, True),
        ("None", None, True),
        (123, "123", True),
        ("True", True, True),
        (True, True, True),
        ([1, "2"], (1, 2), True),
        ("~/x", f"{Path.home()}/x", True),
        ("1e-3", 0.01, False),
        ("1", True, False),
        ("nan", 0.1, False),
        (None, 0.1, False),
        ("adam", "sgd", False),
        ([1], (1, 2), False),
    ],
)
def test_a_sweep_compares_numbers_as_numbers(recorded, used, same):
    used = str(Path.home() / "x") if recorded == "~/x" else used
    assert wandb_backend.is_same(recorded, used) == same


def test_numbers_that_are_none_and_odd_ids_stop_nothing(capfd, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "über a+b")  # W&B takes it for a run, not for an artifact
    tracker = open_run("run", mode="offline")
    found = {"a/x": math.inf, "a/y": -math.inf, "a/z": math.nan, "a/n": 1.5}
    tracker.log(found, step=1, epoch=1)
    Path("run/encoder.json").write_text("{}")
    tracker.artifact("m", "model", [Path("run/encoder.json")], found, ["best"])
    tracker.finish(found)
    assert "W&B:" not in capfd.readouterr().out.replace("W&B:  ", "")
    assert runs.finished("run")["a/x"] == math.inf and len(read_rows("run")) == 1
    (part,) = Path("run/wandb").glob("offline-run-*")
    assert b"model" in next(part.glob("*.wandb")).read_bytes()


def test_what_wandb_cannot_build_is_said_and_stops_nothing(capfd):
    tracker = open_run("run", mode="offline")
    tracker.table("tables/odd", ["a", "a"], [[1], [2, 3]], step=1)
    tracker.artifact("m", "model", [Path("run/not-there")], {}, ["best"])
    tracker.finish({"x": 1})
    assert capfd.readouterr().out.count("W&B: ") == 1 and runs.finished("run") == {"x": 1}


def tables_of(run_dir) -> dict[str, dict]:
    paths = Path(run_dir).glob("wandb/offline-run-*/files/media/table/**/*.json")
    return {path.name.split("_")[0]: json.loads(path.read_text()) for path in paths}


def test_rows_that_a_table_has_no_room_for_are_said(monkeypatch, capfd):
    import wandb

    monkeypatch.setattr(wandb.Table, "MAX_ROWS", 5)
    tracker = open_run("run", mode="offline")
    tracker.table("tables/some", ["n"], [[n] for n in range(7)], step=0)
    said = capfd.readouterr().out
    assert "tables/some shows the first 5 of 7 rows; a table holds no more" in said
    assert len(tables_of("run")["some"]["data"]) == 5
    tracker.stop(0)


def test_a_confusion_matrix_of_too_many_classes_becomes_a_table_of_all(capfd):
    names = [f"c{k}" for k in range(101)]
    labels = [*range(100), 0, 0]  # none of the last class
    tracker = open_run("run", mode="offline")
    tracker.confusion(labels, [*range(100), 5, 5], names, step=0)
    assert "no room for 101 classes" in capfd.readouterr().out
    table = tables_of("run")["confusions"]
    assert [row[0] for row in table["data"]] == names
    assert table["data"][0] == ["c0", 3, pytest.approx(1 / 3), "c5", 2]
    tracker.stop(0)


def test_what_each_class_is_mistaken_for():
    guesses = [Counter({0: 3, 1: 1}), Counter(), Counter({2: 2})]
    assert tracking.confused(["a", "b", "c"], guesses) == [
        ["a", 4, 0.75, "b", 1],
        ["b", 0, None, None, 0],
        ["c", 2, 1.0, None, 0],
    ]


@pytest.mark.parametrize("odd", ["a/b", "a:b", " a", "what?", "it's"])
def test_an_odd_id_is_said_and_another_drawn(monkeypatch, capfd, odd):
    monkeypatch.setenv("WANDB_RUN_ID", odd)
    assert len(runs.choose_run_dir(None, None, "ae", "digits").parts) == 2
    tracker = open_run("run", mode="offline")
    assert "cannot be an id of W&B" in capfd.readouterr().out
    (part,) = Path("run/wandb").glob("offline-run-*")
    assert len(part.name.rpartition("-")[2]) == 8
    tracker.stop(0)


def test_two_runs_of_one_process_have_two_ids(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "only-one")
    ids = []
    for name in ("one", "two"):
        open_run(name).stop(0)
        ids.append(json.loads(Path(name, "config.json").read_text())["facts"]["wandb_id"])
    assert ids[0] == "only-one" != ids[1]


@pytest.fixture
def restored_environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
@pytest.mark.usefixtures("restored_environment")
def test_a_home_that_cannot_be_written_costs_no_run(monkeypatch, capfd, home):
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        del os.environ[name]
    if home is None:
        monkeypatch.setattr("os.getuid", lambda: 54321)
    else:
        os.environ["HOME"] = home
    tracker = open_run("run", mode="offline")
    tracker.log({"x": 1}, step=1, epoch=0)
    tracker.finish({"x": 1})
    assert "W&B: " not in capfd.readouterr().out and not Path("~").exists()
    (log,) = Path("run/wandb").glob("offline-run-*/*.wandb")
    assert b"common/losses.py" in log.read_bytes()  # the code is kept, beside the run
