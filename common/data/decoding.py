"""Decoding of image files to square RGB arrays, in parallel, in any format that Pillow reads.

A file becomes a square of S = `image_size` pixels: EXIF orientation applied, first frame of an
animation, transparency composited on white (as in browsers), short side resized with an antialiased
bicubic filter, center crop. If the short side is S already, the image is cropped, not resized.
16-bit grayscale is divided by 257, so that white stays white; floating point must lie in 0..1.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from common.errors import UserError

DECODE_VERSION = 1  # increase it whenever the same file would give other pixels
AHEAD = 8  # chunks per process that are decoded in advance


def visible(folder: str | Path) -> list[os.DirEntry]:
    """The entries of a folder by name, without hidden ones and those of operating systems."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}; fix or remove it") from None
    others = ("thumbs.db", "desktop.ini")
    return [e for e in entries if e.name[0] != "." and e.name.lower() not in others]


def files_below(folder: str) -> Iterator[tuple[str, int, int]]:
    """Yield (path, bytes, ns) of the visible files at any depth, one system call each."""
    for entry in visible(folder):
        if entry.is_dir(follow_symlinks=False):  # a link may be a cycle; `_decode` reports it
            yield from files_below(entry.path)
            continue
        try:
            status = entry.stat()
            yield entry.path, status.st_size, status.st_mtime_ns
        except OSError:  # a broken link, named likewise
            yield entry.path, 0, 0


def decode_chunk(
    paths: list[str], image_size: int, *, root: str | Path = "", border: int = 0
) -> tuple[np.ndarray, dict[str, str]]:
    """Decode files to uint8 (readable,3,S,S), S = `image_size`, and {path: reason} of the others.

    `paths` are taken from the folder `root`. A `border` leaves that many black pixels on each
    side of an image, unless its short side is S already.
    """
    pixels, unreadable = [], {}
    with warnings.catch_warnings(action="ignore"):  # such files are decoded anyway
        for path in paths:
            try:
                pixels.append(_decode(os.path.join(root, path), image_size, border))
            except UnidentifiedImageError:
                unreadable[path] = "no image format that Pillow knows"
            except Exception as error:  # damaged files raise errors of all kinds
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                unreadable[path] = reason.splitlines()[0]
    return np.array(pixels, np.uint8).reshape(-1, 3, image_size, image_size), unreadable


def decode_all(
    paths: list[str], total_bytes: int, image_size: int, *, root: str | Path = "", border: int = 0
) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
    """Yield `decode_chunk` of all files in order, in several processes if that is faster.

    `total_bytes` is the size of all files. Decoding is only a few chunks ahead of the consumer, so
    that memory stays bounded.
    """
    length = max(1, min(64, 2**23 * len(paths) // max(total_bytes, 1)))  # up to 8 MiB of files
    chunks = [paths[i : i + length] for i in range(0, len(paths), length)]
    decode = partial(decode_chunk, image_size=image_size, root=root, border=border)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores, len(paths) // 2000 + total_bytes // 2**25)  # each takes 0.3 s to start
    if workers < 2:
        yield from map(decode, chunks)
        return
    # 20,000 files of 32x32: one thread 2.2 s, two 3.2 s (one interpreter), two processes 1.5 s
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks held by torch
    with ProcessPoolExecutor(workers, spawn, _prepare_worker) as pool:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # else workers import it
        try:
            pool.map(abs, range(workers))  # starts the processes at once
        finally:
            sys.modules["__main__"] = script
        started = (pool.submit(decode, chunk) for chunk in chunks)
        ahead = deque(islice(started, AHEAD * workers))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(islice(started, 1))


def _decode(path: str, image_size: int, border: int) -> np.ndarray:
    """Decode one file to uint8 (3,S,S); any exception means that it cannot be read."""
    if not os.path.isfile(path):  # opening a pipe would block
        raise OSError("broken link" if not os.path.exists(path) else "no regular file")
    with Image.open(path) as image:
        # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which may not be whole pixels
        drafted = image.draft(None, (2 * image_size, 2 * image_size))
        width, height = drafted[1][2:] if drafted else image.size
        image.load()
        orientation = 1
        with contextlib.suppress(Exception):  # damaged EXIF in a readable image
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        image = _to_8_bits(image)
    side = min(width, height)
    inner = image_size if side == image_size else image_size - 2 * border
    exact = int if side == inner else float  # at whole pixels nothing is interpolated
    left, top = exact((width - side) / 2), exact((height - side) / 2)
    box = (left, top, left + side, top + side)
    image = image.resize((inner, inner), Image.Resampling.BICUBIC, box).convert("RGB")
    image = ImageOps.expand(image, (image_size - inner) // 2)  # black
    pixels = np.asarray(image).transpose(2, 0, 1)  # (3,S,S)
    pixels = pixels.transpose(0, 2, 1) if orientation in (5, 6, 7, 8) else pixels
    pixels = pixels[:, :, ::-1] if orientation in (2, 3, 6, 7) else pixels
    return pixels[:, ::-1] if orientation in (3, 4, 7, 8) else pixels


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert any mode to L or RGB, without transparency; `ValueError` for values out of range."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, np.float32)
        white = 1 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= white):  # in this form NaN is caught too
            raise ValueError(f"gray values outside 0..{white}")
        return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()  # if it is killed, the worker exits, too
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
