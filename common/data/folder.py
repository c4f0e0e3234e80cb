"""Image folders: list, decode in parallel, and cache as one array.

`load_folder` reads `data_dir/train/CLASS/*` and, if it exists, `data_dir/test/CLASS/*`. How a file
is decoded is described in `decoding.py`.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.data.decoding import DECODE_VERSION, decode_all, decode_chunk, files_below, visible
from common.errors import UserError
from common.files import (
    atomic_write,
    checksum,
    lock,
    read_json,
    user_cache_folder,
    write_json,
)

# The cache lies where others may keep things, too: these are the names that it makes.
ENTRY = re.compile(r"images-\d+-[0-9a-f]{20}|\.images-\d+-[0-9a-f]{20}\.part")
CONTENT = re.compile(r"images\.npy|meta\.json|\.images\.\d+\.part\.npy|\.meta\.\d+\.part\.json")
MADE_BY = {"made_by": "latent-spaces"}  # the first thing written into an entry
FIRST_FORMAT = {"fingerprint", "is_gray", "unreadable"}  # of meta.json before it said who made it


@dataclass(frozen=True)
class Arrays:
    """All images and labels of a data set; C is 1 or 3. Those of a folder are read-only."""

    train_images: np.ndarray  # uint8 (N,C,S,S)
    train_labels: np.ndarray  # int64 (N,), index into class_names
    test_images: np.ndarray | None  # uint8 (M,C,S,S); None if there is no test part
    test_labels: np.ndarray | None  # int64 (M,)
    class_names: tuple[str, ...]  # of a folder: the sorted names of the subfolders of train/
    fingerprint: str  # SHA-256 of pixels, labels and class names


class _Listing(NamedTuple):
    class_names: tuple[str, ...]
    has_test: bool
    paths: list[str]  # relative to data_dir, in the order of the array: train, then test
    stamps: list[list[int]]  # size in bytes, modification time in ns


def load_folder(
    data_dir: Path, image_size: int, skip_unreadable: bool = False, show_progress: bool = True
) -> Arrays:
    """Load all images below `data_dir` as uint8 arrays (N,C,S,S), S = `image_size` pixels.

    C is 1 if the pixels of all images are gray, else 3 (RGB). Images are sorted by class and path.
    Hidden files, Thumbs.db, desktop.ini and files outside a class folder are ignored. A class may
    lack test images. The decoded images are cached in `data_dir/.cache`, or in the user's cache
    folder if that is not writable, and used until a path, size or modification time differs; a
    cache is checked for completeness, not for its content. `UserError` for a folder that is missing
    or has another layout, a class without images, no room for the cache, and unreadable files,
    which `skip_unreadable` leaves out and counts on stderr.
    """
    data_dir = Path(data_dir).expanduser().absolute()
    listing = _list_files(data_dir)
    name = f"images-{image_size}-{checksum(json.dumps([DECODE_VERSION, listing]).encode())[:20]}"
    user_cache = user_cache_folder()
    place = checksum(os.fsencode(data_dir.resolve()))[:20]
    caches = [data_dir / ".cache", user_cache / "three-latent-spaces" / place]

    read = partial(_read_entry, data_dir=data_dir, listing=listing, size=image_size)
    found, refusals = read(caches[0] / name) or read(caches[1] / name), []
    for cache in caches if not found else []:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with lock(cache / "images.lock"):
                if not read(cache / name):  # another process may have built it
                    _build_entry(cache / name, data_dir, listing, image_size, show_progress)
                found = read(cache / name)
            break
        except OSError as error:
            refusals.append(f"{cache}: {error.strerror or error}")
    if not found:
        reasons = "; ".join(refusals) or f"files in {data_dir} changed meanwhile"
        raise UserError(f"cannot cache images ({reasons}); make room or set XDG_CACHE_HOME")

    (images, unreadable), total = found, len(listing.paths)
    if unreadable and not skip_unreadable:
        named = _some({f"{path} ({reason})" for path, reason in unreadable.items()})
        what = f"{len(unreadable)} of {total} files in {data_dir} cannot be read as images"
        raise UserError(f"{what}: {named}; delete them or pass --skip_unreadable=True")
    folders = {path: "/".join(path.split("/")[:2]) for path in listing.paths}
    readable = {folder for path, folder in folders.items() if path not in unreadable}
    if lost := set(folders.values()) - readable:
        raise UserError(f"{data_dir} has classes without a readable image: {_some(lost)}")
    if unreadable and os.environ.get("RANK", "0") == "0":
        print(f"skipped {len(unreadable)} of {total} files: no readable images", file=sys.stderr)
    return images


def _list_files(data_dir: Path) -> _Listing:
    """List the files of all classes. `UserError` if the layout is not the expected one."""
    train, test = data_dir / "train", data_dir / "test"
    if not data_dir.is_dir():
        raise UserError(f"there is no folder {data_dir}; --data_dir must hold train/CLASS/*")
    if not train.is_dir():
        names = [name for name in _folders(data_dir) if name != "test"]
        advice = f"; if {_some(names)} are classes, move them into train/" if names else ""
        raise UserError(f"{data_dir} lacks train/; wanted: train/CLASS/* (test/CLASS/*){advice}")
    class_names = tuple(_folders(train))
    if not class_names:
        raise UserError(f"{train} has no class folders; move the images into train/CLASS/")
    test_names = _folders(test) if test.is_dir() else []
    if extra := set(test_names) - set(class_names):
        raise UserError(f"{test} has classes that train/ lacks: {_some(extra)}; rename or remove")

    folders = [train / name for name in class_names] + [test / name for name in test_names]
    below = [file for folder in folders for file in files_below(str(folder))]
    files = [(path[len(str(data_dir)) + 1 :], stamp) for path, *stamp in below]
    full = {path.split("/")[1] for path, _ in files if path.startswith("train/")}
    if empty := set(class_names) - full:
        raise UserError(f"{train} has classes without images: {_some(empty)}; fill or remove them")
    if test.is_dir() and not files[-1][0].startswith("test/"):
        raise UserError(f"{test} has no images in class folders; fill it or remove it")
    return _Listing(class_names, test.is_dir(), *map(list, zip(*files, strict=True)))


def _folders(folder: Path) -> list[str]:
    return [e.name for e in visible(folder) if not os.path.isfile(e.path)]  # also broken links


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _build_entry(entry: Path, data_dir: Path, listing: _Listing, size: int, show: bool) -> None:
    """Decode all files into the folder `entry`, which is renamed into place when complete.

    Entries of the same size that are outdated, damaged or incomplete are removed, if we made them.
    """
    part = entry.with_name(f".{entry.name}.part")
    for old in entry.parent.glob(f"*images-{size}-*"):
        if _is_ours(old, known=(entry.name, part.name)):
            _remove(old)
    total, free = len(listing.paths), shutil.disk_usage(entry.parent).free
    needed = 3 * total * size**2 + 2**20
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed >> 20} MiB needed, {free >> 20} MiB free")
    part.mkdir()
    write_header = (
        np.lib.format.write_array_header_1_0
    )  # of fixed length, so that it can be overwritten
    header = {"descr": "|u1", "fortran_order": False, "shape": (total, 3, size, size)}
    unreadable, is_gray = {}, True
    hide = None if show else True  # None: hidden if stderr is no terminal
    bar = tqdm(total=total, desc="decoding images", unit=" images", disable=hide)
    try:
        write_json(part / "meta.json", MADE_BY)
        with bar, atomic_write(part / "images.npy") as file:
            write_header(file, header)
            total_bytes = sum(length for length, _ in listing.stamps)
            for pixels, reasons in decode_all(listing.paths, total_bytes, size, root=data_dir):
                file.write(pixels.tobytes())
                is_gray = is_gray and bool((pixels == pixels[:, :1]).all())
                unreadable |= reasons
                bar.update(len(pixels) + len(reasons))
            file.seek(0)
            write_header(file, header | {"shape": (total - len(unreadable), 3, size, size)})
        images = np.load(part / "images.npy", mmap_mode="r")
        folders = [path.split("/")[:2] for path in listing.paths if path not in unreadable]
        about = json.dumps([folders, images.shape])
        meta = {"fingerprint": checksum(about.encode(), images.data), "is_gray": is_gray}
        write_json(part / "meta.json", MADE_BY | meta | {"unreadable": unreadable})
        part.rename(entry)
    finally:
        with contextlib.suppress(OSError):  # renamed, or somebody put a file there
            _remove(part)


def _is_ours(entry: Path, known: tuple[str, ...]) -> bool:
    """Whether a folder holds only files of this cache, and one of them says that we made it.

    The `known` names need no such proof: only a checksum of this very data set leads to them.
    """
    if not ENTRY.fullmatch(entry.name) or entry.is_symlink() or not entry.is_dir():
        return False
    files = list(os.scandir(entry))
    if not all(CONTENT.fullmatch(e.name) and e.is_file(follow_symlinks=False) for e in files):
        return False
    try:
        meta = read_json(entry / "meta.json")
    except UserError:
        meta = None
    is_signed = isinstance(meta, dict) and (
        MADE_BY.items() <= meta.items() or set(meta) == FIRST_FORMAT
    )
    return is_signed or entry.name in known


def _remove(entry: Path) -> None:
    """Delete an entry of the cache, file by file; `OSError` if anything else lies in it."""
    for file in os.scandir(entry):
        if CONTENT.fullmatch(file.name):
            os.unlink(file.path)
    entry.rmdir()


def _read_entry(entry: Path, data_dir: Path, listing: _Listing, size: int) -> tuple | None:
    """The cached images and {path: reason} of files left out; None if the cache is incomplete."""
    try:
        meta = read_json(entry / "meta.json")
        fingerprint, is_gray, unreadable = (meta[name] for name in sorted(FIRST_FORMAT))
        images = np.load(entry / "images.npy", mmap_mode="r")
    except (UserError, OSError, ValueError, EOFError, TypeError, KeyError):
        return None
    kept = [path for path in listing.paths if path not in unreadable]
    if images.dtype != np.uint8 or images.shape != (len(kept), 3, size, size):
        return None
    if len(decode_chunk(list(unreadable), size, root=data_dir)[0]):  # readable now
        return None
    labels = np.searchsorted(listing.class_names, [path.split("/")[1] for path in kept])
    train_count = sum(path.startswith("train/") for path in kept)
    train, test = np.split(images[:, : 1 if is_gray else 3], [train_count])
    train_labels, test_labels = np.split(labels, [train_count])
    tests = (test, test_labels) if listing.has_test else (None, None)
    return Arrays(train, train_labels, *tests, listing.class_names, fingerprint), unreadable
