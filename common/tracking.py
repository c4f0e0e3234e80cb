"""Where do numbers and pictures go?   W&B, the run folder, the progress bar

A run folder is whole without W&B: whatever happens to the login, the network or the server, the
training goes on. Only a sweep insists on W&B, since a run that it cannot see is lost to it.
"""

import contextlib
import functools
import io
import json
import os
import re
import secrets
import shlex
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_write, lock, made, read_json, write_json

CODE = Path(__file__).parents[1]
PER_EPOCH = ("val", "test", "projection", "latent", "image", "pca", "time", "memory")
MODES = ("auto", "online", "offline", "disabled")
# seconds; W&B itself waits 90 for a server at the start, and for ever at the end
LIMITS = {"init_timeout": 20, "finish_timeout": 300, "finish_timeout_raises": True}


def open_tracker(
    run_dir: Path, *, settings: Mapping[str, str | int | float | bool | None],
    facts: Mapping[str, Any], labels: Mapping[str, Any], mode: str, project: str,
    keep_rows: int | None, is_main: bool,
) -> "Tracker | NullTracker":  # fmt: skip
    """Lock the run folder (made if missing) and start W&B; a `NullTracker` unless `is_main`.

    `settings` (the flags) and `facts` (what was found: versions, device, ...) are plain JSON for
    config.json and W&B, `labels` W&B's name, group, job_type and tags. `mode`, one of MODES: auto
    asks WANDB_MODE, then goes online if there is a login. `keep_rows=None` starts with no rows; a
    number resumes with that many (those that the checkpoint knows of), the first settings and the
    W&B id; `facts` join the list "resumed". `UserError`: unknown mode, or online without a login;
    the folder is in use or finished; in a sweep: W&B does not start, or recorded other settings.
    """
    if not is_main:
        return NullTracker()
    run_dir = Path(run_dir)
    with made(run_dir), contextlib.ExitStack() as held:  # if anything fails, unlock it again
        held.enter_context(lock(run_dir / ".lock", busy=f"{run_dir} is in use by another process"))
        if (run_dir / "summary.json").exists():
            raise UserError(f"{run_dir} holds a finished run; choose another --run_dir")
        if keep_rows is None:
            # a start over gets a new id, too: under the old one W&B drops steps that it has seen
            wandb_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            config = {"settings": dict(settings), "facts": {**facts, "wandb_id": wandb_id}}
        else:
            config = read_json(run_dir / "config.json")
            config.setdefault("resumed", []).append({"rows": keep_rows, **facts})
        words = dict(labels)
        if "WANDB_SWEEP_ID" not in os.environ:  # a sweep sets these two itself
            words |= {"project": project, "id": config["facts"]["wandb_id"]}
        words |= {"resume": None if keep_rows is None else "allow", "dir": str(run_dir)}
        run = _start_wandb(mode, settings, facts, words)
        path = run_dir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if keep_rows and path.exists() else []
        rows = [line for line in lines[:keep_rows] if line.endswith(b"\n")]
        if len(rows) < (keep_rows or 0):  # the power failed
            say(f"{path} has only {len(rows)} of the {keep_rows} rows that the checkpoint knows of")
        with atomic_write(path) as file:
            file.writelines(rows)
        write_json(run_dir / "config.json", config)
        (run_dir / "figures").mkdir(exist_ok=True)
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        return Tracker(run_dir, run, rows, held.pop_all())


class Tracker:
    """The run folder and W&B run of the main process; steps that go down are a `ValueError`.

    W&B's summary holds the last value of each metric under its own name, and beside it those of
    the chosen epoch as "best/…". define_metric(summary="max") is not used: it would replace the
    number by {"max": x} and join the best values of different epochs.
    """

    def __init__(self, run_dir: Path, run: Any, rows: list[bytes], held: contextlib.ExitStack):
        self.rows = len(rows)  # in metrics.jsonl so far; belongs into every checkpoint
        self._last_step = json.loads(rows[-1])["step"] if rows else 0
        self._run_dir, self._run, self._held = run_dir, run, held
        self._is_wandb_well = True
        if run is not None:
            held.callback(setattr, sys, "excepthook", sys.excepthook)
            sys.excepthook = functools.partial(_crashed, weakref.ref(self), sys.excepthook)

    def log(self, row: Mapping[str, float], step: int, epoch: int) -> None:
        """Append one row: Python or NumPy numbers or one-element tensors, NaN included."""
        row = {"epoch": epoch, **{name: _cell(value) for name, value in row.items()}}
        self._send(step, lambda wandb: row)
        with open(self._run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        self.rows += 1

    def figure(self, name: str, figure: Any, caption: str, step: int) -> None:
        """Save a Matplotlib figure as figures/NAME.png, atomically, and show it in W&B."""
        path = self._run_dir / "figures" / f"{name}.png"
        with atomic_write(path) as file:
            figure.savefig(file, format="png")
        self._send(step, lambda w: {f"figures/{name}": w.Image(str(path), caption=caption)})

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence], step: int) -> None:
        """Send a table to W&B; cells that are uint8 (C,H,W) with C = 1 or 3 become pictures."""
        names = list(columns)
        self._send(step, lambda w: {key: w.Table(names, [[_cell(v) for v in row] for row in rows])})

    def confusion(
        self, labels: Sequence[int], predictions: Sequence[int], class_names: list[str], step: int
    ) -> None:
        """Send how class numbers `labels` and `predictions`, both (N,), agree: matrix and bars."""
        pairs = [int(label) for label in labels], [int(label) for label in predictions]
        words = *pairs, list(class_names), "Confusion matrix: true and predicted class"
        hits = {name: [] for name in class_names}
        for label, prediction in zip(*pairs, strict=True):
            hits[class_names[label]].append(label == prediction)
        bars = [[name, sum(found) / len(found)] for name, found in hits.items() if found]

        def charts(w) -> dict[str, Any]:
            axes = "class", "accuracy"
            bar = w.plot.bar(w.Table(list(axes), bars), *axes, "Accuracy of each class")
            matrix = w.plot.confusion_matrix(None, *words)
            return {"tables/confusion_matrix": matrix, "tables/class_accuracy": bar}

        self._send(step, charts)

    def artifact(
        self, name: str, kind: str, files: Sequence[Path], metadata: Mapping, aliases: Sequence[str]
    ) -> None:
        """Send files to W&B, uncopied: they may not change until the run is finished or synced."""
        if self._run is not None:
            import wandb

            valid_name = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:128]
            artifact = wandb.Artifact(valid_name, type=kind, metadata=dict(metadata))
            for file in files:  # by default W&B copies each to its staging folder and its cache
                artifact.add_file(str(file), policy="immutable", skip_cache=True)
            self._try(lambda run: run.log_artifact(artifact, aliases=list(aliases)))

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
            lines = self._finish_wandb(exit_code=0)
        finally:  # whoever interrupts a slow upload has a finished run all the same
            write_json(self._run_dir / "summary.json", summary)
            self._held.close()
        return [*lines, f"figures:      {self._run_dir / 'figures'}"]

    def stop(self, exit_code: int, reason: str = "") -> None:
        """Leave an unfinished run, unlocked; in W&B it failed, and a reason becomes an alert."""
        if reason:
            self._alert(reason)
        self._finish_wandb(exit_code)
        self._held.close()

    def _alert(self, reason: str) -> None:
        title = f"{self._run and self._run.name} failed"
        self._try(lambda run: run.alert(title[:64], reason[:1000], level="ERROR"))

    def _send(self, step: int, build: Callable[[Any], dict[str, Any]]) -> None:
        if step < self._last_step:  # W&B would drop the row with no more than a warning
            raise ValueError(f"step {step} comes after step {self._last_step}")
        self._last_step = step
        # after a resume W&B can be ahead of the checkpoint and would refuse the rows that it has;
        # what comes at its very last step may be new (the final evaluation) and moves up by one
        if self._run is not None and step >= self._run.starting_step - 1:
            import wandb

            values = build(wandb)  # outside of _try: a mistake in here is ours and should be seen
            self._try(lambda run: run.log(values, step=max(step, run.starting_step)))

    def _try(self, action: Callable[[Any], Any]) -> None:
        try:
            if self._run is not None:
                action(self._run)
        except Exception as error:  # W&B's process died, the server is gone, ...
            say(f"W&B: {error}".splitlines()[0], is_main=self._is_wandb_well)
            self._is_wandb_well = False  # once is enough

    def _finish_wandb(self, exit_code: int) -> list[str]:
        run, self._run = self._run, None
        if run is None:
            return []
        folder = f"{shlex.quote(str(self._run_dir))}/wandb"
        part = f"{folder}/{Path(run.dir).parent.name}"
        parts = f"{folder}/offline-run-*"  # one for each time it was resumed
        where = f"send to W&B:  wandb sync {parts}" if run.offline else f"W&B:          {run.url}"
        try:
            run.finish(exit_code)
        except Exception as error:  # TimeoutError: no server; all of it is on the disk
            say(f"W&B did not get everything: {error}".splitlines()[0])
            where = f"send to W&B:  wandb sync --include-online {part}"
        return [where, f"look at it:   wandb leet {part}"]


class NullTracker:
    """What the other processes get: every method of `Tracker`, and none does anything."""

    rows = 0

    def log(self, row, step, epoch) -> None: ...
    def figure(self, name, figure, caption, step) -> None: ...
    def table(self, key, columns, rows, step) -> None: ...
    def confusion(self, labels, predictions, class_names, step) -> None: ...
    def artifact(self, name, kind, files, metadata, aliases) -> None: ...
    def best(self, values) -> None: ...
    def stop(self, exit_code, reason="") -> None: ...
    def finish(self, summary) -> list[str]:
        return []


def progress(total: int, description: str, is_main: bool) -> tqdm:
    """Return a bar over `total` steps on stderr; silent if that is no terminal or not `is_main`."""
    silent = not (is_main and sys.stderr.isatty())
    return tqdm(total=total, desc=description, disable=silent, dynamic_ncols=True, leave=False)


def say(line: str, is_main: bool = True) -> None:
    """Print a line to stdout at once, without tearing a progress bar."""
    if is_main:
        tqdm.write(line)
        sys.stdout.flush()


def _start_wandb(mode: str, settings: Mapping, facts: Mapping, words: dict[str, Any]) -> Any:
    """Return W&B's run: online if wanted and possible, else offline, else None; ask nobody."""
    mode = (os.environ.get("WANDB_MODE") or mode) if mode == "auto" else mode
    if mode not in MODES:
        raise UserError(f"W&B mode {mode!r} (--tracking, WANDB_MODE): use {', '.join(MODES)}")
    in_sweep, service = "WANDB_SWEEP_ID" in os.environ, os.environ.get("WANDB_SERVICE")
    must_start = in_sweep or mode == "online"
    for attempt in {"disabled": (), "offline": ("offline",)}.get(mode, ("online", "offline")):
        try:
            import wandb

            wandb.teardown(exit_code=1)  # a failed attempt keeps the id; a broken run is still open
            with contextlib.redirect_stderr(io.StringIO()):  # it would tell who is logged in
                if attempt == "online" and not wandb.login(prompt=False, verify=False):
                    raise wandb.errors.UsageError("no login (wandb login)")
            must_start = in_sweep  # with a login, only the server can be missing
            # online, "silent" would hide a failed upload as well
            words["settings"] = wandb.Settings(quiet=True, silent=attempt == "offline", **LIMITS)
            run = wandb.init(mode=attempt, config={**settings, **facts}, save_code=True, **words)
            run.define_metric("epoch", hidden=True)
            for section in PER_EPOCH:
                run.define_metric(f"{section}/*", step_metric="epoch")
            for key, used in settings.items() if in_sweep else ():
                recorded = run.config.get(key, used)  # the sweep's, whatever the script was told
                if recorded not in (used, str(used)):
                    run.finish(exit_code=1)  # W&B takes a SystemExit that was raised for success
                    raise UserError(f"{key}: W&B records {recorded!r}, the script used {used!r}")
            code = wandb.Artifact("code", type="code")  # log_code would walk through data/, too
            for path in (*CODE.glob("*.py"), *CODE.glob("common/*.py")):
                code.add_file(str(path), name=str(path.relative_to(CODE)), skip_cache=True)
            run.log_artifact(code)
            return run
        except Exception as error:  # no wandb, no login, no server, no such project, ...
            problem = f"W&B does not start {attempt}: {error}".splitlines()[0]
            if must_start:
                raise UserError(problem) from None
            say(problem)
            if isinstance(error, ImportError | AttributeError):  # a folder ./wandb, say, is empty
                return None
        finally:
            if service is None:  # W&B sets it, and programs that we start would join its process
                os.environ.pop("WANDB_SERVICE", None)
    return None


def _crashed(tracker: weakref.ref, then: Callable, kind: type, error: Any, trace: Any) -> None:
    """What Python calls when nobody catches an error: W&B sees that it came, but not which."""
    if (alive := tracker()) is not None and issubclass(kind, Exception):
        alive._alert(f"{kind.__name__}: {error}")
    then(kind, error, trace)


def _cell(value: Any) -> Any:
    if getattr(value, "ndim", 0) != 3:
        return value.item() if hasattr(value, "item") else value
    import wandb

    return wandb.Image(np.asarray(value).transpose(1, 2, 0))  # (H,W,C)
