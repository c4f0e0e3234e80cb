"""The part of RESULTS.md on studies comes from their folders."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import collect_results  # noqa: E402
import collect_studies  # noqa: E402

TABLE = """# Recommendation

- highest accuracy with all labels: joint (71.2%), 14.0 ± 1.0 points above ae

# Measurements

| on the test images | ae | joint |
| --- | ---: | ---: |
| **all labels** |  |  |
| linear probe | 43.04% ± 0.97% | **71.22% ± 0.89%** |
| silhouette | -0.061 | 0.052 |
| seconds of training | 285 | 319 |
"""


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The folder of a finished study, and pages and records of its own."""
    folder = tmp_path / "runs/study"
    settings = {
        "dataset": "mnist", "methods": ["ae", "joint"], "labels_per_class": ["all"], "epochs": None,
        "width": 32, "minutes": 2.0, "tags": "mine", "seeds": 1,
    }  # fmt: skip
    words = "--data_dir data --epochs 3"
    commands = {f"{m}-all-seed0": f"python train_{m}.py {words}" for m in ("ae", "joint")}
    (folder / "report").mkdir(parents=True)
    stored = json.dumps({"settings": settings, "commands": commands, "jobs": 2})
    for name, size in zip(commands, (128, 2048), strict=True):
        (folder / "runs" / name).mkdir(parents=True)
        np.savez(folder / "runs" / name / "latents.npz", latents=np.zeros((50, size)))
    (folder / "study.json").write_text(stored)
    (folder / "report/study.md").write_text(TABLE)
    facts = {"train_images": 54000, "device": "a chip", "threads": 2, "python": "3.11.7"}
    facts |= {"torch": "2.14.1", "commit": "abc"}
    run = {"data": "MNIST", "seconds": 90.0, "facts": facts, "settings": {"epochs": 3}}
    monkeypatch.setattr(collect_results, "read_run", lambda folder: run)
    begin, end = collect_results.marks("studies")
    (tmp_path / "RESULTS.md").write_text(f"before\n{begin}old\n{end}after\n")
    monkeypatch.setattr(collect_results, "ROOT", tmp_path)
    monkeypatch.setattr(collect_studies, "KEPT", tmp_path / "studies.jsonl")
    return folder


def test_a_study_becomes_a_section_and_is_kept(finished, tmp_path):
    text = collect_studies.main([finished], keep=True)
    assert text.splitlines() == [
        "",
        "### MNIST",
        "",
        "```bash",
        "python study.py --dataset mnist --methods ae joint --seeds 1 --minutes 2 --jobs 2",
        "```",
        "",
        "- highest accuracy with all labels: joint (71.2%), 14.0 ± 1.0 points above ae",
        "",
        "| on the test images | ae | joint |",
        "| --- | --- | --- |",
        "| **all labels** |  |  |",
        "| linear probe | 43.04% ± 0.97% | **71.22% ± 0.89%** |",
        "| seconds of training | 285 | 319 |",
        "",
        "n = 1; ± is half of a 95 % interval over 50 test images, and says nothing of other seeds. "
        "54,000 training images; dimensions of the latents: 128 (ae), 2,048 (joint); epochs: 3 "
        "(ae-all), 3 (joint-all); 3 minutes of training in all; a chip, threads of a run: 2; "
        "Python 3.11.7, torch 2.14.1; commit abc.",
    ]
    begin, end = collect_results.marks("studies")
    assert (tmp_path / "RESULTS.md").read_text() == f"before\n{begin}{text}{end}after\n"
    assert collect_studies.main([], keep=False) == text
    collect_studies.main([finished], keep=True)  # made again, it replaces its line
    assert len((tmp_path / "studies.jsonl").read_text().splitlines()) == 1


def test_a_training_that_several_runs_share_counts_once(finished, monkeypatch):
    whole = collect_studies.read_study(finished)["seconds"]
    run = collect_results.read_run(finished)
    shared = run | {"facts": run["facts"] | {"trained_by": "ae-all-seed0"}}
    runs = {"ae-all-seed0": run, "joint-all-seed0": shared}
    monkeypatch.setattr(collect_results, "read_run", lambda folder: runs[folder.name])
    assert (whole, collect_studies.read_study(finished)["seconds"]) == (180, 90)


def test_a_study_without_a_finished_run_is_refused(finished, monkeypatch):
    monkeypatch.setattr(collect_results, "read_run", lambda folder: None)
    with pytest.raises(UserError, match="holds no finished run"):
        collect_studies.read_study(finished)


def test_an_unfinished_study_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no finished study; run study.py to its end"):
        collect_studies.read_study(tmp_path)


def test_the_page_holds_what_is_kept():
    begin, end = collect_results.marks("studies")
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert text.partition(begin)[2].partition(end)[0] == collect_studies.main([], keep=False)
