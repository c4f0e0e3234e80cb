"""Tables that programs write into pages, between two marks."""

from pathlib import Path

from common.errors import UserError
from common.files import write


def put_between_marks(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two lines of a file, its marks. `UserError` without them."""
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise UserError(f"{path} lacks the lines {begin.strip()} and {end.strip()}")
    write(path, (before + begin + text + end + after).encode())
