"""How does a run of W&B start, and how does it end?   nobody is asked, nobody waits for long

W&B's process (wandb-core) writes all that is logged to a file in the run folder, and uploads from
there. So when the server is away, ending that process costs nothing but a later `wandb sync`.
"""

import contextlib
import io
import os
import shlex
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from common.errors import UserError

CODE = Path(__file__).parents[2]
PER_EPOCH = ("val", "test", "projection", "latent", "image", "pca", "time", "memory")
MODES = ("auto", "online", "offline", "disabled")
# seconds; W&B itself waits 90 for a server at the start, and for ever at the end
LIMITS = {"init_timeout": 20, "finish_timeout": 300, "finish_timeout_raises": True}
ENVIRONMENT = {
    "WANDB_ERROR_REPORTING": "false",  # would hold up the exit for 10 s when the server hangs
    "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # s; else kill -9 loses the last 15 s of the log
}
STOP_SECONDS = 4  # whoever asked for a stop kills what is left soon afterwards


class NoLogin(Exception):
    """W&B is to be used online, and nobody is logged in."""


def start(mode: str, settings: Mapping, facts: Mapping, words: dict[str, Any]) -> tuple[Any, list]:
    """Return W&B's run and what went wrong; online if wanted and possible, else offline, else None.

    `settings`, `facts` and `mode` as in `open_tracker`; `words` are further arguments of
    `wandb.init`. `UserError` where W&B is a must and does not start, or records other settings.
    """
    mode = (os.environ.get("WANDB_MODE") or mode) if mode == "auto" else mode
    if mode not in MODES:
        raise UserError(f"W&B mode {mode!r} (--tracking, WANDB_MODE): use {', '.join(MODES)}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    in_sweep, service = "WANDB_SWEEP_ID" in os.environ, os.environ.get("WANDB_SERVICE")
    must_start = in_sweep or mode == "online"
    problems = []
    for attempt in {"disabled": (), "offline": ("offline",)}.get(mode, ("online", "offline")):
        try:
            import wandb

            wandb.teardown(exit_code=1)  # a failed attempt keeps the id; a broken run is still open
            with contextlib.redirect_stderr(io.StringIO()):  # it would tell who is logged in
                if attempt == "online" and not wandb.login(prompt=False, verify=False):
                    raise NoLogin("no login (wandb login)")
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
                    run.finish(exit_code=1)
                    raise UserError(f"{key}: W&B records {recorded!r}, the script used {used!r}")
            code = wandb.Artifact("code", type="code")  # log_code would walk through data/, too
            for path in (*CODE.glob("*.py"), *CODE.glob("common/**/*.py")):
                code.add_file(str(path), name=str(path.relative_to(CODE)), skip_cache=True)
            run.log_artifact(code)
            return run, problems
        except UserError:
            raise
        except Exception as error:  # no wandb, no login, no server, no such project, ...
            problem = f"W&B does not start {attempt}: {error}".splitlines()[0]
            if must_start:
                raise UserError(problem) from None
            if isinstance(error, NoLogin):
                problem = "W&B: logging to disk, since nobody is logged in (wandb login)"
            problems.append(problem)
            if isinstance(error, ImportError | AttributeError):  # a folder ./wandb, say, is empty
                return None, problems
        finally:
            if service is None:  # W&B sets it, and programs that we start would join its process
                os.environ.pop("WANDB_SERVICE", None)
    return None, problems


def finish(run: Any, run_dir: Path, exit_code: int) -> tuple[str, list[str]]:
    """End a run; return what went wrong, if anything did, and two lines: how to look at it here,
    and where it is or how to send it.

    A run that failed or was stopped waits `STOP_SECONDS` for its upload, a finished one minutes.
    """
    folder = f"{shlex.quote(str(run_dir))}/wandb"
    part = f"{folder}/{Path(run.dir).parent.name}"
    parts = f"{folder}/offline-run-*"  # one for each time it was resumed
    where = f"send to W&B:  wandb sync {parts}" if run.offline else f"W&B:          {run.url}"
    problem = ""
    is_late = threading.Event()
    limit = threading.Timer(STOP_SECONDS, lambda: (is_late.set(), _abandon()))
    if exit_code:
        limit.start()
    try:
        run.finish(exit_code)
    except Exception as error:  # no server; all of it is on the disk
        reason = f"no answer within {STOP_SECONDS} s" if is_late.is_set() else error
        problem = f"W&B did not get everything: {reason}".splitlines()[0]
        where = f"send to W&B:  wandb sync --include-online {part}"
    except BaseException:  # stopped while it was uploading
        time.sleep(1)  # for the last rows to reach the disk
        _abandon()
        raise
    finally:
        limit.cancel()
    return problem, [f"look at it:   wandb leet {part}", where]


def _abandon() -> None:
    """End W&B's process: `finish` raises, and nothing waits for an upload when we exit."""
    import wandb

    for child in psutil.Process().children():
        if child.name().startswith("wandb-core"):
            child.kill()
    with contextlib.suppress(Exception):  # it misses its process
        wandb.teardown(exit_code=1)
