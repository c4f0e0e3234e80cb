"""What is a run called, and where does it lie?"""

import os
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json

# Flags that say where and how a run is made, not what is trained.
NOT_IN_A_NAME = (
    *("dataset", "data_dir", "run_dir", "resume", "project", "tags", "tracking", "test"),
    *("log_every", "knn_images", "tsne_images", "evaluate_every", "skip_unreadable"),
)
LONGEST_NAME = 128  # characters that W&B takes


def choose_run_dir(run_dir: str | None, resume: str | None, method: str, dataset: str) -> Path:
    """Return `resume`, else `run_dir`, else a new runs/METHOD-DATASET-TIME; create nothing.

    The new name ends with the W&B id if a sweep gave one: its agents start in the same second.
    `UserError`: both given, `run_dir` in use, `resume` no run folder, the place not writable.
    """
    if run_dir is not None and resume is not None:
        raise UserError("--run_dir and --resume exclude each other: --resume RUN goes on in RUN")
    parts = (method, dataset, time.strftime("%Y%m%d-%H%M%S"), os.environ.get("WANDB_RUN_ID"))
    name = "-".join(filter(None, parts))
    paths = (Path("runs", name if number == 1 else f"{name}-{number}") for number in count(1))
    given = resume if run_dir is None else run_dir
    path = next(path for path in paths if not path.exists()) if given is None else Path(given)
    entries = path.iterdir() if path.is_dir() else [path] if path.exists() else []
    # a run that was killed while it started leaves no more than a lock and W&B's files
    is_used = any(entry.name[:1] != "." and entry.name != "wandb" for entry in entries)
    if is_used and resume is None:
        advice = f"continue it with --resume {path}, or choose another --run_dir"
        raise UserError(f"{path} exists; {advice}")
    if is_used and not (path / "config.json").is_file():
        raise UserError(f"--resume {path}: no run folder, since it holds no config.json")
    ancestor = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {path}: {ancestor} is not a folder that we may write to")
    return path


def finished(run_dir: Path) -> dict | None:
    """Return the final metrics (summary.json) if the run in `run_dir` finished, else None."""
    return read_json(path) if (path := Path(run_dir, "summary.json")).exists() else None


def labels(method: str, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict:
    """What W&B files a run under: `name`, `group`, `job_type` and `tags`.

    The name says method, data set and what differs from the defaults, seed included:
    "supcon digits: encoder=cnn temperature=0.2". `settings` are the flags of the run, `tags`
    among them separated by commas, `defaults` those of the script.
    """
    changed = [
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in settings.items()
        if name not in NOT_IN_A_NAME and value != defaults[name]
    ]
    name = f"{method} {settings['dataset']}" + (": " if changed else "") + " ".join(changed)
    if len(name) > LONGEST_NAME:
        name = name[: LONGEST_NAME - 1] + "…"
    own = (tag.strip()[:64] for tag in settings["tags"].split(","))  # W&B refuses longer ones
    tags = [method, settings["dataset"], settings["encoder"], *filter(None, own)]
    return {
        "name": name,
        "group": settings["dataset"],
        "job_type": method,
        "tags": list(dict.fromkeys(tags)),
    }
