"""Processes that wait for each other: for as long as it takes, but not for one that has died."""

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from process_table import is_alive

from common.errors import UserError
from common.run import processes

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(monkeypatch):
    """A store of two processes; the second one is a thread of this one, or has died."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    rank = threading.local()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: getattr(rank, "number", 0))
    monkeypatch.setattr(processes, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(processes, "SILENCE_SECONDS", 3)
    return rank


def other(rank, name: str, seconds: float) -> threading.Thread:
    def run() -> None:
        rank.number = 1
        with processes.Processes(2, "runs/a") as both:
            time.sleep(seconds)
            both.meet(name)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_who_takes_longer_than_the_limit_is_waited_for_while_it_lives(store):
    thread = other(store, "epoch 0", seconds=6)
    with processes.Processes(2, "runs/a") as both:
        started = time.monotonic()
        both.meet("epoch 0")
        assert time.monotonic() - started > 3
    thread.join()


def test_who_gives_no_sign_of_life_is_not_waited_for(store, capsys):
    with processes.Processes(2, "runs/a") as both:
        started = time.monotonic()
        with pytest.raises(UserError, match=r"process 1 has given no sign of life .* runs/a"):
            both.meet("epoch 0")
        assert time.monotonic() - started < 60  # on a busy machine, too
    assert not capsys.readouterr().err  # the first process shows its errors itself


def test_one_process_meets_nobody():
    with processes.Processes(1, "runs/a") as alone:
        alone.meet("epoch 0")
        alone.agree("images", "abc")


def test_processes_that_see_other_files_stop(monkeypatch):
    """As where a second machine has no checkpoint, and would begin anew beside the first."""
    both = processes.Processes(2, "runs/a")
    monkeypatch.setattr(processes, "gather_object", lambda values: [7, *values])
    both.agree("run to resume (step)", 7)
    with pytest.raises(UserError, match=r"not find the same run to resume \(step\): 7, None; put"):
        both.agree("run to resume (step)", None)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
@pytest.mark.parametrize("when", ["while it imports", "later"])
def test_a_trainer_ends_with_its_launcher(tmp_path, when):
    """`accelerate launch` may be killed at any time; nobody else would end what it has started."""
    begun, done = tmp_path / "begun", tmp_path / "done"
    begin = f"open({str(begun)!r}, 'w').write(str(os.getpid())); time.sleep(2); "
    start = "from common.run import runtime; runtime.start('no', 0); "
    steps = begin + start if when == "while it imports" else start + begin
    trainer = f"import os, time, common; {steps}time.sleep(9); open({str(done)!r}, 'w').close()"
    wait = f"while not (os.path.exists({str(begun)!r}) and os.path.getsize({str(begun)!r})): pass"
    launcher = "import os, subprocess, sys\n"
    launcher += f"subprocess.Popen([sys.executable, '-c', {trainer!r}])\n{wait}"
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", launcher], env=environment, check=True)  # and it is gone
    ends = time.monotonic() + 60
    while is_alive(int(begun.read_text())):
        assert time.monotonic() < ends
        time.sleep(0.1)
    assert not done.exists()
