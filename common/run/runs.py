"""What is a run called, where does it lie, and which finished runs can be laid side by side?"""

import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import renamed
from ..errors import UserError
from ..files import expand_home, printable, read_json, read_rows

# Flags that say where and how a run is made, not what is trained.
NOT_IN_A_NAME = (
    *("dataset", "data_dir", "run_dir", "resume", "project", "group", "tags", "tracking", "test"),
    *("log_every", "knn_images", "tsne_images", "evaluate_every", "skip_unreadable"),
)
LONGEST_NAME = 128  # characters that W&B takes
# Runs that differ in no more are repetitions; how often and on what they are evaluated decides
# which epoch is kept. The labels in a file are part of the fingerprint of the images.
NOT_IN_A_METHOD = {*NOT_IN_A_NAME, "seed", "compile", "labels"} - {"evaluate_every", "knn_images"}


def choose_run_dir(run_dir: str | None, resume: str | None, method: str, dataset: str) -> Path:
    """Return `resume`, else `run_dir`, else a new runs/METHOD-DATASET-TIME; create nothing.

    The new name ends with the W&B id if a sweep gave one, else with four digits drawn for it, since
    several runs may start in the same second.
    `UserError`: both given, `run_dir` in use, `resume` no run folder, the place not writable.
    """
    if run_dir is not None and resume is not None:
        raise UserError("--run_dir and --resume exclude each other: RUN of --resume is the folder")
    own = re.sub(r"[^\w.-]+", "-", os.environ.get("WANDB_RUN_ID", ""))[:64] or secrets.token_hex(2)
    name = f"{method}-{dataset}-{time.strftime('%Y%m%d-%H%M%S')}-{own}"
    given = resume if run_dir is None else run_dir
    path = Path("runs", name) if given is None else Path(expand_home(given))
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{path} is a broken link; remove it, or choose another folder")
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{path} is no folder; choose another one for the run")
    entries = path.iterdir() if os.path.exists(path) else []
    # a run that was killed while it started leaves no more than a lock and W&B's files
    is_used = any(entry.name[:1] != "." and entry.name != "wandb" for entry in entries)
    if is_used and resume is None:
        advice = f"continue it with --resume {path}, or choose another --run_dir"
        raise UserError(f"{path} exists; {advice}")
    if is_used and not (path / "config.json").is_file():
        raise UserError(f"--resume {path}: no run folder, since it holds no config.json")
    check_writable(path)
    return path


def check_writable(path: Path) -> None:
    """`UserError` unless the folder `path` can be made, or written to where it exists."""
    ancestor = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    if not os.path.isdir(ancestor) or not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {path}: {ancestor} is not a folder that we may write to")


def finished(run_dir: Path) -> dict | None:
    """Return the final metrics (summary.json) if the run in `run_dir` finished, else None."""
    path = Path(run_dir, "summary.json")
    return read_json(path) if os.path.exists(path) else None


def labels(method: str, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict:
    """What W&B files a run under: `name`, `group`, `job_type` and `tags`.

    The name says method, data set and what differs from the defaults, seed included:
    "supcon digits: encoder=cnn temperature=0.2". `settings` are the flags of the run, `tags`
    among them separated by commas, `defaults` those of the script.
    """
    check_project(settings["project"])
    changed = [
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in settings.items()
        if name not in NOT_IN_A_NAME and value != defaults[name]
    ]
    data = data_name(settings)
    name = f"{method} {data}" + (": " if changed else "") + " ".join(changed)
    if len(name) > LONGEST_NAME:
        name = name[: LONGEST_NAME - 1] + "…"
    tags = [method, *own_tags(data), settings["encoder"], *own_tags(settings["tags"])]
    return {
        "name": name,
        "group": settings["group"] or data,
        "job_type": method,
        "tags": list(dict.fromkeys(tags)),
    }


def data_name(settings: Mapping[str, Any]) -> str:
    """The name of the data set, or of the folder that holds the images."""
    if settings["dataset"] != "folder":
        return settings["dataset"]
    return folder_name(Path(settings["data_dir"]))[:LONGEST_NAME] or "folder"


def folder_name(folder: Path) -> str:
    """The name of a folder as text, however its path is written."""
    return printable(folder.resolve().name)


def own_tags(text: str) -> list[str]:
    """The tags in a text that separates them by commas; W&B refuses more than 64 characters."""
    return list(filter(None, (tag.strip()[:64] for tag in text.split(","))))


def check_project(name: str | None) -> None:
    """`UserError` for a name that W&B gives no project; None is fine."""
    if name is None:
        return
    if len(name) > LONGEST_NAME or any(letter in "/\\#?%:" for letter in name):
        rule = f"at most {LONGEST_NAME} characters, and none of / \\ # ? % :"
        raise UserError(f"--project {name} is no name of a project in W&B: {rule}")


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells: the flags, what was found, the final metrics, the rows.

    `settings` and `facts` are those of config.json, `summary` is summary.json, `rows` are those of
    metrics.jsonl. `method` is ae, joint, supcon or simclr. `resumed` has an entry for each time the
    run was resumed: the rows that it had by then, and the facts of the process that resumed it.
    """

    folder: Path
    method: str
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    summary: Mapping[str, float]
    rows: Sequence[Mapping[str, float]]
    resumed: Sequence[Mapping[str, Any]]

    def cost(self) -> dict[str, float]:
        """What it took: parameters, images, seconds and images per second of training, memory.

        Seconds are the mean of the epochs that were timed, times the number of epochs; of a
        network and its loss, without the classifier that the frozen encoder gets.
        """
        timed = {row["epoch"]: row for row in self.rows if "time/epoch_seconds" in row}
        means = {
            name: sum(row[name] for row in timed.values()) / len(timed)
            for name in ("time/epoch_seconds", "time/images_per_second")
            if timed
        }
        # older runs do not tell labeled images from those that the encoder learned from
        images = self.facts.get("learned_images", self.facts["train_images"])
        cost = {"parameters": self.facts["parameters"], "train_images": images}
        if timed:
            cost["training_seconds"] = means["time/epoch_seconds"] * self.settings["epochs"]
            cost["images_per_second"] = means["time/images_per_second"]
            cost["peak_gib"] = max(row["memory/peak_gib"] for row in timed.values())
        return cost


def read_run(folder: Path) -> Run:
    """Read a finished run; `UserError` says why `folder` is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run folder: it holds no config.json")
    if (summary := finished(folder)) is None:
        raise UserError(f"{folder} is not finished: it has no summary.json; --resume {folder}")
    config = read_json(folder / "config.json")
    try:
        settings, facts = renamed(config["settings"]), config["facts"]
        needed = ("fingerprint", "class_names", "parameters", "train_images")
        method, _ = facts["method"], [facts[name] for name in needed]
        if method == "supcon" and not settings.get("supervised", True):
            method = "simclr"
        _ = [settings[name] for name in ("dataset", "data_dir", "image_size", "epochs", "seed")]
        rows = read_rows(folder / "metrics.jsonl")
        resumed = [dict(entry) for entry in config.get("resumed", [])]
    except (KeyError, TypeError, ValueError, OSError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{folder} is not a run of these scripts, or damaged ({reason})") from None
    missing = [
        name
        for name in ("encoder.json", "encoder.safetensors", "classifier.safetensors")
        if not (folder / name).is_file()
    ]
    if missing:
        raise UserError(f"{folder} is damaged: it lacks {', '.join(missing)}")
    if "test/accuracy" not in summary:
        raise UserError(f"{folder} left the test images unseen (--test=False), so they stay so")
    return Run(folder, method, settings, facts, summary, rows, resumed)


def choose_runs(folders: Sequence[str]) -> tuple[list[Run], dict[str, str]]:
    """The runs that can be compared, in the order given, and why each other one is left out.

    They are those of the data set (by the fingerprint of its images) that most of them have; of
    equally many, that of the first. A run that was given or made twice counts once.
    """
    found: list[Run] = []
    left_out: dict[str, str] = {}
    for folder in folders:
        try:
            run = read_run(Path(folder))
        except UserError as error:
            left_out[folder] = str(error)
            continue
        again = [f for f in found if f.folder.resolve() == run.folder.resolve()]
        again += [f for f in found if kind_of(f) == kind_of(run) and _seed(f) == _seed(run)]
        if again:
            left_out[folder] = f"{folder} repeats {again[0].folder}: the same settings and seed"
        else:
            found.append(run)
    counts = Counter(run.facts["fingerprint"] for run in found)
    chosen = max(counts, key=counts.get, default=None)  # of equals, the one that came first
    kept = [run for run in found if run.facts["fingerprint"] == chosen]
    for run in found:
        if run.facts["fingerprint"] != chosen:
            ours, theirs = run.settings, kept[0].settings
            what = "other images"
            for name in ("dataset", "image_size"):
                if ours[name] != theirs[name]:
                    what = f"{name}={ours[name]}, the others {name}={theirs[name]}"
            left_out[str(run.folder)] = (
                f"{run.folder} learned from {what} (fingerprint {run.facts['fingerprint'][:8]}, "
                f"not {chosen[:8]})"
            )
    return kept, left_out


def kind_of(run: Run) -> str:
    """What repetitions of a run have in common: method, data and every setting but the seed."""
    settings = {k: v for k, v in run.settings.items() if k not in NOT_IN_A_METHOD}
    return json.dumps([run.method, run.facts["fingerprint"], settings], sort_keys=True)


def by_name(found: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed only together, under a short name: the method, or the folder
    of the first where several kinds have one method.
    """
    kinds: dict[str, list[Run]] = {}
    for run in found:
        kinds.setdefault(kind_of(run), []).append(run)
    methods = Counter(group[0].method for group in kinds.values())
    named: dict[str, list[Run]] = {}
    for group in kinds.values():
        first = group[0]
        name = first.method if methods[first.method] == 1 else folder_name(first.folder)
        # two folders of one name, or the name of a space that is none of a run
        while name in named or re.fullmatch(r"pixels|PCA-\d+|.* projection", name):
            name += "′"
        named[name] = group
    return named


def _seed(run: Run) -> int:
    return run.settings["seed"]
