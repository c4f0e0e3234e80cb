"""The shape of the code: what the design draws is what the files do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {"config", "console", "errors", "files", "first_parent"}  # the last of __init__.py
# what the files of a room may use beside the ground and the room itself
ROOMS = {"data": set(), "evaluation": {"display"}, "display": set(), "run": set()}
# what a file outside the rooms uses beside the ground
BESIDE = {"models.py": {"encoders"}}
FILES = [path.relative_to(ROOT) for path in sorted(ROOT.glob("common/**/*.py"))]


def imports_of_common(path: Path) -> set[str]:
    """The first name below `common` of each import in a file: a room, or a file outside them.

    All of them are relative, as another test checks.
    """
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.parts[: -node.level]
            parts = [*package, *filter(None, (node.module or "").split("."))]
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_room_uses_the_ground_and_itself(path):
    room = path.parts[1]
    allowed = GROUND | ({room} | ROOMS[room] if room in ROOMS else BESIDE.get(room, set()))
    assert imports_of_common(path) <= allowed


def test_imports_are_relative():
    """Installed, `common` has another name (pyproject.toml)."""
    for path in FILES:
        text = (ROOT / path).read_text()
        assert not re.findall(r"^ *(?:from|import) common\b.*", text, re.MULTILINE), path


def test_there_are_four_rooms():
    assert {path.parts[1] for path in FILES if len(path.parts) > 2} == set(ROOMS)


def test_importing_a_file_does_no_work():
    """No file is written, nothing is printed, no heavy library is loaded without need."""
    code = (
        "import sys, common.config, common.files, common.run.tracking;"
        "print([n for n in ('torch', 'wandb', 'sklearn', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_python_that_is_too_old_is_noticed_at_once():
    code = "import sys; sys.version_info = (3, 10, 12, 'final', 0); import common"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: these scripts need Python 3.11 or newer, and this is 3.10"
    )
    assert done.stderr.count("\n") == 1
