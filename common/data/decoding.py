"""Decoding of image files to square RGB arrays, in parallel, in any format that Pillow reads.

A file becomes a square of S = `image_size` pixels: EXIF orientation applied, first frame of an
animation, transparency composited on white (as in browsers), short side resized with an antialiased
bicubic filter, center crop. If the short side is S already, the image is cropped, not resized.
Of 16-bit grayscale 65535 becomes white, of floating point 1, unless another `white` is given, as
4095 for 12 bits in 16-bit files; values outside 0..white are refused.
"""

import contextlib
import functools
import os
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import UserError

DECODE_VERSION = 2  # increase it whenever the same file would give other pixels
AHEAD = 8  # chunks per thread that are decoded in advance
SMALL = 4096  # bytes of a file of which Python's part takes longer than Pillow's


# Folders that systems and programs leave among images, and those of thumbnails and masks.
SYSTEM_FOLDERS = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information"}
SYSTEM_FOLDERS |= {"lost+found"}
# the last one beside each file that Windows fetched from the network
SYSTEM_FILE = re.compile(r"(eh)?thumbs\.db|desktop\.ini|icon\r|.+zone\.identifier", re.IGNORECASE)
COMPANION_FOLDERS = {"thumbnails", "thumbs", "previews", "masks", "segmentations"}
# NAME_mask beside NAME is no image of its own
COMPANION = re.compile(
    r"(?:thumb_|thumbnail_|mask_)?(.+?)"
    r"(?:[ ._-](?:mask|masks|seg|segmentation|thumb|thumbnail|preview)(?:[ _-]?\d+)?)?",
    re.IGNORECASE,
)
RAW = {".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef"}
RAW |= {".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"}


class Depth(NamedTuple):
    """Of an image of more than 8 bits: its kind, its largest value, and the value of white."""

    kind: Literal["16-bit", "float", "16-bit color"]
    brightest: float
    white: float


def visible(folder: str | Path) -> list[os.DirEntry]:
    """The entries of a folder by name, without hidden ones and those of operating systems."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}; fix or remove it") from None
    return [e for e in entries if e.name[0] != "." and not SYSTEM_FILE.fullmatch(e.name)]


def files_below(folder: str, left_out: list[str] | None = None) -> Iterator[tuple[str, int, int]]:
    """Yield (path, bytes, ns) of the visible files at any depth, one system call each.

    Not those that belong to an image: folders such as @eaDir, .thumbnails and masks, NAME_mask
    beside NAME, and a RAW file beside its picture. Those with an image's suffix join `left_out`.
    """
    shown = visible(folder)
    if left_out is not None:
        left_out += _pictures_in_hidden_folders(folder)
    companions = _companions([entry.name for entry in shown])
    for entry in shown:
        if entry.is_dir(follow_symlinks=False):  # a link may be a cycle; `_decode` reports it
            if entry.name.lower() not in SYSTEM_FOLDERS | COMPANION_FOLDERS:
                yield from files_below(entry.path, left_out)
            elif left_out is not None:
                left_out += pictures_below(entry.path)
            continue
        if entry.name in companions:
            if left_out is not None:
                left_out.append(entry.path)
            continue
        try:
            status = entry.stat()
            yield entry.path, status.st_size, status.st_mtime_ns
        except OSError:  # a broken link, named likewise
            yield entry.path, 0, 0


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes of image files, in lower case, with those of RAW files."""
    Image.init()
    return frozenset(Image.registered_extensions()) | RAW


def is_picture(entry: os.DirEntry | str) -> bool:
    """Whether a file has an image's suffix."""
    try:
        is_file = isinstance(entry, str) or entry.is_file()
    except OSError:  # a link that is a cycle, or leads where we may not look
        return False
    return is_file and os.path.splitext(entry)[1].lower() in picture_suffixes()


def _companions(names: list[str]) -> set[str]:
    """Those of the names in a folder that are masks, thumbnails or RAW files of another one."""
    split = {name: os.path.splitext(name) for name in names}
    pictures = {name for name in names if split[name][1].lower() in picture_suffixes()}
    raw = {name for name in pictures if split[name][1].lower() in RAW}
    developed = {split[name][0] for name in pictures - raw}
    found = {name for name in raw if split[name][0] in developed}
    for name in pictures - raw:
        match = COMPANION.fullmatch(split[name][0])
        if match and match[1] != split[name][0] and match[1] in developed:
            found.add(name)
    return found


def _pictures_in_hidden_folders(folder: str) -> list[str]:
    hidden = sorted(e.path for e in os.scandir(folder) if e.name[0] == "." and _is_folder(e))
    return [path for name in hidden for path in pictures_below(name)]


def pictures_below(folder: str) -> list[str]:
    """All files with an image's suffix at any depth, hidden or not; none where we may not look."""
    found = []
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if _is_folder(entry):
                found += pictures_below(entry.path)
            elif is_picture(entry.path):
                found.append(entry.path)
    return found


def _is_folder(entry: os.DirEntry) -> bool:
    return entry.is_dir(follow_symlinks=False)


def notes_on_depth(depths: Iterable[Depth], white: float | None) -> list[str]:
    """A line for each kind of images that keeps few of 256 levels, or that `white` is given for."""
    kinds, notes = {}, []
    for kind, brightest, full in depths:
        kinds.setdefault((kind, full), []).append(brightest)
    for (kind, full), values in sorted(kinds.items()):
        top, usual, count = max(values), float(np.median(values)), f"{len(values):,} {kind} images"
        whole = 2 ** max(int(top).bit_length(), 1) - 1 if kind == "16-bit" else top
        is_chosen = white is not None and kind != "16-bit color"
        if top < full / 2 or usual < full / 8:
            reach = top if top < full / 2 else usual
            advice = f"--white {whole:.{6 if kind == 'float' else 10}g} makes that value white"
            if kind == "16-bit color" or reach < top:
                advice = "if they hold fewer bits, scale them to the full range"
            who = "they" if reach == top else "half of them"
            notes.append(
                f"{count} are dark: {who} reach {reach:,.6g} of "
                f"{full:,.10g}, so at most {max(1, int(reach / full * 255) + 1)} of 256 levels are "
                f"left; {advice}"
            )
        elif is_chosen:
            notes.append(f"{count}: the value {full:,.10g} is white")
        elif white is not None:
            notes.append(f"{count}: --white is for gray values and changes nothing in them")
    return notes


def decode_chunk(
    paths: list[str],
    image_size: int,
    *,
    root: str | Path = "",
    border: int = 0,
    white: float | None = None,
    deep: dict[str, Depth] | None = None,
) -> tuple[np.ndarray, dict[str, str]]:
    """Decode files to uint8 (readable,3,S,S), S = `image_size`, and {path: reason} of the others.

    `paths` are taken from the folder `root`. A `border` leaves that many black pixels on each
    side of an image, unless its short side is S already. `white` is the value that becomes white in
    images of more than 8 bits, whose `Depth` joins `deep`.
    """
    # such files are decoded anyway; not catch_warnings, which threads would take from each other
    warnings.filterwarnings("ignore", module=r"PIL\.")
    pixels, unreadable = [], {}
    for path in paths:
        try:
            image, depth = _decode(os.path.join(root, path), image_size, border, white)
            pixels.append(image)
            if depth and deep is not None:
                deep[path] = depth
        except UnidentifiedImageError:
            unreadable[path] = "no image format that Pillow knows"
        except Exception as error:  # damaged files raise errors of all kinds
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            unreadable[path] = reason.splitlines()[0]
    return np.array(pixels, np.uint8).reshape(-1, 3, image_size, image_size), unreadable


def decode_all(
    paths: list[str],
    total_bytes: int,
    image_size: int,
    *,
    root: str | Path = "",
    border: int = 0,
    white: float | None = None,
    deep: dict[str, Depth] | None = None,
) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
    """Yield `decode_chunk` of all files in order, decoded in threads.

    `total_bytes` is the size of all files. Decoding is only a few chunks ahead of the consumer, so
    that memory stays bounded.
    """
    from joblib import cpu_count  # takes a while

    mean_bytes = max(total_bytes // max(len(paths), 1), 1)
    # up to 8 MiB of files, and of pixels
    length = max(1, min(64, 2**23 // max(mean_bytes, 3 * image_size**2)))
    chunks = [paths[i : i + length] for i in range(0, len(paths), length)]
    options = {"image_size": image_size, "root": root, "border": border}
    decode = partial(decode_chunk, **options, white=white, deep=deep)
    # Pillow decodes and resizes without the interpreter's lock
    threads = cpu_count() if mean_bytes > SMALL else 1
    Image.init()  # of threads that load Pillow's plugins together, one can miss some of them
    pool = ThreadPoolExecutor(threads)
    try:
        started = (pool.submit(decode, chunk) for chunk in chunks)
        ahead = deque(islice(started, AHEAD * threads))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(islice(started, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(
    path: str, image_size: int, border: int, white: float | None
) -> tuple[np.ndarray, Depth | None]:
    """Decode one file to uint8 (3,S,S), with its `Depth` beyond 8 bits; any exception means that it
    cannot be read.
    """
    if not os.path.isfile(path):  # opening a pipe would block
        is_there, is_folder = os.path.exists(path), os.path.isdir(path)
        kind = "a link to a folder" if is_folder else "no regular file"
        raise OSError(kind if is_there else "broken link")
    if os.path.splitext(path)[1].lower() in RAW:
        raise OSError("a RAW file, of which only the preview can be read: convert it")
    with Image.open(path) as image:
        # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which may not be whole pixels
        drafted = image.draft(None, (2 * image_size, 2 * image_size))
        width, height = drafted[1][2:] if drafted else image.size
        is_cut = ";16" in str(image.tile)  # Pillow keeps 8 bits of each color
        image.load()
        orientation = 1
        with contextlib.suppress(Exception):  # damaged EXIF in a readable image
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        image, depth = _to_8_bits(image, white)
        if is_cut and depth is None:
            depth = Depth("16-bit color", float(np.asarray(image).max()), 255)
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
    return (pixels[:, ::-1] if orientation in (3, 4, 7, 8) else pixels), depth


def _to_8_bits(image: Image.Image, white: float | None) -> tuple[Image.Image, Depth | None]:
    """Convert any mode to L or RGB, without transparency; `ValueError` for values out of range."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, np.float32)
        is_float = image.mode == "F"
        white = white or (1 if is_float else 65535)
        if not (
            values.min() >= 0 and values.max() <= white * (1 + 1e-5)
        ):  # in this form NaN is caught too
            raise ValueError(f"gray values outside 0..{white:.10g}")
        depth = Depth("float" if is_float else "16-bit", float(values.max()), white)
        return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8)), depth
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB"), None
    return image.convert("L" if image.mode in ("1", "L") else "RGB"), None
