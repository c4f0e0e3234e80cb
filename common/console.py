"""How does a line reach the reader?   whatever terminal, log or pipe there is, or none at all

Nothing that is shown may stop a training: letters that the terminal lacks become question marks,
and what nobody reads any more (`| head -1`, a log on a full disk) is dropped.
"""

import contextlib
import functools
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from .errors import UserError


def begin() -> None:
    """Make standard output and error sound, and let a `UserError` end this process as one line.

    For a process that is one of the scripts; others keep their streams and catch the error.
    """
    for name in ("stdout", "stderr"):
        setattr(sys, name, _sound(getattr(sys, name)))
    if getattr(sys.excepthook, "func", None) is not _show_error:
        sys.excepthook = functools.partial(_show_error, sys.excepthook)


def say(line: str, is_main: bool = True) -> None:
    """Print a line to stdout at once, without tearing a progress bar."""
    stream = sys.stdout
    if is_main and stream is not None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):  # nobody reads, or it is closed
            tqdm.write(line.encode(encoding, "replace").decode(encoding), file=stream)
            stream.flush()


def progress(total: int, description: str, is_main: bool) -> tqdm:
    """Return a bar over `total` steps on stderr; silent if that is no terminal or not `is_main`."""
    try:
        silent = not (is_main and sys.stderr.isatty())
    except (AttributeError, ValueError):  # there is none, or it is closed
        silent = True
    return tqdm(total=total, desc=description, disable=silent, dynamic_ncols=True, leave=False)


def is_first_process() -> bool:
    """Whether this process speaks for all that a launcher started together.

    RANK alone is no proof of a launcher: it is left in the environment of pods and jobs.
    """
    launched = "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    return not launched or os.environ.get("RANK", "0") in ("", "0")


class _Forgiving(io.RawIOBase):
    """The bytes of a stream; what can't be written is dropped."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # a slow reader
            select.select([], [self._descriptor], [])
            return 0 if len(data) == 0 else self.write(data)
        except OSError:
            return len(data)


def _sound(stream: Any) -> Any:
    """A stream like this one that raises no error when it is written to."""
    if stream is None or stream.closed:
        return open(os.devnull, "w", encoding="utf-8")
    try:
        descriptor = stream.fileno()
        stream.flush()
    except (OSError, ValueError, AttributeError):  # a notebook's, a test's
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(descriptor)),
        encoding=stream.encoding,
        errors="replace" if stream.errors == "strict" else stream.errors,
        # PYTHONUNBUFFERED writes through, to the descriptor; here there is a buffer in between
        line_buffering=stream.line_buffering or getattr(stream, "write_through", False),
    )


def _show_error(then: Callable, kind: type, error: BaseException, trace: Any) -> None:
    """What Python calls for an error that nobody caught."""
    if not isinstance(error, UserError):
        then(kind, error, trace)
    elif is_first_process():
        print(f"error: {error.message}", file=sys.stderr, flush=True)
    elif error.of_one_process or os.environ.get("LOCAL_RANK") == "0":
        of = f"process {os.environ.get('RANK')}"
        print(f"error: {of}: {error.message}", file=sys.stderr, flush=True)
