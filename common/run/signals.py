"""SIGTERM, SIGHUP and Ctrl-C: a run ends after its step, or at once, and says how to resume it."""

import contextlib
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..console import is_first_process


class Signals:
    """SIGTERM, SIGHUP and Ctrl-C end the process with status 143, 129 or 130.

    SIGHUP comes when the terminal closes; where nohup lets it be ignored, it stays so.
    At once, unless they are `deferred`: then the training loop asks `agreed` after each step. A
    second Ctrl-C ends the process wherever it is. A second SIGTERM does not: a launcher that dies
    of the same Ctrl-C sends one while the run is still saving.
    """

    def __init__(self, run_dir: Path) -> None:
        self.received = 0
        self._run_dir = run_dir
        self._is_deferred = False
        self._excepthook = sys.excepthook
        sys.excepthook = functools.partial(self._lost_process, sys.excepthook)
        # in a thread, signals stay with whoever started it: only the main thread can take them
        is_main = threading.current_thread() is threading.main_thread()
        taken = [signal.SIGTERM, signal.SIGINT] if is_main else []
        if is_main and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            taken.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in taken}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block in which a signal waits: for `agreed` to be asked, at the latest for the end."""
        self._is_deferred = True
        yield
        self._is_deferred = False
        if self.received:
            self.leave(self.received)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
        if not self.received:
            self.received = number
            if not self._is_deferred:
                self.leave(number)

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that any process has received, the same answer in all of them; 0 for none."""
        if accelerator.num_processes == 1:
            return self.received
        received = torch.tensor(self.received, device=accelerator.device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return int(received)

    def leave(self, number: int) -> None:
        """End the process as that signal asks."""
        is_begun = (self._run_dir / "config.json").exists()
        how = f"resume with --resume {self._run_dir}" if is_begun else "nothing was trained so far"
        if is_first_process():
            # not print: it may be what was interrupted; there may be no stdout, or a notebook's
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.write(sys.stdout.fileno(), f"stopped; {how}\n".encode())
        raise SystemExit(128 + number)

    def restore(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        sys.excepthook = self._excepthook

    def _lost_process(self, then: Callable, kind: type, error: Any, trace: Any) -> None:
        """What Python calls for an error that nobody caught: did another process die?"""
        if issubclass(kind, RuntimeError) and re.search("gloo|nccl", str(error), re.IGNORECASE):
            if not self.received:  # else it ended because it was asked to, and so do we
                line = f"error: process {os.environ.get('RANK')} stops, since another one has ended"
                reason = str(error).splitlines()[0]
                advice = f"resume with --resume {self._run_dir}"
                print(f"{line} ({reason}); {advice}", file=sys.stderr, flush=True)
        else:
            then(kind, error, trace)
