"""How is a file written so that nobody ever sees half of it?   atomic write, checksum, lock"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from .console import say
from .errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, our share of it, what one file may be


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file beside `path` and rename it to `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part. On an error the old file stays and
    nothing is left over. The data reach the disk before the name does.
    """
    path = Path(path)
    # the process id keeps two writers apart; the suffix stays, since libraries look at it
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Delete what `atomic_write` left in `folder` when it was killed; while nobody writes there."""
    for part in folder.glob(".*.part*"):
        part.unlink()


@contextlib.contextmanager
def room_for(path: Path, size: int) -> Iterator[None]:
    """A disk that is full becomes a `UserError` that says which file needs how many bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = next(folder for folder in path.absolute().parents if folder.exists())
        needed, free = (f"{n / 2**20:,.2f} MiB" for n in (size, shutil.disk_usage(place).free))
        raise UserError(
            f"no room for {path} ({error.strerror}): it needs {needed}, {free} are free; make room "
            "and go on (a training with --resume)"
        ) from None


def write(path: Path, data: bytes) -> None:
    """Write a whole file, atomically. `UserError` where there is no room for it."""
    path = Path(path)
    with room_for(path, len(data)), atomic_write(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically. Bytes of file names that are no UTF-8 become \\xe9 etc."""
    write(path, _escaped(text).encode())


def _escaped(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(name: str) -> str:
    """A name as text that every file, figure and table can hold, in composed form (NFC).

    Bytes that are no UTF-8 and control characters become escapes such as \\xe9.
    """
    odd = ("Cc", "Zl", "Zp")
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in odd else letter
        for letter in unicodedata.normalize("NFC", _escaped(name))
    )


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file. `UserError` where there is no room for it."""
    with room_for(path, len(data)), open(path, "ab") as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities stay what they are."""
    write(path, f"{json.dumps(value, indent=2)}\n".encode())


def write_rows(path: Path, rows: Iterable[Any], sort_keys: bool = False) -> None:
    """Write one line of JSON per row, as `read_rows` reads them, atomically."""
    lines = (json.dumps(row, sort_keys=sort_keys) + "\n" for row in rows)
    write(path, "".join(lines).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. `UserError` where it is missing, unreadable or no JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8").removeprefix("\ufeff"))  # Windows's mark
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it or restore a copy") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line, such as RUN/metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def checksum(*chunks: bytes | memoryview) -> str:
    """SHA-256 of the chunks, one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder where there is none. `UserError` where none can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder; if the block fails, a new one goes again that holds hidden files only.

    Others stay, such as what W&B recorded of a run that failed. `UserError` where none can be made.
    """
    is_new = False
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True)
        is_new = True  # for one of two processes that make it at the same moment
    make_folder(folder)
    try:
        yield
    except BaseException:
        if is_new and all(entry.name[:1] == "." for entry in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def lock(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; the system frees it however the process ends.

    With `busy`, another holder is a `UserError` with that message; without, wait for it. Where the
    file system has no locks, go on without one, and say so if there is a `busy`.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except OSError as error:
            if busy and error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(busy) from None
            if busy:
                say(
                    f"warning: the file system of {path.parent} has no locks ({error.strerror}); "
                    "let no second process write there"
                )
        yield


def expand_home(text: str) -> str:
    """`text` with a leading ~ or ~user replaced. `UserError` for a ~ where there is no home."""
    expanded = os.path.expanduser(text)
    if expanded.split("/")[0] == "~":
        raise UserError(f"{text}: this user has no home folder; write the path out, or set HOME")
    return expanded


def user_cache_folder() -> Path:
    """The user's cache folder; one of the system's temporary folders where there is no home."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen)
    home = os.path.expanduser("~")
    if home == "~":
        return Path(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return Path(home, ".cache")
