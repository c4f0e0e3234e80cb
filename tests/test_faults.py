"""What happens to real runs: kills, signals, full disks, dead processes, dead servers.

No run loses its work: it stops with a line, and goes on to the bits of a run without the fault.
Damaged checkpoints are in test_checkpoints.py, a stop between two steps in test_scripts.py.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import SCRIPTS, TINY, assert_same_bits, resume, rows_of, run

from common.errors import UserError
from common.evaluation import pictures, report
from common.run import checkpoints, session, tracking, wandb_backend
from common.run.signals import Signals

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "faults"


# --- kill -9 --------------------------------------------------------------------------------------


def test_killed_at_any_moment_and_where_it_hurts_most_it_resumes_to_the_same_bits(
    run_command, tmp_path
):
    """In training; between the two renames of a checkpoint, in half a row, after the last file."""
    words = ("--kills", "1", "--points", "between", "row", "finished")
    found = killed(run_command, tmp_path, *words)
    assert (found["tried"], found["survived"], found["lost"]) == (4, 4, 0)
    assert [kill["in"] for kill in found["kills"]][1:] == ["checkpoint", "training", "finished"]


def test_two_processes_that_are_killed_resume_to_the_same_bits(run_command, tmp_path):
    found = killed(run_command, tmp_path, "--processes", "2", "--kills", "1", "--points")
    assert (found["tried"], found["survived"], found["lost"]) == (1, 1, 0)


def killed(run_command, tmp_path: Path, *words: str) -> dict:
    """What happened to one script, at its default width; the program tries all of them."""
    words = (PROGRAMS / "kill_and_resume.py", "--scripts", "joint", *words, "--out", "counts.json")
    words += ("--tracking", "disabled", "--seed", str(int(time.time())))
    done = run_command(sys.executable, *words)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    (found,) = json.loads((tmp_path / "counts.json").read_text())
    return found


def test_what_a_kill_leaves_beside_the_files_is_cleared_away(tmp_path):
    folder = tmp_path / "run"
    parts = [
        folder / ".encoder.123.part.safetensors",
        folder / "checkpoints/.next.123.part.safetensors",
        folder / "figures/.tsne.123.part.png",
    ]
    for part in parts:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"half")
    open_tracker(folder).stop(1)
    assert not any(part.exists() for part in parts)


def open_tracker(folder: Path, mode: str = "disabled"):
    words = {"settings": {}, "facts": {}, "labels": {}, "project": "test", "is_main": True}
    return tracking.open_tracker(folder, mode=mode, keep_rows=None, **words)


def test_killed_before_its_first_row_a_run_keeps_its_wandb_id(tmp_path):
    def wandb_id() -> str:
        return json.loads((tmp_path / "run/config.json").read_text())["facts"]["wandb_id"]

    open_tracker(tmp_path / "run").stop(1)
    first = wandb_id()
    tracker = open_tracker(tmp_path / "run")
    assert wandb_id() == first
    tracker.log({"x": 1}, step=1, epoch=0)
    tracker.stop(1)
    open_tracker(tmp_path / "run").stop(1)  # its checkpoints were deleted: W&B has seen step 1
    assert wandb_id() != first


def test_a_run_that_trains_on_while_its_checkpoint_is_written_resumes_to_the_same_bits(
    tmp_path, monkeypatch
):
    """What is written is the state of its step, and it is written before a stop is reported."""
    monkeypatch.setattr(session, "SHORT_EPOCH", 8)  # a checkpoint after each epoch of 8 steps,
    words = ("--evaluate_every=2", "--test=False")  # the first of which is not evaluated
    run("joint", tmp_path / "straight", *words)
    agreed, save, asked = Signals.agreed, checkpoints.save_last, []

    def save_slowly(at, state):
        while state["step"] == 8 and len(asked) < 12:  # until four more steps were trained
            time.sleep(0.01)
        save(at, state)

    def ask(self, accelerator):
        asked.append(len(asked))
        return signal.SIGTERM if len(asked) == 13 else agreed(self, accelerator)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_last", save_slowly)
        patch.setattr(Signals, "agreed", ask)
        with pytest.raises(SystemExit):
            run("joint", tmp_path / "run", *words)
    saved = [tmp_path / f"run/checkpoints/{name}.safetensors" for name in ("previous", "last")]
    assert [checkpoints.load(path)["step"] for path in saved] == [8, 13]
    saved[0].replace(saved[1])  # go on from the one that was written meanwhile
    resume("joint", tmp_path / "run")
    assert_same_bits(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize("straight", ["joint"], indirect=True)
def test_a_damaged_best_checkpoint_costs_the_best_epoch_only(
    straight, tmp_path, monkeypatch, capsys
):
    method, folder, _ = straight
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    best = tmp_path / "run/checkpoints/best.safetensors"
    data = bytearray(best.read_bytes())
    data[len(data) // 2] ^= 1
    best.write_bytes(data)
    # the last evaluation is repeated, and would write it anew
    monkeypatch.setattr(checkpoints, "save_best", lambda *words: None)
    metrics = resume(method, tmp_path / "run")
    assert f"warning: checkpoint {best} is damaged" in capsys.readouterr().out
    last = checkpoints.load(tmp_path / "run/checkpoints/last.safetensors")
    assert metrics["best/epoch"] == last["epoch"] + 1 == 2  # it was the last epoch
    assert not [name for name in metrics if name.startswith("best/val")]


# --- SIGTERM and Ctrl-C ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("straight", "measure", "number", "code"),
    [
        ("joint", "knn_accuracies", signal.SIGTERM, 143),
        ("supcon", "knn_accuracies", signal.SIGINT, 130),
        ("ae", "latent_pictures", signal.SIGTERM, 143),
        ("supcon", "latent_metrics", signal.SIGINT, 130),
    ],
    indirect=["straight"],
)
def test_a_signal_ends_an_evaluation_at_once_and_it_is_redone(
    straight, tmp_path, monkeypatch, capfd, measure, number, code
):
    """In the middle of training, and in the stage of the classifier and the pictures."""
    method, folder, _ = straight

    def asked(*words, **options):
        os.kill(os.getpid(), number)
        pytest.fail("it went on")

    with monkeypatch.context() as patch:
        patch.setattr(pictures if hasattr(pictures, measure) else report, measure, asked)
        with pytest.raises(SystemExit) as stop:
            run(method, tmp_path / "run")
    assert stop.value.code == code
    last = capfd.readouterr().out.splitlines()[-1]
    assert last == f"stopped; resume with --resume {tmp_path / 'run'}"
    del stop  # it holds the frame, which holds the lock
    saved = checkpoints.load(tmp_path / "run/checkpoints/last.safetensors")["step"]
    steps, save = [], checkpoints.save_last
    monkeypatch.setattr(
        checkpoints, "save_last", lambda at, state: (steps.append(state["step"]), save(at, state))
    )
    resume(method, tmp_path / "run")
    assert saved not in steps  # it was there already
    assert_same_bits(folder, tmp_path / "run")


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from common.evaluation import report
measure = report.knn_accuracies
def slow(*words):
    calls.append(words)
    if len(calls) == {slow_at}:
        print("evaluating", flush=True)
        time.sleep(100)
    return measure(*words)
calls, report.knn_accuracies = [], slow
import train_joint
from common.config import parse
train_joint.main(parse(train_joint.Config))
"""


STEPS = [0, 3, 6, 8, 8, 9, 12, 15, 16, 16, 16]  # of the rows of a run of train_joint.py


def test_two_processes_stop_together(tmp_path, capsys):
    """One is killed, then, of the resumed run, both are asked to stop; by torchrun itself."""
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")

    def launch(slow_at: int, *words: str) -> tuple[subprocess.Popen, list[int]]:
        """Start, wait for that evaluation; the launcher and the processes that it started."""
        (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT), slow_at=slow_at))
        process = subprocess.Popen(
            [*launcher, "slow.py", *words],
            cwd=tmp_path,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        lines = []
        while (line := process.stdout.readline()) != "evaluating\n":
            lines.append(line)
            assert line, f"it ended before that evaluation: {''.join(lines)}"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return process, [int(child) for child in children]

    def end(process: subprocess.Popen, within: float) -> str:
        started = time.monotonic()
        try:
            text, _ = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nobody is left
                os.killpg(process.pid, signal.SIGKILL)
        assert time.monotonic() - started < within
        assert process.returncode not in (0, None)
        return text

    process, ranks = launch(2, *TINY, *SCRIPTS["joint"][1], "--run_dir=run")
    os.kill(ranks[1], signal.SIGKILL)  # the first is evaluating; the launcher asks it to stop
    text = end(process, within=30)
    assert text.count("stopped; resume with --resume run") == 1
    assert "gloo" not in text  # no trace of ours

    process, _ = launch(1, "--resume=run")
    process.send_signal(signal.SIGTERM)
    text = end(process, within=25)  # after 30 s torchrun kills who has not stopped
    assert text.count("stopped; resume with --resume run") == 1
    assert "error: process" not in text
    state = checkpoints.load(tmp_path / "run/checkpoints/last.safetensors")
    assert (state["epoch"], state["step"]) == (1, 16)  # the second evaluation is still to come

    resume("joint", tmp_path / "run")  # as one process
    assert "processes before: 2, now: 1" in capsys.readouterr().out
    assert [row["step"] for row in rows_of(tmp_path / "run")] == STEPS


def test_a_run_of_one_process_goes_on_on_two_machines(tmp_path, monkeypatch):
    """Two agents of torchrun, each with one process, that meet at an address of this machine."""
    monkeypatch.setattr(Signals, "agreed", lambda self, accelerator: signal.SIGTERM)
    with pytest.raises(SystemExit):
        run("joint", tmp_path / "run")  # after one step
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
                *(f"--node_rank={rank}", "--nproc_per_node=1", "--master_addr=127.0.0.1"),
                *(f"--master_port={port}", ROOT / "train_joint.py", f"--resume={tmp_path / 'run'}"),
            ],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    text = "".join(agent.communicate(timeout=200)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], text
    assert text.count("processes before: 1, now: 2") == 1
    assert [row["step"] for row in rows_of(tmp_path / "run")] == STEPS
    (again,) = json.loads((tmp_path / "run/config.json").read_text())["resumed"]
    assert again["processes"] == 2


# --- full disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "measure", "full"),
    [
        # on a slow machine the checkpoint before the evaluation is still being written
        (30_000, "knn_accuracies", r"(?:best|next)\.safetensors"),
        (100, "knn_accuracies", "metrics.jsonl"),
        (30_000, "latent_metrics", "latents.npz"),
        (1_000, "latent_pictures", r"\w+.png"),
    ],
)
@pytest.mark.parametrize("straight", ["joint"], indirect=True)  # all write through common/files.py
def test_a_full_disk_stops_with_one_line_and_loses_nothing(
    straight, tmp_path, monkeypatch, room, measure, full
):
    """The system refuses every file beyond `room` bytes from the first call of `measure` on."""
    method, folder, _ = straight
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    module = pictures if hasattr(pictures, measure) else report
    original = getattr(module, measure)

    def fill(*words, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        return original(*words, **options)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(module, measure, fill)
            message = rf"no room for \S+{full} .* it needs \S+ MiB, \S+ MiB are free; make room"
            with pytest.raises(UserError, match=message) as error:
                run(method, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in error.value.message
    del error
    assert checkpoints.load(tmp_path / "run/checkpoints/last.safetensors")
    assert not list((tmp_path / "run").rglob(".*.part*"))
    resume(method, tmp_path / "run")
    assert_same_bits(folder, tmp_path / "run")


def test_a_signal_counts_where_the_disk_is_full(tmp_path, monkeypatch, capfd):
    """A study that was asked to stop must not begin its next run."""

    def refuse(*words):
        if words[1]["step"]:
            raise UserError("no room for the checkpoint")
        return save(*words)

    def stop(*words):
        os.kill(os.getpid(), signal.SIGTERM)
        return log(*words)

    save, log = checkpoints.save_last, tracking.Tracker.log
    monkeypatch.setattr(checkpoints, "save_last", refuse)
    monkeypatch.setattr(tracking.Tracker, "log", stop)
    with pytest.raises(SystemExit) as end:
        run("joint", tmp_path / "run")
    assert end.value.code == 143
    out = capfd.readouterr().out
    assert "no room for the checkpoint\nstopped; resume with" in out


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path):
    with pytest.raises(IsADirectoryError):
        (tmp_path / "file").mkdir()
        tracking.append(tmp_path / "file", b"row")


# --- W&B ------------------------------------------------------------------------------------------


def test_a_server_that_is_away_costs_one_line(tmp_path, monkeypatch, capfd):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setitem(wandb_backend.LIMITS, "init_timeout", 1)
        tracker = open_tracker(tmp_path / "run", mode="auto")
        tracker.log({"train/loss": 1.0}, step=1, epoch=0)
        lines = tracker.finish({"test/accuracy": 1.0})
    assert capfd.readouterr().out.count("W&B does not start online") == 1
    assert lines[-1] == f"send to W&B:  wandb sync {tmp_path}/run/wandb/offline-run-*"
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"test/accuracy": 1.0}


class Upload:
    """A run of W&B whose upload does not end before its process does."""

    offline, url, id = False, "http://server/run", "abc"

    def __init__(self, folder: Path):
        self.dir = str(folder / "wandb/run-1/files")
        self.is_abandoned = False

    def finish(self, exit_code: int) -> None:
        for _ in range(100):
            time.sleep(0.02)
            if self.is_abandoned:
                raise ConnectionError("W&B's process is gone")


def test_a_stop_does_not_wait_for_an_upload_and_a_finished_run_does(tmp_path, monkeypatch):
    upload = Upload(tmp_path)
    monkeypatch.setattr(wandb_backend, "STOP_SECONDS", 0.1)
    monkeypatch.setattr(wandb_backend, "_abandon", lambda: setattr(upload, "is_abandoned", True))
    problem, lines = wandb_backend.finish(upload, tmp_path, exit_code=143)
    assert problem == "W&B did not get everything: no answer within 0.1 s"
    assert lines[-1] == f"send to W&B:  wandb sync --include-online {tmp_path}/wandb/run-1"
    upload.is_abandoned = False
    problem, lines = wandb_backend.finish(upload, tmp_path, exit_code=0)
    assert (problem, lines[-1]) == ("", "W&B:          http://server/run")


# --- long runs ------------------------------------------------------------------------------------


def test_no_epoch_leaves_memory_files_or_threads_behind(run_command, tmp_path):
    words = ("--epochs", "12", "--scripts", "joint", "--tracking", "disabled", "--out", "long.json")
    done = run_command(sys.executable, PROGRAMS / "long_run.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "long.json").read_text())
    assert found["epochs"] == 12
    assert found["early"]["files"] == found["late"]["files"]
    assert found["early"]["threads"] == found["late"]["threads"]
    # seen: 0.1 MiB in five runs; one batch of images kept per epoch as floats gives 3.5
    assert found["late"]["mib"] - found["early"]["mib"] < 0.5
