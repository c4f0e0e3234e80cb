"""Image folders: list, decode in parallel, and cache as one array.

Where the images may lie is described in `layout.py`, how a file is decoded in `decoding.py`.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..files import (
    atomic_write,
    checksum,
    expand_home,
    lock,
    read_json,
    user_cache_folder,
    write_json,
)
from .decoding import DECODE_VERSION, decode_all, decode_chunk, notes_on_depth
from .labels import list_labeled
from .layout import PARTS, Listing, list_files, say, some

# The cache lies where others may keep things, too: these are the names that it makes.
ENTRY = re.compile(r"images-\d+-[0-9a-f]{20}|\.images-\d+-[0-9a-f]{20}\.part")
CONTENT = re.compile(r"images\.npy|meta\.json|\.images\.\d+\.part\.npy|\.meta\.\d+\.part\.json")
MADE_BY = {"made_by": "latent-spaces"}  # the first thing written into an entry
FIRST_FORMAT = {"fingerprint", "is_gray", "unreadable"}  # of meta.json before it said who made it


@dataclass(frozen=True)
class Arrays:
    """All images and labels of a data set; C is 1 or 3. Those of a folder are read-only."""

    train_images: np.ndarray  # uint8 (N,C,S,S), with those that have no label
    train_labels: np.ndarray  # int64 (N,), index into class_names; -1: no label
    test_images: np.ndarray | None  # uint8 (M,C,S,S); None if there is no test part
    test_labels: np.ndarray | None  # int64 (M,)
    class_names: tuple[str, ...]  # of a folder: the sorted names of the class folders
    fingerprint: str  # SHA-256 of pixels, labels, class names and groups
    validation_images: np.ndarray | None = (
        None  # uint8 (V,C,S,S); None: a tenth of train is held out
    )
    validation_labels: np.ndarray | None = None  # int64 (V,)
    copies: tuple[tuple[int, ...], ...] = ()  # rows of equal images: of train, validation, test
    copies_of: int = 0  # images that were compared for it
    groups: np.ndarray | None = None  # int64 (N,) of train_images: one group is in one split


def load_folder(
    data_dir: Path,
    image_size: int,
    skip_unreadable: bool = False,
    show_progress: bool = True,
    white: float | None = None,
    labels: str | None = None,
) -> Arrays:
    """Load all images below `data_dir` as uint8 arrays (N,C,S,S), S = `image_size` pixels.

    C is 1 if the pixels of all images are gray, else 3 (RGB). Images are sorted by class and path.
    Hidden files, Thumbs.db, desktop.ini, thumbnails, masks and files outside a class folder are
    left out. A class may lack test images. The decoded images are cached in `data_dir/.cache`, or
    in the user's cache folder if that is not writable, and used until a path, size or modification
    time differs; a cache is checked for completeness, not for its content. `UserError` for a folder
    that is missing or has another layout, a class without images, no room for the cache, and
    unreadable files, which `skip_unreadable` leaves out and counts on stderr.
    """
    data_dir = Path(expand_home(str(data_dir))).absolute()
    if labels is None:
        listing, groups = list_files(data_dir), []
    else:
        listing, groups = list_labeled(data_dir, Path(expand_home(labels)))
    about = [DECODE_VERSION, white, listing._replace(notes=[])]
    name = f"images-{image_size}-{checksum(json.dumps(about).encode())[:20]}"
    user_cache = user_cache_folder()
    place = checksum(os.fsencode(data_dir.resolve()))[:20]
    caches = [data_dir / ".cache", user_cache / "three-latent-spaces" / place]

    read = partial(_read_entry, data_dir=data_dir, listing=listing, size=image_size, white=white)
    found, refusals = read(caches[0] / name) or read(caches[1] / name), []
    for cache in caches if not found else []:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with lock(cache / "images.lock"):
                if not read(cache / name):  # another process may have built it
                    _build_entry(cache / name, data_dir, listing, image_size, show_progress, white)
                found = read(cache / name)
            break
        except (OSError, UserError) as error:  # the latter where the disk is full
            reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
            refusals.append(f"{cache}: {reason}")
    if not found:
        reasons = "; ".join(refusals) or f"files in {data_dir} changed meanwhile"
        raise UserError(f"cannot cache images ({reasons}); make room or set XDG_CACHE_HOME")

    (images, unreadable, notes), total = found, len(listing.paths)
    if unreadable and not skip_unreadable:
        named = some({f"{path} ({reason})" for path, reason in unreadable.items()})
        what = f"{len(unreadable)} of {total} files in {data_dir} cannot be read as images"
        advice = "delete them or pass --skip_unreadable=True"
        if any(reason.startswith("gray values") for reason in unreadable.values()):
            advice += "; --white is the gray value that becomes white"
        raise UserError(f"{what}: {named}; {advice}")
    folders = dict(zip(listing.paths, map("/".join, listing.folders), strict=True))
    readable = {folder for path, folder in folders.items() if path not in unreadable}
    if lost := set(folders.values()) - readable:
        raise UserError(f"{data_dir} has classes without a readable image: {some(lost)}")
    skipped = f"skipped {len(unreadable)} of {total} files: no readable images"
    if groups:
        pairs = zip(listing.paths, groups, strict=True)
        kept = [group for path, group in pairs if path not in unreadable]
        _, first, numbers = np.unique(kept, return_index=True, return_inverse=True)
        numbers = first.argsort().argsort()[numbers]  # in the order in which groups appear
        fingerprint = checksum(images.fingerprint.encode(), numbers.astype("<i8").data)
        images = replace(images, groups=numbers, fingerprint=fingerprint)  # they decide the splits
    say(listing.notes + notes + ([skipped] if unreadable else []))
    return images


def _build_entry(
    entry: Path, data_dir: Path, listing: Listing, size: int, show: bool, white: float | None
) -> None:
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
    unreadable, deep, is_gray = {}, {}, True
    hide = None if show else True  # None: hidden if stderr is no terminal
    bar = tqdm(total=total, desc="decoding images", unit=" images", disable=hide)
    try:
        write_json(part / "meta.json", MADE_BY)
        with bar, atomic_write(part / "images.npy") as file:
            write_header(file, header)
            total_bytes = sum(length for length, _ in listing.stamps)
            decoded = decode_all(
                listing.paths, total_bytes, size, root=data_dir, white=white, deep=deep
            )
            digests = []
            for pixels, reasons in decoded:
                digests += [hashlib.blake2b(image, digest_size=8).digest() for image in pixels]
                file.write(pixels.tobytes())
                is_gray = is_gray and bool((pixels == pixels[:, :1]).all())
                unreadable |= reasons
                bar.update(len(pixels) + len(reasons))
            file.seek(0)
            write_header(file, header | {"shape": (total - len(unreadable), 3, size, size)})
        images = np.load(part / "images.npy", mmap_mode="r")
        pairs = zip(listing.paths, listing.folders, strict=True)
        folders = [folder for path, folder in pairs if path not in unreadable]
        about = json.dumps([folders, images.shape])
        meta = {"fingerprint": checksum(about.encode(), images.data), "is_gray": is_gray}
        meta |= {"copies": _equal_rows(digests)}
        meta |= {"unreadable": unreadable, "notes": notes_on_depth(deep.values(), white)}
        write_json(part / "meta.json", MADE_BY | meta)
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


def _read_entry(
    entry: Path, data_dir: Path, listing: Listing, size: int, white: float | None
) -> tuple | None:
    """The cached images, {path: reason} of files left out and what to say; None if incomplete."""
    try:
        meta = read_json(entry / "meta.json")
        fingerprint, is_gray, unreadable = (meta[name] for name in sorted(FIRST_FORMAT))
        notes, copies = meta["notes"], tuple(map(tuple, meta["copies"]))
        images = np.load(entry / "images.npy", mmap_mode="r")
    except (UserError, OSError, ValueError, EOFError, TypeError, KeyError):
        return None
    rows = zip(listing.paths, listing.parts, listing.labels, strict=True)
    kept = [(part, label) for path, part, label in rows if path not in unreadable]
    if images.dtype != np.uint8 or images.shape != (len(kept), 3, size, size):
        return None
    if len(decode_chunk(list(unreadable), size, root=data_dir, white=white)[0]):  # readable now
        return None
    parts, labels = [part for part, _ in kept], np.array([label for _, label in kept], np.int64)
    ends = np.cumsum([parts.count(part) for part in PARTS])[1:-1]  # of unlabelled and validation
    (train, validation, test), (train_labels, validation_labels, test_labels) = (
        np.split(array, ends) for array in (images[:, : 1 if is_gray else 3], labels)
    )
    tests = (test, test_labels) if "test" in listing.parts else (None, None)
    validations = (validation, validation_labels) if "validation" in listing.parts else (None, None)
    names = listing.class_names, fingerprint
    copied = copies, len(kept)
    return Arrays(train, train_labels, *tests, *names, *validations, *copied), unreadable, notes


def _equal_rows(digests: list[bytes]) -> list[list[int]]:
    """The rows of each checksum that occurs more than once."""
    if not digests:
        return []
    numbers = np.frombuffer(b"".join(digests), np.uint64)
    order = np.argsort(numbers, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
    return [group.tolist() for group in groups if len(group) > 1]
