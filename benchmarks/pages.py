"""Tables that programs write into pages, between two marks."""

import argparse
from collections.abc import Callable
from pathlib import Path

from common import console
from common.errors import UserError
from common.files import write


def put_between_marks(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two lines of a file, its marks. `UserError` without them."""
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise UserError(f"{path} lacks the lines {begin.strip()} and {end.strip()}")
    write(path, (before + begin + text + end + after).encode())


def collect(main: Callable[[list[Path], bool], str], doc: str, what: str) -> None:
    """Run the program `main(folders, keep)` with the folders of the command line; print its text.

    `doc` is its docstring, `what` the name of a folder in its help.
    """
    console.begin()
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar=what)
    parser.add_argument("--write", action="store_true", help="keep them, and write the page anew")
    arguments = parser.parse_args()
    print(main(arguments.folders, arguments.write))
