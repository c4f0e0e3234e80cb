import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process_table import is_alive

from common.errors import UserError
from common.run import jobs, runtime


def check(number: int) -> None:
    print(f"checking {number}")
    if number < 0:
        raise UserError(f"{number} is below 0")
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 13:
        raise SystemExit("thirteen is not counted")
    if number == 99:
        os.system("echo from another program")
        1 / 0  # noqa: B018


def wait_for_sigterm(ready: str) -> None:
    Path(ready).write_text(str(os.getpid()))
    time.sleep(60)


def write_threads(path: str) -> None:
    runtime.usable_cores = lambda: 8
    runtime.set_threads()
    words = "OMP_NUM_THREADS", "ANSWER", "WANDB_RUN_ID"
    Path(path).write_text(" ".join(str(os.environ.get(word)) for word in words))


def test_failures_by_name(tmp_path):
    calls = {str(number): (number,) for number in (1, -2, 0, 13, 99, 4)}
    assert dict(jobs.run(check, calls, 3, tmp_path / "logs")) == {
        "1": None,
        "-2": "-2 is below 0",
        "0": "killed by SIGKILL (no memory left?)",
        "13": "ended with status 1",
        "99": "division by zero",
        "4": None,
    }
    logs = {path.stem: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert logs["1"] == "checking 1\n"
    assert "thirteen is not counted" in logs["13"]
    assert "from another program" in logs["99"] and "ZeroDivisionError" in logs["99"]
    assert "Traceback" not in logs["-2"]


def test_who_leaves_early_leaves_nobody_behind(tmp_path):
    ready = tmp_path / "ready"
    calls = {"slow": (str(ready),), "broken": (1, 2, 3)}  # too many arguments: it ends at once
    for name, error in jobs.run(wait_for_sigterm, calls, 2, tmp_path):
        assert name == "broken" and "takes 1 positional argument" in error
        process = started(ready)
        assert is_alive(process)
        break
    else:
        pytest.fail("nothing came")
    assert not is_alive(process)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(tmp_path, number):
    ready = tmp_path / "ready"
    code = (
        "from pathlib import Path; from common.run import jobs; import test_jobs; "
        f"calls = {{'a': ({str(ready)!r},)}}; "
        f"list(jobs.run(test_jobs.wait_for_sigterm, calls, 1, Path({str(tmp_path)!r})))"
    )
    places = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, "PYTHONPATH": places}
    )
    process = started(ready)
    assert is_alive(process)
    parent.send_signal(number)
    assert parent.wait() == (143 if number == signal.SIGTERM else -number)
    ends = time.monotonic() + (20 if number == signal.SIGKILL else 0)
    while is_alive(process) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not is_alive(process)  # after a SIGTERM it was waited for


@pytest.mark.parametrize(("chosen", "threads"), [(None, "4"), ("3", "3")])
def test_processes_share_the_cores_unless_threads_were_chosen(
    tmp_path, monkeypatch, chosen, threads
):
    monkeypatch.setenv("ANSWER", "42")  # the environment is that of the call
    monkeypatch.setenv("WANDB_RUN_ID", "one")  # but for what would make one run of all
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    path = tmp_path / "threads"
    assert dict(jobs.run(write_threads, {"a": (str(path),)}, 2, tmp_path)) == {"a": None}
    assert path.read_text() == f"{threads} 42 None"


def started(ready: Path) -> int:
    ends = time.monotonic() + 60
    while not (ready.exists() and ready.read_text()) and time.monotonic() < ends:
        time.sleep(0.05)
    return int(ready.read_text())
