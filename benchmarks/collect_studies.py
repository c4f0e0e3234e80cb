"""Write the part "on an equal footing" of RESULTS.md from finished studies.

    python benchmarks/collect_studies.py                      the studies in studies.jsonl
    python benchmarks/collect_studies.py STUDY ... --write    keeps these as well, writes the page

benchmarks/studies.jsonl keeps a line for each study: its settings, what it recommends, the rows of
its table, hardware and versions. A study made again with the same settings replaces its line.
"""

import dataclasses
import json
import shlex
from pathlib import Path

import collect_results
import numpy as np
from pages import collect, put_between_marks

import study
from common.errors import UserError
from common.files import read_json, read_rows, write_rows

KEPT = collect_results.ROOT / "benchmarks" / "studies.jsonl"
ROWS = (
    *("linear probe", "the method's own classifier", "5 nearest neighbors, cosine"),
    *("retrieval, mean average precision", "the same, in the projection"),
    *("linear probe, noise and shift", "reconstruction MSE", "seconds of training"),
)
FACTS = ("device", "threads", "python", "torch", "commit")  # of the runs
# flags that say how a study was run, not what it is
LOCAL = {*study.FREE, "project", "tags"}


def main(folders: list[Path], keep: bool) -> str:
    kept = read_rows(KEPT) if KEPT.exists() else []
    found = kept + [read_study(folder) for folder in folders]
    studies = {json.dumps([s["data"], s["settings"], s["jobs"]], sort_keys=True): s for s in found}
    studies = [studies[key] for key in sorted(studies)]
    text = "".join(f"\n{section(found)}" for found in studies)
    if keep:
        write_rows(KEPT, studies)
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
    names = [name for name in stored["commands"] if (folder / "runs" / name).is_dir()]
    runs = {name: collect_results.read_run(folder / "runs" / name) for name in names}
    runs = {name: run for name, run in runs.items() if run is not None}
    if not runs:
        raise UserError(f"{folder} holds no finished run; run study.py to its end")
    facts = [run["facts"] for run in runs.values()]
    sizes = {name: shape_of_latents(folder / "runs" / name) for name in runs}
    return {
        "data": next(iter(runs.values()))["data"],
        "settings": {k: v for k, v in stored["settings"].items() if k not in LOCAL},
        "jobs": stored.get("jobs", 1),
        "recommendation": [line[2:] for line in lines if line.startswith("- ")],
        "table": [table[0], *table[2:]],
        "epochs": {name: run["settings"]["epochs"] for name, run in runs.items()},
        "dimensions": {name.split("-")[0]: size for name, (_, size) in sizes.items()},
        "train_images": max(fact["train_images"] for fact in facts),
        "test_images": max(count for count, _ in sizes.values()),
        "seconds": sum(r["seconds"] for r in runs.values() if "trained_by" not in r["facts"]),
        **{name: sorted({str(fact[name]) for fact in facts}) for name in FACTS},
    }


def shape_of_latents(folder: Path) -> tuple[int, int]:
    """Number and dimensions of the latents of test images that a run has written."""
    with np.load(folder / "latents.npz") as arrays:
        return arrays["latents"].shape


def section(found: dict) -> str:
    """One study: command, recommendation, and the most important rows of its table."""
    header, *rows = found["table"]
    rows = [row for row in rows if row[0].startswith("**") or row[0] in ROWS]
    lines = [f"### {found['data']}", "", "```bash", command(found), "```", ""]
    lines += [f"- {line}" for line in found["recommendation"]]
    lines += ["", collect_results.markdown(tuple(header), rows)]
    epochs: dict[str, list[str]] = {}
    for name, count in found["epochs"].items():
        epochs.setdefault(name.rsplit("-", 1)[0], []).append(str(count))
    told = [f"{' or '.join(sorted(set(counts)))} ({name})" for name, counts in epochs.items()]
    sizes = [f"{size:,} ({name})" for name, size in found["dimensions"].items()]
    facts = {name: " or ".join(found[name]) for name in FACTS}
    seeds = found["settings"]["seeds"]
    lines.append(
        f"n = {seeds}; ± is half of a 95 % interval over {found['test_images']:,} test images"
        f"{' and over seeds' if seeds > 1 else ', and says nothing of other seeds'}. "
        f"{found['train_images']:,} training images; dimensions of the latents: "
        f"{', '.join(sizes)}; epochs: {', '.join(told)}; {found['seconds'] / 60:.0f} minutes of "
        f"training in all; {facts['device']}, threads of a run: {facts['threads']}; "
        f"Python {facts['python']}, torch {facts['torch']}; commit {facts['commit']}."
    )
    return "\n".join(lines) + "\n"


def command(found: dict) -> str:
    """The command line that repeats a study."""
    words = []
    for name, default in dataclasses.asdict(study.Config()).items():
        value = found["settings"].get(name, default)
        if value not in (default, list(default) if isinstance(default, tuple) else default):
            texts = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(f"{x:g}" if isinstance(x, float) else str(x) for x in texts)]
    if found["jobs"] > 1:
        words += ["--jobs", str(found["jobs"])]
    if found["settings"]["dataset"] == "folder":
        name = found["data"].removeprefix("Folder ")
        words += ["--data_dir", collect_results.IN_COMMANDS.get(found["data"], name)]
    return shlex.join(["python", "study.py", *words])


if __name__ == "__main__":
    collect(main, __doc__, "STUDY")
