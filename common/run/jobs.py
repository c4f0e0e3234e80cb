"""Functions called in processes of their own, several at a time, on one machine."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import runtime


def run(
    function: Callable[..., Any],
    calls: Mapping[str, tuple],
    jobs: int,
    preload: str,
    logs: Path,
) -> Iterator[tuple[str, Any, str | None]]:
    """Call `function(*arguments)` for each named call, `jobs` at a time, as a process each.

    The processes share the cores, print to LOGS/NAME.log and end when this process does. They are
    forked from one that has imported the module `preload`. An exception ends one call and not the
    others. If the caller leaves early, those that still run get a SIGTERM and are waited for.

    Yields:
        As calls end, their name with their result and None, or with None and what went wrong.
    """
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    waiting, running = list(calls.items()), {}
    with _shared_cores(jobs):
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name, arguments = waiting.pop(0)
                    reader, writer = context.Pipe(duplex=False)
                    words = writer, logs / f"{name}.log", function, arguments
                    process = context.Process(target=_call, args=words, name=name)
                    process.start()
                    writer.close()
                    running[reader] = process
                for reader in wait(list(running)):  # a result, or the end of the process
                    process = running.pop(reader)
                    yield process.name, *_outcome(reader, process)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.join()


def _outcome(reader: Connection, process: multiprocessing.Process) -> tuple[Any, str | None]:
    with reader, contextlib.suppress(EOFError):
        return reader.recv()
    process.join()
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        return None, f"killed by {name}" + " (no memory left?)" * (name == "SIGKILL")
    return None, f"ended with status {process.exitcode}"


def _call(writer: Connection, log: Path, function: Callable, arguments: tuple) -> None:
    """In the new process: call, and send the result or what went wrong."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with (
        log.open("a", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            outcome = function(*arguments), None
        except KeyboardInterrupt:  # Ctrl-C reaches all processes of a terminal
            raise SystemExit(130) from None
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            outcome = None, str(error) or type(error).__name__
    writer.send(outcome)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _shared_cores(jobs: int) -> Iterator[None]:
    """New processes get their part of the cores, unless the user chose a number of threads."""
    if os.environ.get("OMP_NUM_THREADS"):
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, runtime.usable_cores() // jobs))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
