"""Where do numbers and pictures go?   W&B, the run folder

A run folder is whole without W&B: whatever happens to the login, the network or the server, the
training goes on. Only a sweep insists on W&B, since a run that it cannot see is lost to it.
"""

import contextlib
import glob
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..console import say
from ..errors import UserError
from ..files import (
    append,
    lock,
    made,
    make_folder,
    read_json,
    remove_parts,
    room_for,
    write,
    write_json,
)
from . import wandb_backend

PROJECT = "latent-spaces"  # where neither a flag nor W&B's own settings name one
CONFUSED = ("class", "images", "accuracy", "mistaken for", "times")


def open_tracker(
    run_dir: Path, *, settings: Mapping[str, str | int | float | bool | None],
    facts: Mapping[str, Any], labels: Mapping[str, Any], mode: str, project: str | None,
    keep_rows: int | None, is_main: bool,
) -> "Tracker | NullTracker":  # fmt: skip
    """Lock the run folder (made if missing) and start W&B; a `NullTracker` unless `is_main`.

    `settings` (the flags) and `facts` (what was found: versions, device, ...) are plain JSON for
    config.json and W&B, `labels` W&B's name, group, job_type and tags, which its own variables and
    settings files replace where no flag says otherwise. `mode`: auto, online, offline or disabled;
    auto asks WANDB_MODE and the settings files, then goes online if there is a login.
    `keep_rows=None` starts with no rows; a number resumes with that many (those that the
    checkpoint knows of), the first settings and the W&B id; `facts` join the list "resumed".
    `UserError`: unknown mode, or online without a login; the folder is in use or finished, or the
    disk full; in a sweep: W&B does not start, or recorded other settings.
    """
    if not is_main:
        return NullTracker()
    run_dir = Path(run_dir)
    # the stack gives the lock back if anything below fails
    with room_for(run_dir, 2**20), made(run_dir), contextlib.ExitStack() as held:
        held.enter_context(lock(run_dir / ".lock", busy=f"{run_dir} is in use by another process"))
        if (run_dir / "summary.json").exists():
            raise UserError(f"{run_dir} holds a finished run; choose another --run_dir")
        for folder in (run_dir, run_dir / "checkpoints", run_dir / "figures"):
            if folder.exists():
                make_folder(folder)  # refuses a file of that name
                remove_parts(folder)
        path = run_dir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        rows = [line for line in lines[: keep_rows or 0] if line.endswith(b"\n")]
        last_step = _step(path, rows)
        if keep_rows is None:
            # a start over gets a new id, too: under the old one W&B drops steps that it has seen
            wandb_id = wandb_backend.new_id()
            if (run_dir / "config.json").exists() and not lines:  # it has seen none
                wandb_id = _begun(run_dir)["facts"]["wandb_id"]
            config = {"settings": dict(settings), "facts": {**facts, "wandb_id": wandb_id}}
        else:
            config = _begun(run_dir)
            if not config.pop("is_new", False):  # `checkpoints.branch` has just made it
                config.setdefault("resumed", []).append({"rows": keep_rows, **facts})
        words = dict(labels)
        if "WANDB_SWEEP_ID" not in os.environ:  # a sweep sets these two itself
            words |= {"project": project or PROJECT, "id": config["facts"]["wandb_id"]}
            words |= config.get("wandb", {})  # a resumed run stays where it began
        words |= {"resume": None if keep_rows is None else "allow", "dir": str(run_dir)}
        run, problems = wandb_backend.start(mode, settings, facts, words)
        for problem in problems:
            say(problem)
        if run is not None:
            config["wandb"] = {"project": run.project, "entity": run.entity or None}
        if len(rows) < (keep_rows or 0):  # the power failed
            say(f"{path} has only {len(rows)} of the {keep_rows} rows that the checkpoint knows of")
        write(path, b"".join(rows))
        write_json(run_dir / "config.json", config)
        (run_dir / "figures").mkdir(exist_ok=True)
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        tracker = Tracker(run_dir, run, len(rows), last_step, held.pop_all())
        tracker._send_again(rows)
        return tracker


def _begun(run_dir: Path) -> dict[str, Any]:
    """The config.json of a run that was begun. `UserError` where it holds no such facts."""
    config = read_json(run_dir / "config.json")
    try:
        _ = config["facts"]["wandb_id"]
    except (KeyError, TypeError):
        raise UserError(
            f"{run_dir}/config.json holds no facts of a run; restore a copy of it"
        ) from None
    return config


def _step(path: Path, rows: Sequence[bytes]) -> int:
    """The step of the last row, 0 if there is none. `UserError` if it is no row of a log."""
    try:
        return json.loads(rows[-1])["step"] if rows else 0
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged: its row {len(rows)} is none of a log; restore a copy of it"
        ) from None


class Tracker:
    """The run folder and W&B run of the main process; steps that go down are a `ValueError`.

    W&B's summary holds the last value of each metric under its own name, and beside it those of
    the chosen epoch as "best/…". define_metric(summary="max") is not used: it would replace the
    number by {"max": x} and join the best values of different epochs.
    """

    def __init__(
        self, run_dir: Path, run: Any, rows: int, last_step: int, held: contextlib.ExitStack
    ):
        self.rows = rows  # in metrics.jsonl so far; belongs into every checkpoint
        self._last_step = last_step
        self._run_dir, self._run, self._held = run_dir, run, held
        self._is_wandb_well = True

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, error: Any, trace: Any) -> None:
        """An error that leaves the block stops the run: W&B sees that it failed, and why."""
        if kind is not None:  # W&B would take a SystemExit for success
            is_stop = issubclass(kind, SystemExit)
            reason = "" if is_stop or kind is KeyboardInterrupt else str(error) or kind.__name__
            self.stop(error.code if is_stop else 1, reason)

    def _send_again(self, lines: Sequence[bytes]) -> None:
        """Send those rows of metrics.jsonl that W&B lacks.

        A server holds back the last step until the next one, and a run that is killed takes that
        with it; of a run that began offline it has none. Offline, an earlier part has them all.
        """
        if not lines or self._run is None or (self._run.offline and self._has_earlier_part()):
            return
        for row in map(json.loads, lines):
            if (step := row.pop("step")) >= self._run.starting_step:
                self._try(lambda run, row=row, step=step: run.log(row, step=step))

    def _has_earlier_part(self) -> bool:
        place = Path(self._run.dir).parents[1]
        return len(list(place.glob(f"*run-*-{glob.escape(self._run.id)}"))) > 1

    def log(self, row: Mapping[str, float], step: int, epoch: int) -> None:
        """Append one row: Python or NumPy numbers or one-element tensors, NaN included."""
        row = {"epoch": epoch, **{name: _cell(value) for name, value in row.items()}}
        self._send(step, lambda wandb: row)
        line = json.dumps({"step": step, **row}) + "\n"
        append(self._run_dir / "metrics.jsonl", line.encode())
        self.rows += 1

    def figure(self, name: str, png: bytes, caption: str, step: int) -> None:
        """Write a picture to figures/NAME.png, atomically, and show it in W&B."""
        path = self._run_dir / "figures" / f"{name}.png"
        write(path, png)
        self._send(step, lambda w: {f"figures/{name}": w.Image(str(path), caption=caption)})

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence], step: int) -> None:
        """Send a table to W&B; cells that are uint8 (C,H,W) with C = 1 or 3 become pictures."""
        cells = lambda: ([_cell(value) for value in row] for row in rows)  # noqa: E731
        self._send(step, lambda wandb: {key: _table(wandb, key, columns, list(cells()))})

    def confusion(
        self, labels: Sequence[int], predictions: Sequence[int], class_names: list[str], step: int
    ) -> None:
        """Send how class numbers `labels` and `predictions`, both (N,), agree: matrix and bars.

        W&B's matrix is a table of all pairs of classes, and it cuts off long tables. Then a table
        takes its place that names for each class the one that it is taken for most often.
        """
        pairs = [int(label) for label in labels], [int(label) for label in predictions]
        words = *pairs, list(class_names), "Confusion matrix: true and predicted class"
        guesses = [Counter() for _ in class_names]
        for label, prediction in zip(*pairs, strict=True):
            guesses[label][prediction] += 1
        bars = [
            [name, found[k] / found.total()]
            for k, (name, found) in enumerate(zip(class_names, guesses, strict=True))
            if found
        ]

        def charts(w) -> dict[str, Any]:
            axes = "class", "accuracy"
            table = _table(w, "tables/class_accuracy", axes, bars)
            bar = w.plot.bar(table, *axes, "Accuracy of each class")
            if len(class_names) ** 2 <= w.Table.MAX_ROWS:
                matrix = w.plot.confusion_matrix(None, *words)
                return {"tables/confusion_matrix": matrix, "tables/class_accuracy": bar}
            say(
                f"W&B: its confusion matrix has no room for {len(class_names)} classes; "
                "tables/confusions takes its place"
            )
            rows = confused(class_names, guesses)
            table = _table(w, "tables/confusions", CONFUSED, rows)
            return {"tables/confusions": table, "tables/class_accuracy": bar}

        self._send(step, charts)

    def artifact(
        self, name: str, kind: str, files: Sequence[Path], metadata: Mapping, aliases: Sequence[str]
    ) -> None:
        """Send files to W&B as NAME-ID of the run, so that its aliases are those of this run.

        They are not copied, and may not change until the run is finished or synced.
        """
        if self._run is not None:
            import wandb

            # its JSON has no infinity and no NaN
            finite = {k: v if math.isfinite(v) else str(v) for k, v in metadata.items()}

            def send(run: Any) -> None:
                valid = re.sub(r"[^\w.-]+", "-", f"{name[:60]}-{run.id}", flags=re.ASCII)[:128]
                artifact = wandb.Artifact(valid, type=kind, metadata=finite)
                for file in files:  # by default W&B copies each to its staging folder and its cache
                    artifact.add_file(str(file), policy="immutable", skip_cache=True)
                run.log_artifact(artifact, aliases=list(aliases))

            self._try(send)

    def best(self, values: Mapping[str, float]) -> None:
        """Put the chosen epoch's values into W&B's summary, as "best/NAME"."""
        best = {f"best/{name}": _cell(value) for name, value in values.items()}
        self._try(lambda run: run.summary.update(best))

    def finish(self, summary: Mapping[str, float]) -> list[str]:
        """End W&B's run, then write summary.json; return the lines that say where to look."""
        summary = {name: _cell(value) for name, value in summary.items()}
        self._try(lambda run: run.log({}, commit=True))  # a pending row would overwrite these
        self._try(lambda run: run.summary.update(summary))
        try:
            problem, lines = self._finish_wandb(exit_code=0)
        finally:  # whoever interrupts a slow upload has a finished run all the same
            write_json(self._run_dir / "summary.json", summary)
            self._held.close()
        if problem:
            say(problem)
        return [f"figures:      {self._run_dir / 'figures'}", *lines]

    def stop(self, exit_code: int, reason: str = "") -> None:
        """Leave an unfinished run, unlocked; in W&B it failed, and a reason becomes an alert."""
        if reason:
            title = f"{self._run and self._run.name} failed"
            self._try(lambda run: run.alert(title[:64], reason[:1000], level="ERROR"))
        problem, lines = self._finish_wandb(exit_code)
        if problem:
            say(f"{problem}\n{lines[-1]}")
        self._held.close()

    def _send(self, step: int, build: Callable[[Any], dict[str, Any]]) -> None:
        if step < self._last_step:  # W&B would drop the row with no more than a warning
            raise ValueError(f"step {step} comes after step {self._last_step}")
        self._last_step = step
        # after a resume W&B can be ahead of the checkpoint and would refuse the rows that it has;
        # what comes at its very last step may be new (the final evaluation) and moves up by one
        if self._run is not None and step >= self._run.starting_step - 1:
            import wandb

            # W&B refuses some values only when it is given them, others when they are built
            self._try(lambda run: run.log(build(wandb), step=max(step, run.starting_step)))

    def _try(self, action: Callable[[Any], Any]) -> None:
        try:
            if self._run is not None:
                action(self._run)
        except Exception as error:  # W&B's process died, the server is gone, ...
            reason = str(error) or type(error).__name__
            say(f"W&B: {reason}".splitlines()[0], is_main=self._is_wandb_well)
            self._is_wandb_well = False  # once is enough

    def _finish_wandb(self, exit_code: int) -> tuple[str, list[str]]:
        run, self._run = self._run, None
        return ("", []) if run is None else wandb_backend.finish(run, self._run_dir, exit_code)


class NullTracker:
    """What the other processes get: every method of `Tracker`, and none does anything."""

    rows = 0

    def __enter__(self) -> "NullTracker":
        return self

    def __exit__(self, kind, error, trace) -> None: ...
    def log(self, row, step, epoch) -> None: ...
    def figure(self, name, png, caption, step) -> None: ...
    def table(self, key, columns, rows, step) -> None: ...
    def confusion(self, labels, predictions, class_names, step) -> None: ...
    def artifact(self, name, kind, files, metadata, aliases) -> None: ...
    def best(self, values) -> None: ...
    def stop(self, exit_code, reason="") -> None: ...
    def finish(self, summary) -> list[str]:
        return []


def confused(class_names: Sequence[str], guesses: Sequence[Counter]) -> list[list[Any]]:
    """For each class the rows of the columns `CONFUSED`; `guesses` counts its predicted classes.

    Its accuracy is None where it has no images; the last two are where nothing is mistaken.
    """
    rows = []
    for number, (name, found) in enumerate(zip(class_names, guesses, strict=True)):
        wrong = [(k, count) for k, count in found.most_common() if k != number]
        other, count = (class_names[wrong[0][0]], wrong[0][1]) if wrong else (None, 0)
        accuracy = found[number] / found.total() if found else None
        rows.append([name, found.total(), accuracy, other, count])
    return rows


def _table(wandb: Any, key: str, columns: Sequence[str], rows: Sequence[Sequence]) -> Any:
    """W&B's table; the rows that it has no room for are left out, and that is said."""
    most = wandb.Table.MAX_ROWS
    if len(rows) > most:
        say(f"W&B: {key} shows the first {most:,} of {len(rows):,} rows; a table holds no more")
    rows = [list(row) for row in rows[:most]]
    # W&B checks the type of each cell, which takes seconds; one row of each kind is enough
    kinds = {tuple(map(type, row)): row for row in rows}
    table = wandb.Table(list(columns), list(kinds.values()))
    table.data = rows
    return table


def _cell(value: Any) -> Any:
    if getattr(value, "ndim", 0) != 3:
        return value.item() if hasattr(value, "item") else value
    import wandb

    return wandb.Image(np.asarray(value).transpose(1, 2, 0))  # (H,W,C)
