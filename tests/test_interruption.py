"""Do SIGTERM and Ctrl-C wait while a step runs, and end everything else at once?"""

import os
import signal

import pytest

from common import runtime
from common.interruption import Interruption


@pytest.fixture
def interruption(tmp_path):
    # a shell that starts us in the background lets Ctrl-C be ignored
    of_pytest = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    interruption = Interruption(tmp_path)
    yield interruption
    interruption.end()
    signal.signal(signal.SIGINT, of_pytest)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_held_signal_waits_and_a_second_ctrl_c_ends(interruption):
    accelerator = runtime.start("no", seed=0)
    interruption.hold(accelerator)
    assert interruption.agreed(accelerator) == 0
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # a launcher's that dies, too
    assert interruption.agreed(accelerator) == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGINT)
    assert interruption.agreed(accelerator) == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit) as stop:  # what came while it was held is not forgotten
        interruption.release()
    assert stop.value.code == 143


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_free_signal_ends_at_once_and_says_how_to_go_on(
    interruption, tmp_path, capfd, number, code
):
    with pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), number)
    assert stop.value.code == code
    (tmp_path / "config.json").touch()
    with pytest.raises(SystemExit):
        interruption.leave(number)
    lines = capfd.readouterr().out.splitlines()
    assert lines == [
        "stopped; nothing was trained so far",
        f"stopped; go on with --resume {tmp_path}",
    ]
    os.kill(os.getpid(), signal.SIGTERM)  # the same stop, passed on by a launcher: no second exit


def test_a_block_that_may_be_dropped_ends_at_once_and_the_stop_comes_later(interruption):
    accelerator = runtime.start("no", seed=0)
    interruption.hold(accelerator)
    done = []
    with interruption.dropping():
        done.append("one")
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("two")
    assert done == ["one"]
    assert interruption.agreed(accelerator) == signal.SIGTERM
    with pytest.raises(ValueError, match="our own"), interruption.dropping():
        raise ValueError("our own")
