"""Write the part "one footing" of RESULTS.md from finished studies.

    python benchmarks/collect_studies.py                      the studies in studies.jsonl
    python benchmarks/collect_studies.py STUDY ... --write    keeps these as well, writes the page

benchmarks/studies.jsonl keeps a line for each study: its settings, what it recommends, the rows of
its table, hardware and versions. A study made again with the same settings replaces its line.
"""

import argparse
import dataclasses
import json
import shlex
from pathlib import Path

import collect_results
from pages import put_between_marks

import study
from common import console
from common.errors import UserError
from common.files import read_json, read_rows, write

KEPT = collect_results.ROOT / "benchmarks" / "studies.jsonl"
ROWS = (
    *("linear probe", "the method's own classifier", "5 nearest neighbors, cosine"),
    *("retrieval, mean average precision", "reconstruction MSE", "seconds of training"),
)
# flags that say how a study was run, not what it is
LOCAL = {*study.FREE, "project", "tags"}


def main(folders: list[Path], keep: bool) -> str:
    kept = read_rows(KEPT) if KEPT.exists() else []
    found = kept + [read_study(folder) for folder in folders]
    studies = {json.dumps([s["data"], s["settings"]], sort_keys=True): s for s in found}
    studies = [studies[key] for key in sorted(studies)]
    text = "".join(f"\n{section(found)}" for found in studies)
    if keep:
        write(KEPT, "".join(json.dumps(s, sort_keys=True) + "\n" for s in studies).encode())
        page = collect_results.ROOT / "RESULTS.md"
        put_between_marks(page, *collect_results.marks("studies"), text)
    return text


def read_study(folder: Path) -> dict:
    """What is kept of a study.

    Raises:
        UserError: the folder holds none that is finished.
    """
    if not (folder / "report/study.md").exists():
        raise UserError(f"{folder} holds no finished study; run study.py to its end")
    stored = read_json(folder / "study.json")
    lines = (folder / "report/study.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in x.strip("|").split("|")] for x in lines if x[:1] == "|"]
    runs = [collect_results.read_run(folder / "runs" / name) for name in stored["commands"]]
    runs = [run for run in runs if run is not None]
    return {
        "data": runs[0]["data"],
        "settings": {k: v for k, v in stored["settings"].items() if k not in LOCAL},
        "recommendation": [line[2:] for line in lines if line.startswith("- ")],
        "table": [table[0], *table[2:]],
        "epochs": {name: epochs(command) for name, command in stored["commands"].items()},
        "train_images": max(run["facts"]["train_images"] for run in runs),
        "seconds": sum(run["seconds"] for run in runs),
        "facts": runs[0]["facts"],
        "commits": sorted({str(run["facts"]["commit"]) for run in runs}),
    }


def epochs(command: str) -> int:
    words = shlex.split(command)
    return int(words[words.index("--epochs") + 1])


def section(found: dict) -> str:
    """One study: command, recommendation, and the rows that answer it."""
    facts, (header, *rows) = found["facts"], found["table"]
    is_shown = [row[0].startswith("**") or row[0] in ROWS for row in rows]
    rows = [row for row, shown in zip(rows, is_shown, strict=True) if shown]
    lines = [f"### {found['data']}", "", "```bash", command(found), "```", ""]
    lines += [f"- {line}" for line in found["recommendation"]]
    lines += ["", collect_results.markdown(tuple(header), rows)]
    trained = {}
    for name, count in found["epochs"].items():
        trained.setdefault(name.rsplit("-", 1)[0], str(count))
    lines.append(
        f"{found['train_images']:,} training images; epochs "
        f"{', '.join(f'{count} ({name})' for name, count in trained.items())}; "
        f"{found['seconds'] / 60:.0f} minutes of training in all; {facts['device']}, "
        f"{facts['threads']} thread(s) a run; Python {facts['python']}, torch {facts['torch']}; "
        f"commit {' or '.join(found['commits'])}."
    )
    return "\n".join(lines) + "\n"


def command(found: dict) -> str:
    """The command line that repeats a study."""
    words = []
    for name, default in dataclasses.asdict(study.Config()).items():
        value = found["settings"].get(name, default)
        if value not in (default, list(default) if isinstance(default, tuple) else default):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if found["settings"]["dataset"] == "folder":
        name = found["data"].removeprefix("Folder ")
        words += ["--data_dir", collect_results.IN_COMMANDS.get(found["data"], name)]
    return shlex.join(["python", "study.py", *words])


if __name__ == "__main__":
    console.begin()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="STUDY")
    parser.add_argument("--write", action="store_true", help="keep them, and write the page anew")
    arguments = parser.parse_args()
    print(main(arguments.folders, arguments.write))
