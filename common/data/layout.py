"""Where the images of a data set lie: its parts, its classes, and what is left out.

`list_files` takes the layouts in which people keep images:

    DATA/train/CLASS/*  with  val/, test/ and unlabelled/ beside train/, where they exist
    DATA/CLASS/*        class folders alone, as torchvision's ImageFolder reads them

A folder beside train/ that is none of these is named. Thumbnails and masks beside images are left
out and counted (`decoding.files_below`).
"""

import contextlib
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..console import is_first_process
from ..errors import UserError
from ..files import printable
from .decoding import SYSTEM_FOLDERS, files_below, is_picture, pictures_below, visible

# in the order of the array; the names that folders have for each part, in any case of letters
PARTS = {
    "train": ("train", "training"),
    "unlabelled": ("unlabelled", "unlabeled"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
HIDDEN_FOLDERS = {".thumbnails", ".thumbs", ".ipynb_checkpoints", ".picasaoriginals", ".trash"}
WANTED = "wanted: train/CLASS/* (test/CLASS/*)"


class Listing(NamedTuple):
    """The files of a data set, in the order of the array: by part, class and path."""

    class_names: tuple[str, ...]  # as they are shown
    paths: list[str]  # relative to the data set's folder
    stamps: list[list[int]]  # size in bytes, modification time in ns
    parts: list[str]  # keys of PARTS
    labels: list[int]  # index into class_names, -1: none
    folders: list[list[str]]  # part and name of the class on disk, which the fingerprint holds
    notes: list[str]  # a line each: what was chosen, what is left out


_said: set[str] | None = None  # the lines said so far, inside `said_once`


def say(lines: Iterable[str]) -> None:
    """Print lines to stderr, in the first process only."""
    if is_first_process():
        for line in lines:
            if _said is None or line not in _said:
                print(line, file=sys.stderr, flush=True)
            if _said is not None:
                _said.add(line)


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Inside, a line about a data set is said the first time only, however many runs load it."""
    global _said
    before, _said = _said, set()
    try:
        yield
    finally:
        _said = before


def distinct(names: Sequence[str], problem: str) -> tuple[str, ...]:
    """The names as `printable`. `UserError`, beginning with `problem`, if two are shown alike."""
    shown = tuple(map(printable, names))
    if twice := [name for name, count in Counter(shown).items() if count > 1]:
        raise UserError(f"{problem} that are shown as {some(twice)}; rename one")
    return shown


def some(names: Iterable[str]) -> str:
    """The first three names in order, and how many more there are."""
    names = sorted(map(printable, names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def list_files(data_dir: Path) -> Listing:
    """List the files of all parts and classes. `UserError` if the layout is none of ours."""
    if not os.path.isdir(data_dir):
        raise UserError(f"there is no folder {data_dir}; --data_dir must hold train/CLASS/*")
    places = parts_of(data_dir)
    notes = _notes_on_parts(data_dir, places)
    if "train" not in places:
        classes = [name for name in folders_of(data_dir) if name != places.get("unlabelled")]
        notes += _class_folders_alone(data_dir, classes, places)
        places["train"] = ""
    train = data_dir / places["train"]
    known = _classes(classes := folders_of(train) if places["train"] else classes)
    if not known:
        raise UserError(f"{train} has no class folders; move the images into train/CLASS/")

    rows, left_out = [], _pictures_of_systems(data_dir)
    for part in (part for part in PARTS if part in places):
        root = data_dir / places[part]
        here = classes if part == "train" else folders_of(root)
        start = len(rows)
        for name, label in [("", -1)] if part == "unlabelled" else _labeled(root, here, known):
            folder = "" if label < 0 else known[composed(name)][1]
            for path, *stamp in files_below(str(root / name), left_out):
                relative = path[len(os.path.join(data_dir, "")) :]
                rows.append((relative, stamp, part, label, [part, folder]))
        left_out += _pictures_of_systems(root) if places[part] and part != "unlabelled" else []
        if len(rows) == start and part != "train":
            inside = "no images" if part == "unlabelled" else "no images in class folders"
            raise UserError(f"{root} has {inside}; fill it or remove it")
    trained = {label for _, _, part, label, _ in rows if part == "train"}
    if empty := [folder for label, folder in known.values() if label not in trained]:
        raise UserError(f"{train} has classes without images: {some(empty)}; fill or remove them")
    roots = {
        data_dir,
        *(data_dir / place for part, place in places.items() if part != "unlabelled"),
    }
    loose = [entry.path for root in roots for entry in visible(root) if is_picture(entry)]
    for what, paths in (
        ("thumbnails, masks, previews", left_out),
        ("outside class folders", loose),
    ):
        if paths:
            named = some(os.path.relpath(path, data_dir) for path in paths)
            notes.append(f"left out {len(paths)} images ({what}): {named}")
    names, more = _shown(data_dir, classes, [folder for _, folder in known.values()])
    return Listing(names, *map(list, zip(*rows, strict=True)), notes + more)


def _notes_on_parts(data_dir: Path, places: dict[str, str]) -> list[str]:
    """What to say of the folders in `data_dir`: which is which part, and which is none."""
    notes = [
        f"{printable(folder)}/ holds the {part} images"
        for part, folder in places.items()
        if folder != part or part in ("validation", "unlabelled")
    ]
    others = set(folders_of(data_dir)) - set(places.values())
    if others and "train" in places:
        notes.append(f"left out beside {places['train']}/: {some(f'{name}/' for name in others)}")
    return notes


def _labeled(root: Path, here: Sequence[str], known: dict) -> list[tuple[str, int]]:
    """(name, label) of the class folders in a part. `UserError` for a class without a label."""
    if extra := [name for name in here if composed(name) not in known]:
        raise UserError(f"{root} has classes that train/ lacks: {some(extra)}; rename or remove")
    return [(name, known[composed(name)][0]) for name in here]


def _shown(
    data_dir: Path, folders: Sequence[str], classes: Sequence[str]
) -> tuple[tuple[str, ...], list[str]]:
    """The names of classes as they are shown, and what to say of them."""
    names, notes = distinct(classes, f"{data_dir} has two classes"), []
    if len(classes) < len(folders):
        pairs = [name for name in folders if name not in classes]
        notes.append(f"one class each, in two Unicode forms of its name: {some(pairs)}")
    if odd := [name for name in classes if printable(name) != composed(name)]:
        notes.append(f"class names that are no UTF-8 text are shown with escapes: {some(odd)}")
    return names, notes


def _pictures_of_systems(root: Path) -> list[str]:
    """The image files in folders beside the class folders that systems and programs make."""
    return [
        path
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name)
        if entry.name.lower() in SYSTEM_FOLDERS | HIDDEN_FOLDERS
        for path in pictures_below(entry.path)
    ]


def folders_of(folder: Path) -> list[str]:
    """The names of the visible folders in a folder, and of links that are broken."""
    return [
        e.name
        for e in visible(folder)
        if not os.path.isfile(e.path) and e.name.lower() not in SYSTEM_FOLDERS
    ]


def parts_of(data_dir: Path) -> dict[str, str]:
    """{part: name of its folder}. `UserError` if two folders claim to be one part."""
    names, found = folders_of(data_dir), {}
    for part, words in PARTS.items():
        claims = [name for name in names if name.lower() in words]
        if claims:
            found[part] = claims[0]
        if len(claims) > 1:
            raise UserError(
                f"{data_dir} has several folders of {part} images: {some(claims)}; keep one"
            )
    return found


def _class_folders_alone(data_dir: Path, names: Sequence[str], places: dict) -> list[str]:
    """What to say where the folders in `data_dir` are the classes; `UserError` if they are not."""
    parts = [places[part] for part in ("validation", "test") if part in places]
    if parts:
        names = [name for name in names if name not in parts]
        advice = f"; if {some(names)} are classes, move them into train/" if names else ""
        raise UserError(f"{data_dir} lacks train/, and has {some(parts)}/; {WANTED}{advice}")
    if inner := [name for name in names if _holds_train(data_dir / name)]:
        raise UserError(
            f"{data_dir} lacks train/; it lies in {some(inner)}: pass --data_dir "
            f"{data_dir / inner[0]}, or sort the images into train/CLASS/"
        )
    alike = {part: name for name in names for part in PARTS if _words(name) & {*PARTS[part]}}
    if len(alike) > 1:  # seg_train/ and seg_test/
        what = ", ".join(f"{some([name])} as {part}/" for part, name in alike.items())
        raise UserError(f"{data_dir} lacks train/; {WANTED}; rename {what}")
    empty = [name for name in names if not _has_picture(data_dir / name)]
    if len(names) < 2 or empty:
        advice = f"; if {some(names)} are classes, move them into train/" if names else ""
        missing = f"; no images in {some(empty)}" if empty and len(names) > 1 else ""
        raise UserError(f"{data_dir} lacks train/{missing}; {WANTED}{advice}")
    notes = [f"no train/ in {data_dir}, so its folders are the classes: {some(names)}"]
    if data_dir.name.lower() in PARTS["train"]:
        with contextlib.suppress(UserError):  # who may not list the folder above sees nothing
            places = parts_of(data_dir.parent)
            others = [f"{name}/" for part, name in places.items() if part != "train"]
            if others:
                notes.append(
                    f"not used: {some(others)} beside {data_dir.name}/; "
                    f"--data_dir {data_dir.parent} takes both"
                )
    return notes


def _words(name: str) -> set[str]:
    """The words of a folder's name, in lower case: {"seg", "train"} of seg_train."""
    return set(re.split(r"[\W_\d]+", name.lower()))


def _holds_train(folder: Path) -> bool:
    with contextlib.suppress(UserError):
        return any(name.lower() in PARTS["train"] for name in folders_of(folder))
    return False


def _has_picture(folder: Path) -> bool:
    """Whether a file below has an image's suffix."""
    return any(is_picture(path) for path, *_ in files_below(str(folder)))


def _classes(names: Sequence[str]) -> dict[str, tuple[int, str]]:
    """{name in composed form: (label, name on disk)} of class folders, in their order."""
    first = {}
    for name in names:
        first.setdefault(composed(name), name)
    return {key: (label, name) for label, (key, name) in enumerate(first.items())}


def composed(name: str) -> str:
    """A name in composed form (NFC), in which two ways to write it are equal."""
    return unicodedata.normalize("NFC", name)
