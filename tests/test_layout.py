"""The shape of the code: what the design draws is what the files do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {"errors", "files", "runtime", "health", "memory"}
ALLOWED = {
    "augmentation": GROUND | {"colours"},
    "evaluation": GROUND | {"probes", "neighbours", "geometry", "plots"},
    "folders": GROUND | {"decoding"},
    "comparison": GROUND | {"evaluation", "probes", "neighbours", "geometry", "robustness"},
    "sheet": GROUND | {"plots"},
    "tracking": GROUND | {"wandb_runs"},
}
SCRIPTS = [*sorted(ROOT.glob("train_*.py")), ROOT / "compare.py"]


def imports_of_common(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "common":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in names if parts[0] == "common" and len(parts) > 1}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "common").glob("*.py")), ids=lambda p: p.stem)
def test_common_is_a_star_on_a_small_ground(path):
    assert imports_of_common(path) <= ALLOWED.get(path.stem, GROUND)


@pytest.mark.parametrize("path", sorted((ROOT / "common").glob("*.py")), ids=lambda p: p.stem)
def test_every_file_of_common_says_which_question_it_answers(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    if path.stem not in ("__init__", "errors"):
        assert "?" in docstring.splitlines()[0]


def test_there_are_scripts_and_each_is_short_enough_to_read():
    assert [path.stem for path in SCRIPTS] >= ["train_ae"]
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) <= 350


def test_importing_a_file_does_no_work():
    """No file is written, nothing is printed, no heavy library is loaded without need."""
    code = (
        "import sys, common.config, common.files, common.schedules, common.tracking;"
        "print([n for n in ('torch', 'wandb', 'sklearn', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
