"""Is the run folder whole, with and without W&B, and does nothing stop a training?"""

import contextlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import psutil
import pytest
import torch

from common import console
from common.display import plots
from common.errors import UserError
from common.files import lock
from common.run import runs, tracking, wandb_backend

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """No login, no W&B variables, an empty home, an empty working folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.chdir(tmp_path)
    yield
    if sys.modules.get("wandb"):  # forget the settings that were read under this environment
        sys.modules["wandb"].teardown()


def open_run(run_dir, mode="disabled", keep_rows=None, is_main=True, settings=None):
    return tracking.open_tracker(
        Path(run_dir),
        settings=settings or {"epochs": 2, "learning_rate": 1e-3, "limit_train": None},
        facts={"device": "cpu", "versions": {"torch": "2"}},
        labels={"name": "a name", "group": "digits", "job_type": "ae", "tags": ["digits"]},
        mode=mode,
        project="test",
        keep_rows=keep_rows,
        is_main=is_main,
    )


def read_rows(run_dir):
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]


def small_picture() -> bytes:
    figure = matplotlib.figure.Figure(figsize=(1, 1), dpi=50)
    figure.subplots().plot([0, 1])
    return plots.saved(figure)


# --- the folder ---------------------------------------------------------------------------------


def without_facts(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({"settings": config["settings"]}))


def a_file_in_the_place_of(name):
    def change(run):
        (run / name).rmdir()
        (run / name).write_text("mine")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_facts, r"run/config\.json holds no facts of a run"),
        (lambda run: (run / "config.json").write_text("[1]"), "holds no facts of a run"),
        (lambda run: (run / "metrics.jsonl").write_text("x\n"), r"damaged: its row 1 is none of a"),
        (lambda run: (run / "metrics.jsonl").write_text("[]\n"), "damaged: its row 1 is none of a"),
        (a_file_in_the_place_of("figures"), "cannot make the folder run/figures: File exists"),
        (a_file_in_the_place_of("checkpoints"), "cannot make the folder run/checkpoints: File ex"),
    ],
)
def test_a_damaged_run_is_one_line_and_stays_as_it_is(change, message):
    with pytest.raises(KeyboardInterrupt), open_run("run") as tracker:
        tracker.log({"train/loss": 1.0}, 1, 1)
        raise KeyboardInterrupt
    change(Path("run"))
    before = {p: p.is_file() and p.read_bytes() for p in sorted(Path("run").rglob("*"))}
    with pytest.raises(UserError, match=message) as error:
        open_run("run", keep_rows=1)
    assert "\n" not in error.value.message
    assert {p: p.is_file() and p.read_bytes() for p in sorted(Path("run").rglob("*"))} == before


def test_a_run_without_wandb_is_whole():
    tracker = open_run("run")
    config = json.loads(Path("run/config.json").read_text())
    assert config["settings"] == {"epochs": 2, "learning_rate": 1e-3, "limit_train": None}
    assert config["facts"]["device"] == "cpu" and config["facts"]["wandb_id"]
    assert read_rows("run") == [] and Path("run/checkpoints").is_dir()
    tracker.log({"train/loss": torch.tensor(0.5), "train/bad": float("nan")}, step=3, epoch=0)
    assert read_rows("run")[0]["train/loss"] == 0.5  # on the disk at once
    tracker.log({"val/accuracy": np.float32(0.25), "count": np.int64(7)}, step=3, epoch=1)
    first, second = read_rows("run")
    assert (first["step"], first["epoch"], str(first["train/bad"])) == (3, 0, "nan")
    assert second == {"step": 3, "epoch": 1, "val/accuracy": 0.25, "count": 7}
    assert tracker.rows == 2
    tracker.figure("curves", small_picture(), "a caption", step=3)
    assert Path("run/figures/curves.png").read_bytes()[:4] == b"\x89PNG"
    tracker.table("test/wrong", ["image"], [[np.zeros((3, 4, 4), np.uint8)]], step=3)
    tracker.confusion([0, 1], [1, 1], ["a", "b"], step=3)
    tracker.artifact("encoder", "model", [Path("run/config.json")], {}, ["best"])
    tracker.best({"epoch": 1})
    assert runs.finished("run") is None
    assert tracker.finish({"test/accuracy": torch.tensor(0.75)}) == ["figures:      run/figures"]
    assert runs.finished("run") == {"test/accuracy": 0.75}
    assert {path.name for path in Path("run").iterdir()} == {
        *(".lock", "config.json", "metrics.jsonl", "summary.json", "figures", "checkpoints")
    }
    with pytest.raises(UserError, match="finished run"):
        open_run("run")


def test_steps_do_not_go_down():
    tracker = open_run("run")
    tracker.log({"x": 1}, step=5, epoch=0)
    with pytest.raises(ValueError, match="step 4 comes after step 5"):
        tracker.log({"x": 1}, step=4, epoch=0)
    with pytest.raises(ValueError, match="step 4 comes after step 5"):
        tracker.table("t", ["a"], [[1]], step=4)
    assert len(read_rows("run")) == tracker.rows == 1
    tracker.stop(1)
    resumed = open_run("run", keep_rows=1)
    with pytest.raises(ValueError, match="step 4 comes after step 5"):
        resumed.log({"x": 1}, step=4, epoch=0)


def test_resume_cuts_the_rows_and_keeps_the_first_settings(capsys):
    tracker = open_run("run")
    for step in range(4):
        tracker.log({"x": step}, step=step, epoch=0)
    tracker.stop(143)
    before = json.loads(Path("run/config.json").read_text())
    tracker = open_run("run", keep_rows=2, settings={"epochs": 99})
    assert tracker.rows == 2 and [row["x"] for row in read_rows("run")] == [0, 1]
    tracker.log({"x": 20}, step=2, epoch=0)
    tracker.stop(143)
    assert [row["x"] for row in read_rows("run")] == [0, 1, 20] and capsys.readouterr().out == ""
    after = json.loads(Path("run/config.json").read_text())
    assert after["settings"] == before["settings"] and after["facts"] == before["facts"]
    assert after["resumed"] == [{"rows": 2, "device": "cpu", "versions": {"torch": "2"}}]

    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "epo')  # killed in the middle of a row
    assert open_run("run", keep_rows=9).rows == 3  # rows that the disk lost are only mentioned
    assert "only 3 of the 9 rows" in capsys.readouterr().out
    start_over = open_run("run")
    assert start_over.rows == 0 and read_rows("run") == []
    assert json.loads(Path("run/config.json").read_text())["facts"] != before["facts"]


def test_a_run_folder_has_one_owner():
    tracker = open_run("run")
    with pytest.raises(UserError, match="run is in use by another process"):
        open_run("run", keep_rows=0)
    tracker.finish({})
    with lock(Path("run/.lock"), busy="still locked"):
        pass


# --- the other processes, the bar ---------------------------------------------------------------


def test_null_tracker_offers_all_that_tracker_does():
    def methods(kind):
        functions = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for name, f in functions
            if not name.startswith("_")
        }

    assert methods(tracking.NullTracker) == methods(tracking.Tracker)
    tracker = open_run("run", is_main=False)
    tracker.log({"x": 1}, step=1, epoch=0)
    tracker.figure("a", b"", "", step=0)
    assert tracker.finish({}) == [] and tracker.rows == 0 and not Path("run").exists()


def test_bar_is_silent_without_a_terminal(capfd, monkeypatch):
    bar = console.progress(3, "training", is_main=True)
    bar.update(1)
    bar.set_postfix_str("loss 1")
    console.say("a line")
    console.say("not this one", is_main=False)
    bar.close()
    assert capfd.readouterr() == ("a line\n", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.progress(3, "training", is_main=False):
        pass
    assert capfd.readouterr() == ("", "")
    with console.progress(3, "training", is_main=True) as bar:
        bar.update(3)
    assert "training" in capfd.readouterr().err


# --- W&B ----------------------------------------------------------------------------------------


def test_disabled_and_import_leave_wandb_alone():
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from common.run import tracking
tracker = tracking.open_tracker(
    "run", settings={{}}, facts={{}}, labels={{}}, mode="disabled", project="", keep_rows=None,
    is_main=True,
)
tracker.log({{"x": 1}}, step=0, epoch=0)
tracker.finish({{"x": 1}})
assert not {{"wandb", "torch", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert runs.finished("run") == {"x": 1}


def test_wandb_missing_is_said_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    open_run("run", mode="auto").finish({"x": 1})
    assert capsys.readouterr().out.count("W&B") == 1 and runs.finished("run") == {"x": 1}
    with pytest.raises(UserError, match="wandb"):
        open_run("other", mode="online")


def test_mode_is_checked(monkeypatch):
    with pytest.raises(UserError, match=r"'sometimes'.*use auto, online"):
        open_run("run", mode="sometimes")
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.raises(UserError, match="'bogus'"):
        open_run("run", mode="auto")
    open_run("run", mode="disabled").stop(0)  # the flag wins


def test_without_a_login_online_and_sweeps_are_refused(monkeypatch):
    with pytest.raises(UserError, match="no login"):
        open_run("run", mode="online")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    with pytest.raises(UserError, match="no login"):
        open_run("run", mode="auto")
    assert runs.choose_run_dir("run", None, "ae", "digits") == Path("run")  # still free


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # W&B leaves it open
def test_a_sweep_that_records_other_values_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "sweep.yaml")
    Path("sweep.yaml").write_text("epochs: {value: 2}\nlimit_train: {value: 'None'}\n")
    open_run("good", mode="offline").stop(0)
    Path("sweep.yaml").write_text("learning_rate: {value: 0.1}\n")
    with pytest.raises(UserError, match=r"learning_rate: W&B records 0.1, the script used 0.001"):
        open_run("bad", mode="offline")
    (refused,) = Path("bad/wandb").glob("offline-*")
    assert inspect_log(refused)["state"] == "failed"


def test_offline_run_without_login(capfd, monkeypatch):
    import wandb

    environment = os.environ | wandb_backend.ENVIRONMENT
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("W&B asked"))
    tracker = open_run("run", mode="auto")
    assert dict(os.environ) == environment
    assert wandb.run.offline and wandb.run.config["learning_rate"] == 1e-3
    (folder,) = Path("run/wandb").glob("offline-run-*")
    tracker.log({"train/loss": 1.0, "val/accuracy": 0.5}, step=1, epoch=0)
    tracker.figure("curves", small_picture(), "a caption", step=1)
    images = [np.full((channels, 4, 5), 9, np.uint8) for channels in (1, 3)]
    shown = [tracking._cell(image).image for image in images]
    assert [(image.mode, image.size) for image in shown] == [("L", (5, 4)), ("RGB", (5, 4))]
    rows = [[image, np.int64(1), torch.tensor(0.5)] for image in images]
    tracker.table("test/wrong", ["image", "label", "p"], rows, step=1)
    tracker.confusion(np.array([0, 1]), torch.tensor([1, 1]), ["a", "b"], step=1)
    Path("run/encoder.safetensors").write_bytes(b"x" * 1000)
    tracker.artifact("the encoder/digits", "model", [Path("run/encoder.safetensors")], {}, ["best"])
    tracker.best({"epoch": 0})
    assert not Path("run/summary.json").exists()
    monkeypatch.setattr(wandb.run, "_finish", spy := Spy(wandb.run._finish))
    lines = tracker.finish({"test/accuracy": 0.75, "val/accuracy": 0.625})
    assert spy.seen == [False]  # summary.json comes after W&B's end
    assert lines == [
        "figures:      run/figures",
        f"look at it:   wandb leet {folder}",
        "send to W&B:  wandb sync run/wandb/offline-run-*",
    ]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert any(name.startswith("files/media/images/figures/curves_1_") for name in files)
    for name in ("test/wrong", "tables/confusion_matrix_table", "tables/class_accuracy_table"):
        assert any(file.startswith(f"files/media/table/{name}_1_") for file in files), name
    copies = [path for path in Path("home").rglob("*") if path.is_file()]
    assert all(path.stat().st_size != 1000 for path in copies)
    summary = inspect_log(folder)["summary"]
    assert summary["test/accuracy"] == 0.75 and summary["best/epoch"] == 0
    assert summary["train/loss"] == 1.0  # the last value, under its own name
    assert summary["val/accuracy"] == 0.625  # the final value, not that of the last row
    spoken = capfd.readouterr()
    assert spoken.out.splitlines() == [
        "W&B: logging to disk, since nobody is logged in (wandb login)"
    ]
    assert spoken.err == ""


def test_resumed_offline_runs_keep_one_id(capfd):
    import wandb

    try:
        tracker = open_run("run", mode="offline")
        tracker.log({"x": 1}, step=1, epoch=0)
        raise KeyError
    except KeyError:
        del tracker  # as if main() had raised: the lock goes, W&B's run is still open
    other = open_run("other", mode="offline")
    assert len(list(Path("other/wandb").glob("offline-*"))) == 1
    (broken,) = Path("run/wandb").glob("offline-*")
    assert inspect_log(broken)["state"] == "failed"
    other.stop(143)
    tracker = open_run("run", mode="offline", keep_rows=1)
    wandb_id = json.loads(Path("run/config.json").read_text())["facts"]["wandb_id"]
    assert wandb.run.id == wandb_id
    monkey_broken = Spy(None, error=ConnectionResetError("W&B's process died"))
    wandb.run.log = monkey_broken
    tracker.log({"x": 2}, step=2, epoch=0)
    tracker.log({"x": 3}, step=3, epoch=0)
    tracker.finish({"x": 3})
    assert capfd.readouterr().out == "W&B: W&B's process died\n"  # once
    assert len(read_rows("run")) == 3 and runs.finished("run") == {"x": 3}
    parts = sorted(Path("run/wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(part.name.endswith(wandb_id) for part in parts)


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (ValueError("no such image"), 1, "no such image"),
        (ValueError(), 1, "ValueError"),
        (UserError("the loss is nan"), 1, "the loss is nan"),
        (KeyboardInterrupt(), 1, None),  # a stop on demand is no failure to tell of
        (SystemExit(143), 143, None),
    ],
)
def test_an_error_that_leaves_the_run_is_told(monkeypatch, error, code, reason):
    import wandb

    alerts, codes = [], []
    with pytest.raises(type(error)), open_run("run", mode="offline") as tracker:
        monkeypatch.setattr(wandb.run, "alert", lambda *words, **named: alerts.append(words))
        finish = wandb.run.finish
        monkeypatch.setattr(wandb.run, "finish", lambda code: (codes.append(code), finish(code)))
        tracker.log({"x": 1}, step=1, epoch=0)
        raise error
    assert alerts == ([("a name failed", reason)] if reason else [])
    assert codes == [code] and wandb.run is None
    assert runs.finished("run") is None
    with lock(Path("run/.lock"), busy="it is still locked"):
        pass


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # W&B leaves it open
def test_a_run_that_gives_up_its_upload_leaves_no_process_and_all_rows():
    tracker = open_run("run", mode="offline")
    for step in (1, 2):  # W&B writes a row when the next one begins, or at the end
        tracker.log({"x": step}, step=step, epoch=0)
    (core,) = (c for c in psutil.Process().children() if c.name() == "wandb-core")
    time.sleep(2)  # rows reach the disk every second
    wandb_backend._abandon()
    core.wait(5)  # TimeoutExpired if it still runs
    tracker.stop(143)
    (folder,) = Path("run/wandb").glob("offline-run-*")
    assert inspect_log(folder)["summary"]["x"] == 1


def test_the_code_of_the_project_is_kept():
    open_run("run", mode="offline").finish({})
    (log,) = Path("run/wandb").glob("offline-run-*/*.wandb")
    recorded = log.read_bytes()
    for name in (b"train_supcon.py", b"common/losses.py"):
        assert name in recorded, name
    assert b"tests/test_losses.py" not in recorded


class Spy:
    """Calls through, or raises; notes whether summary.json was there."""

    def __init__(self, function, error=None):
        self.function, self.error, self.seen = function, error, []

    def __call__(self, *values, **named):
        self.seen.append(Path("run/summary.json").exists())
        if self.error is not None:
            raise self.error
        return self.function(*values, **named)


def inspect_log(folder):
    """What W&B's own reader finds in an offline run."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(folder)]
    environment = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_table_has_the_types_that_wandb_finds_in_all_its_cells():
    import wandb

    image = wandb.Image(np.zeros((4, 4), np.uint8))
    rows = [
        [image, "a", 1, None],
        [image, "b", 2.5, "x"],
        [image, None, 3, None],
        [None, "c", 4, ""],
    ]
    table = tracking._table(wandb, "key", ["image", "name", "number", "text"], rows)
    checked = wandb.Table(["image", "name", "number", "text"], rows)
    assert table.data == checked.data
    assert table._column_types.to_json() == checked._column_types.to_json()


@pytest.mark.parametrize(
    ("offline", "parts", "starting_step", "expected"),
    [
        (False, 2, 21, [30]),  # killed, it took its last step with it
        (False, 2, 0, [10, 20, 30]),  # begun offline
        (True, 2, 0, []),  # all is in the files of the first part
        (True, 1, 0, [10, 20, 30]),  # there is none: W&B was disabled, or the training is another's
    ],
)
def test_a_resumed_run_sends_the_rows_that_wandb_lacks(
    tmp_path, offline, parts, starting_step, expected
):
    sent = []
    for part in range(parts):
        (tmp_path / f"wandb/offline-run-2026010{part}_000000-abc/files").mkdir(parents=True)
    run = SimpleNamespace(
        **{"offline": offline, "starting_step": starting_step, "id": "abc"},
        dir=str(tmp_path / "wandb/offline-run-20260100_000000-abc/files"),
        log=lambda row, step: sent.append((step, row)),
    )
    rows = [{"step": s, "epoch": s / 10, "train/loss": 1 / s} for s in (10, 20, 30)]
    lines = [(json.dumps(row) + "\n").encode() for row in rows]
    tracker = tracking.Tracker(tmp_path, run, 3, 30, contextlib.ExitStack())
    tracker._send_again(lines)
    assert sent == [(s, {"epoch": s / 10, "train/loss": 1 / s}) for s in expected]
