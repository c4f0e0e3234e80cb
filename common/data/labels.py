"""Labels in a CSV file: `path` and `label` of each image, and its `group`, if there are groups.

Commas, semicolons or tabs separate the columns; case does not count in their names.

Images of one group, such as those of one patient, are never split between training, validation and
test.
"""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .layout import Listing, composed, distinct, some

COLUMNS = ("path", "label", "group")


def list_labeled(data_dir: Path, file: Path) -> tuple[Listing, list[str]]:
    """The images that a CSV file names, and the group of each ([]: no such column).

    Paths are relative to `data_dir`, or absolute. `UserError` for a file that is no such table, and
    for images that are missing or named twice.
    """
    rows, header = _read(file)
    paths = [os.path.normpath(row["path"]) for row in rows]
    files = [data_dir / path for path in paths]
    places = [os.path.normpath(file) for file in files]  # a path may be relative or absolute
    counts = Counter(places)
    if twice := {path for path, place in zip(paths, places, strict=True) if counts[place] > 1}:
        raise UserError(f"{file} names images twice: {some(twice)}; keep one row of each")
    pairs = zip(paths, files, strict=True)
    if missing := [path for path, file in pairs if not os.path.isfile(file)]:
        advice = f"paths are relative to --data_dir {data_dir}"
        raise UserError(
            f"{file} names {len(missing)} files that are not there: {some(missing)}; {advice}"
        )
    table = sorted(zip([row["label"] for row in rows], paths, rows, files, strict=True), key=_key)
    names = sorted({label for label, *_ in table})
    shown = distinct(names, f"{file} has two labels")
    index = {name: number for number, name in enumerate(names)}
    stamps = [[s.st_size, s.st_mtime_ns] for *_, name in table for s in [name.stat()]]
    notes = [f"labels of {len(table):,} images, {len(names)} classes, are those of {file}"]
    if others := [name for name in header if name and name not in COLUMNS]:
        notes.append(f"columns of {file} that are not used: {some(others)}")
    listing = Listing(
        class_names=shown,
        paths=[path for _, path, *_ in table],
        stamps=stamps,
        parts=["train"] * len(table),
        labels=[index[label] for label, *_ in table],
        folders=[["train", label] for label, *_ in table],
        notes=notes,
    )
    return listing, [row["group"] for _, _, row, _ in table] if "group" in header else []


def _key(row: tuple) -> tuple[str, str]:
    return row[0], row[1]


def _read(file: Path) -> tuple[list[dict[str, str]], Sequence[str]]:
    """The rows of the table and its columns. `UserError` if it lacks one, or a cell is empty."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            delimiter = max(",;\t", key=text.readline().count)
            text.seek(0)
            table = csv.DictReader(text, skipinitialspace=True, delimiter=delimiter)
            header = [name.strip().lower() for name in table.fieldnames or []]
            table.fieldnames = header
            read = list(table)
            rows = [{k: (v or "").strip() for k, v in row.items() if k in header} for row in read]
            for row in rows:  # the path stays as the file system has it
                row |= {k: composed(row[k]) for k in ("label", "group") if k in row}
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--labels {file} cannot be read ({reason}); wanted: CSV in UTF-8"
        ) from None
    if missing := [name for name in ("path", "label") if name not in header]:
        has = f"it has {', '.join(header)}" if header else "it is empty"
        raise UserError(f"--labels {file} lacks the column {' and '.join(missing)}; {has}")
    if twice := [name for name in COLUMNS if header.count(name) > 1]:
        raise UserError(f"--labels {file} has two columns {twice[0]}; rename one")
    if not rows:
        raise UserError(f"--labels {file} has no rows; wanted: one for each image")
    for number, (row, whole) in enumerate(zip(rows, read, strict=True), 2):
        if any(map(str.strip, whole.get(None, ()))):
            raise UserError(
                f"--labels {file}: row {number} has more cells than the {len(header)} columns; "
                f"put a text that holds the separator {delimiter!r} in quotes"
            )
        if empty := [name for name in COLUMNS if row.get(name, "-") == ""]:
            raise UserError(
                f"--labels {file}: row {number} has no {empty[0]}; fill it or remove it"
            )
    return rows, header
