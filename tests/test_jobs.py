import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.run import jobs


def double(number: float) -> float:
    print(f"doubling {number}")
    if number < 0:
        raise UserError(f"{number} is below 0")
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 13:
        raise SystemExit(7)
    return 2 * number / (number != 99)


def wait_for_sigterm(ready: str) -> None:
    Path(ready).write_text(str(os.getpid()))
    time.sleep(60)


def test_results_and_failures_by_name(tmp_path):
    calls = {str(number): (number,) for number in (1, -2, 0, 13, 99, 4)}
    found = {name: rest for name, *rest in jobs.run(double, calls, 3, "torch", tmp_path / "logs")}
    assert found == {
        "1": [2, None],
        "-2": [None, "-2 is below 0"],
        "0": [None, "killed by SIGKILL (no memory left?)"],
        "13": [None, "ended with status 7"],
        "99": [None, "division by zero"],
        "4": [8, None],
    }
    assert (tmp_path / "logs/1.log").read_text() == "doubling 1\n"
    assert "ZeroDivisionError" in (tmp_path / "logs/99.log").read_text()
    assert "Traceback" not in (tmp_path / "logs/-2.log").read_text()


def test_who_leaves_early_leaves_nobody_behind(tmp_path):
    ready = tmp_path / "ready"
    calls = {"slow": (str(ready),), "broken": (1, 2, 3)}  # too many arguments: it ends at once
    for name, _, error in jobs.run(wait_for_sigterm, calls, 2, "torch", tmp_path):
        assert name == "broken" and "takes 1 positional argument" in error
        process = started(ready)
        break
    else:
        pytest.fail("nothing came")
    assert not is_alive(process)


def test_processes_end_with_the_one_that_started_them(tmp_path):
    ready = tmp_path / "ready"
    code = (
        "from common.run import jobs; import test_jobs; "
        f"list(jobs.run(test_jobs.wait_for_sigterm, dict(a=({str(ready)!r},)), 1, 'torch', "
        f"__import__('pathlib').Path({str(tmp_path)!r})))"
    )
    places = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, "PYTHONPATH": places}
    )
    process = started(ready)
    parent.kill()
    parent.wait()
    ends = time.monotonic() + 20
    while is_alive(process) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not is_alive(process)


@pytest.mark.parametrize("chosen", [None, "3"])
def test_processes_share_the_cores_unless_threads_were_chosen(tmp_path, monkeypatch, chosen):
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs.runtime, "usable_cores", lambda: 8)
    with jobs._shared_cores(4):
        assert os.environ["OMP_NUM_THREADS"] == (chosen or "2")
    assert os.environ.get("OMP_NUM_THREADS") == chosen


def started(ready: Path) -> int:
    ends = time.monotonic() + 60
    while not (ready.exists() and ready.read_text()) and time.monotonic() < ends:
        time.sleep(0.05)
    return int(ready.read_text())


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
