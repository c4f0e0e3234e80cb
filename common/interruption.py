"""How does a run end before its time?   SIGTERM, Ctrl-C, another process that died"""

import contextlib
import functools
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator


class Interruption:
    """SIGTERM and Ctrl-C end the process with a line that says how to go on, and 143 or 130.

    At once; but between `hold` and `release` they wait until the step is done and `agreed` is
    asked. A second Ctrl-C ends the process wherever it is. A second SIGTERM does not: a launcher
    that dies of the same Ctrl-C sends one while we still save.
    """

    def __init__(self, run_dir: Path) -> None:
        self.signal = 0
        self._run_dir = run_dir
        self._then = self._leave_at_once
        self._previous = {
            number: signal.signal(number, self._remember)
            for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _remember(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
        if not self.signal:
            self.signal = number
            self._then()

    def leave(self, number: int) -> None:
        """End the process as that signal asks."""
        is_begun = (self._run_dir / "config.json").exists()
        how = f"go on with --resume {self._run_dir}" if is_begun else "nothing was trained so far"
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # not print: it may be what was interrupted
                os.write(sys.stdout.fileno(), f"stopped; {how}\n".encode())
        raise SystemExit(128 + number)

    def _leave_at_once(self) -> None:
        self.leave(self.signal)

    def hold(self, accelerator: Accelerator) -> None:
        """From now on a signal waits for `agreed`, and losing a process is told in one line."""
        self._then = _wait
        if accelerator.num_processes > 1:
            sys.excepthook = functools.partial(_lost, sys.excepthook, self._run_dir)

    def dropping(self) -> "_Dropping":
        """A block, within `hold`, that a signal ends at once, and no more: `agreed` comes next."""
        return _Dropping(self)

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that any process has received, the same answer in all of them; 0 for none."""
        if accelerator.num_processes == 1:
            return self.signal
        heard = torch.tensor(self.signal, device=accelerator.device)
        torch.distributed.all_reduce(heard, op=torch.distributed.ReduceOp.MAX)
        return int(heard)

    def release(self) -> None:
        """From now on a signal ends the process at once, also one that came before."""
        self._then = self._leave_at_once
        if self.signal:
            self._leave_at_once()

    def end(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _Dropped(BaseException):
    """Nothing but `_Dropping` catches it."""


class _Dropping:
    # a class, since between the two halves of a @contextmanager a signal would go astray
    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption

    def __enter__(self) -> None:
        self._interruption._then = _drop

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self._interruption._then = _wait
        return kind is _Dropped


def _wait() -> None: ...


def _drop() -> None:
    raise _Dropped


def _lost(then: Callable, run_dir: Path, kind: type, error: Any, trace: Any) -> None:
    """What Python calls when nobody catches an error, if there are several processes."""
    if issubclass(kind, RuntimeError) and re.search("gloo|nccl", str(error), re.IGNORECASE):
        # one of them is dead; each survivor speaks, since it may be the first
        line = f"error: process {os.environ.get('RANK')} stops, since another one has ended"
        print(f"{line}; go on with --resume {run_dir}", file=sys.stderr, flush=True)
    else:
        then(kind, error, trace)
