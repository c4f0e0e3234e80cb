"""Several calls of a function at a time on one machine, each in a process of its own."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import runtime

# imported once, for all processes; not on macOS, where a process may not fork after that
PRELOADED = ("torch", "torchvision", "accelerate", "sklearn", "matplotlib")
LONGEST_REASON = 10_000  # characters; fits into a pipe that nobody reads yet


def run(
    function: Callable[..., Any], calls: Mapping[str, tuple], jobs: int, logs: Path
) -> Iterator[tuple[str, str | None]]:
    """Call `function(*arguments)` for each named call, `jobs` at a time, as a process each.

    The processes share the cores, print to LOGS/NAME.log and get a SIGTERM when this process ends.
    An exception ends one call and not the others. SIGTERM and SIGHUP end this process with status
    143 or 129. However it leaves, those that still run get a SIGTERM and are waited for.

    Yields:
        As calls end, their name with None, or with what went wrong.
    """
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "forkserver")
    if sys.platform != "darwin":
        context.set_forkserver_preload(list(PRELOADED))
    waiting, running = list(calls.items()), {}
    with _leaving_on_signals():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name, arguments = waiting.pop(0)
                    reader, writer = context.Pipe(duplex=False)
                    # one id for W&B would make one run of all
                    environment = {k: v for k, v in os.environ.items() if k != "WANDB_RUN_ID"}
                    words = writer, logs / f"{name}.log", environment, jobs
                    process = context.Process(
                        target=_call, args=(*words, function, arguments), name=name
                    )
                    process.start()
                    writer.close()
                    running[process.sentinel] = process, reader
                for sentinel in wait(list(running)):
                    process, reader = running.pop(sentinel)
                    process.join()
                    with reader:
                        yield process.name, _problem(process.exitcode, reader)
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join()


def _problem(exitcode: int, reader: Connection) -> str | None:
    """Why a process that has ended did not do its work."""
    if exitcode == 0:
        return None
    with contextlib.suppress(EOFError, OSError):
        return reader.recv()
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"killed by {name}" + " (no memory left?)" * (name == "SIGKILL")
    return f"ended with status {exitcode}"


def _call(
    writer: Connection,
    log: Path,
    environment: dict[str, str],
    jobs: int,
    function: Callable,
    arguments: tuple,
) -> None:
    """In the new process: call, and send what went wrong."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    runtime.processes_beside = jobs
    try:
        function(*arguments)
    except KeyboardInterrupt:  # Ctrl-C reaches all processes of a terminal
        raise SystemExit(130) from None
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        writer.send((str(error) or type(error).__name__)[:LONGEST_REASON])
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """A block that SIGTERM and SIGHUP leave as an exception, so that what it holds is let go."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()
    taken = [signal.SIGTERM, signal.SIGHUP] if is_main else []
    taken = [number for number in taken if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, leave) for number in taken}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
