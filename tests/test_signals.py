"""SIGTERM and Ctrl-C wait while a step runs, and end everything else at once."""

import os
import signal
import sys
import threading

import pytest

from common.run import runtime
from common.run.signals import Signals


@pytest.fixture
def signals(tmp_path):
    # a shell that starts us in the background lets Ctrl-C be ignored, nohup a closed terminal
    of_pytest = signal.signal(signal.SIGINT, signal.default_int_handler)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals(tmp_path)
    yield signals
    signals.restore()
    signal.signal(signal.SIGINT, of_pytest)
    assert signal.signal(signal.SIGHUP, hang_up) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_waits_is_agreed_on_and_a_second_ctrl_c_ends(signals):
    accelerator = runtime.start("no", seed=0)
    with pytest.raises(SystemExit) as stop, signals.deferred():
        assert signals.agreed(accelerator) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's that dies, too
        assert signals.agreed(accelerator) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.agreed(accelerator) == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)  # what came before is not forgotten at the end
    assert stop.value.code == 143


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_process_at_once_and_says_how_to_resume(
    signals, tmp_path, capfd, number, code
):
    with pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), number)
    assert stop.value.code == code
    (tmp_path / "config.json").touch()
    with pytest.raises(SystemExit):
        signals.leave(number)
    lines = capfd.readouterr().out.splitlines()
    assert lines == [
        "stopped; nothing was trained so far",
        f"stopped; resume with --resume {tmp_path}",
    ]
    os.kill(os.getpid(), signal.SIGTERM)  # the same stop, passed on by a launcher: no second exit


def test_nohup_stays(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = Signals(tmp_path)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.received
        signals.restore()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_another_one_left_alone_says_so(signals, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    sys.excepthook(RuntimeError, lost, None)
    line = f"error: process 1 stops, since another one has ended ({lost}); resume with --resume"
    assert capsys.readouterr().err == f"{line} {tmp_path}\n"
    with pytest.raises(SystemExit), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)  # it was asked to stop, too, and the first one says so
    sys.excepthook(RuntimeError, lost, None)
    assert capsys.readouterr().err == ""
    sys.excepthook(ValueError, ValueError("a mistake"), None)
    assert "ValueError: a mistake" in capsys.readouterr().err


def test_in_a_thread_signals_stay_with_the_main_thread(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    ended = []

    def train():
        signals = Signals(tmp_path)
        with signals.deferred():
            assert signals.received == 0
        signals.restore()
        ended.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert ended == [before]
