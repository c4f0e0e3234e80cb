"""A run that was stopped ends with the bits of one that was not, at default widths and batches."""

import contextlib
import signal

import default_size
import pytest
import torch
from tiny import assert_same_bits, coarse_pictures

from common.files import read_json
from common.run.signals import Signals


@pytest.fixture(autouse=True)
def all_cores(unset):
    """Threads as users have them, which in a worker of `make test` would be one."""
    unset("OMP_NUM_THREADS")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stopping(monkeypatch):
    """A function: let the next training stop when it has asked so many times whether to."""
    left = 0

    def agreed(self, accelerator):
        nonlocal left
        left -= 1
        return signal.SIGTERM if left == 0 else 0

    def stop_after(times: int) -> None:
        nonlocal left
        left = times

    monkeypatch.setattr(Signals, "agreed", agreed)
    return stop_after


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("ae", ()),
        ("ae", ("--compile=True",)),
        ("joint", ()),
        ("joint", ("--optimizer=adamw", "--learning_rate=0.002")),
        ("joint", ("--precision=bf16",)),
        ("joint", ("--encoder=airbench", "--width=16", "--optimizer=muon", "--learning_rate=0.2")),
        ("supcon", ()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_stopped_within_an_epoch_and_at_its_end(tmp_path, stopping, method, words):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    drawn = coarse_pictures() if words else contextlib.nullcontext()  # once as users see them
    words = ("--test=False", *words)
    with drawn:
        default_size.run(method, straight, *words)
        stopping(1)  # after the first of two steps
        with pytest.raises(SystemExit):
            default_size.run(method, stopped, *words)
        stopping(1)  # after the last step of the epoch, before its evaluation
        with pytest.raises(SystemExit):
            default_size.resume(method, stopped)
        default_size.resume(method, stopped)
    assert_same_bits(straight, stopped)
    resumed = [entry["rows"] for entry in read_json(stopped / "config.json")["resumed"]]
    first = 2 if method == "joint" else 1  # with the row of gradient norms at step 0
    assert resumed == [first, first + 1]
