"""How does a run of W&B start, and how does it end?   nobody is asked, nobody waits for long

W&B's process (wandb-core) writes all that is logged to a file in the run folder, and uploads from
there. So when the server is away, ending that process costs nothing but a later `wandb sync`.
"""

import contextlib
import io
import os
import secrets
import shlex
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from ..console import say
from ..errors import UserError
from .runs import own_tags

CODE = Path(__file__).parents[2]
PER_EPOCH = ("val", "test", "projection", "latent", "image", "pca", "time", "memory")
MODES = ("auto", "online", "offline", "disabled")
# seconds; W&B itself waits 90 for a server at the start, and for ever at the end
LIMITS = {"init_timeout": 20, "finish_timeout": 300, "finish_timeout_raises": True}
ENVIRONMENT = {
    "WANDB_ERROR_REPORTING": "false",  # would hold up the exit for 10 s when the server hangs
    "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # s; else kill -9 loses the last 15 s of the log
}
_taken: set[str] = set()  # the ids of this process's runs
STOP_SECONDS = 4  # whoever asked for a stop kills what is left soon afterwards


class NoLogin(Exception):
    """W&B is to be used online, and nobody is logged in."""


def start(mode: str, settings: Mapping, facts: Mapping, words: dict[str, Any]) -> tuple[Any, list]:
    """Return W&B's run and what went wrong; online if wanted and possible, else offline, else None.

    `settings`, `facts` and `mode` as in `open_tracker`; `words` are further arguments of
    `wandb.init`, where W&B's own settings come before ours. `UserError` where W&B is a must and
    does not start, or records other settings.
    """
    if mode == "disabled":
        return None, []
    for name, value in {**ENVIRONMENT, **_places(Path(words["dir"]))}.items():
        os.environ.setdefault(name, value)
    if tags := own_tags(os.environ.pop("WANDB_TAGS", "")):  # W&B refuses "a,,b"
        os.environ["WANDB_TAGS"] = ",".join(tags)
    in_sweep, service = "WANDB_SWEEP_ID" in os.environ, os.environ.get("WANDB_SERVICE")
    mode = _own_mode(service) if mode == "auto" else mode
    if mode not in MODES:
        raise UserError(f"W&B mode {mode!r} (--tracking, WANDB_MODE): use {', '.join(MODES)}")
    must_start = in_sweep or mode == "online"
    problems = []
    for attempt in {"disabled": (), "offline": ("offline",)}.get(mode, ("online", "offline")):
        try:
            import wandb

            wandb.teardown(exit_code=1)  # a failed attempt keeps the id; a broken run is still open
            with contextlib.redirect_stderr(io.StringIO()):  # it would tell who is logged in
                if attempt == "online" and not wandb.login(prompt=False, verify=False):
                    raise NoLogin("no login (wandb login)")
                words |= _own_words(wandb.setup().settings, settings, words)
            must_start = in_sweep  # with a login, only the server can be missing
            # online, "silent" would hide a failed upload as well
            words["settings"] = wandb.Settings(quiet=True, silent=attempt == "offline", **LIMITS)
            run = wandb.init(mode=attempt, config={**settings, **facts}, save_code=True, **words)
            run.define_metric("epoch", hidden=True)
            for section in PER_EPOCH:
                run.define_metric(f"{section}/*", step_metric="epoch")
            for key, used in settings.items() if in_sweep else ():
                recorded = run.config.get(key, used)  # the sweep's, whatever the script was told
                if not is_same(recorded, used):
                    run.finish(exit_code=1)
                    raise UserError(f"{key}: W&B records {recorded!r}, the script used {used!r}")
            try:
                _keep_code(run)
            except Exception as error:  # no room, or no place, for its copy
                problems.append(f"W&B: the code is not kept: {error}".splitlines()[0])
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
            _forget_service(service)
    return None, problems


def new_id() -> str:
    """WANDB_RUN_ID, once per process and if W&B takes it; else one that is drawn."""
    given = os.environ.get("WANDB_RUN_ID", "")
    is_valid = given == given.strip() and not any(letter in ":;,#?/'\\%" for letter in given)
    if given and not is_valid:
        say(f"WANDB_RUN_ID={given} cannot be an id of W&B; another one is drawn")
        del os.environ["WANDB_RUN_ID"]
    chosen = given if given and is_valid and given not in _taken else secrets.token_hex(4)
    _taken.add(chosen)
    return chosen


def is_same(recorded: Any, used: Any) -> bool:
    """Whether what W&B recorded is the value that the script used.

    Sweep files hold texts where the script has numbers (YAML reads 1e-3 as one) and the other way
    round, None as a text, and places with a ~.
    """
    if recorded == used or str(recorded) == str(used):
        return True
    if isinstance(recorded, str) and isinstance(used, str):
        return os.path.expanduser(recorded) == used
    if isinstance(recorded, list | tuple) and isinstance(used, list | tuple):
        return len(recorded) == len(used) and all(map(is_same, recorded, used))
    try:
        return not isinstance(used, bool) and float(recorded) == float(used)
    except (TypeError, ValueError):
        return False


def _forget_service(before: str | None) -> None:
    """W&B names its process in the environment, and programs that we start would join it."""
    if before is None:
        os.environ.pop("WANDB_SERVICE", None)


def _own_mode(service: str | None) -> str:
    """The mode that W&B's variables or settings files (`wandb offline`) ask for, else auto."""
    mode = os.environ.get("WANDB_MODE", "")
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled"
    if not mode:
        try:
            import wandb

            wandb.teardown(exit_code=1)  # the settings of a run before this one
            with contextlib.redirect_stderr(io.StringIO()):  # it would tell which files it reads
                mode = wandb.setup().settings.mode
            wandb.teardown()
        except Exception:  # said when it does not start, either
            mode = ""
        finally:
            _forget_service(service)
        mode = "" if mode == "online" else mode  # its default
    return {"": "auto", "dryrun": "offline", "run": "online", "shared": "online"}.get(mode, mode)


def _own_words(known: Any, settings: Mapping, words: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `wandb.init` that W&B's own settings replace, where no flag is given."""
    own = {"name": known.run_name, "job_type": known.run_job_type}
    own |= {"group": known.run_group}
    if "entity" not in words:  # else both are those that a resumed run began with
        own["project"] = known.project
    own = {k: v for k, v in own.items() if v and k in words and not settings.get(k)}
    if known.run_tags and not settings.get("tags"):
        own["tags"] = list(dict.fromkeys([*words["tags"], *known.run_tags]))
    if Path(known.root_dir).absolute() != Path.cwd():
        own["dir"] = known.root_dir
    return own


def _places(run_dir: Path) -> dict[str, str]:
    """Folders of W&B's own in `run_dir`, in the place of those in the home that can't be written.

    What an offline run copies there is needed until it is sent.
    """
    home, found = os.path.expanduser("~"), {}
    wanted = {"WANDB_DATA_DIR": ".local/share", "WANDB_CACHE_DIR": ".cache"}
    for name, folder in wanted.items():
        try:
            if home == "~":
                raise OSError("no home")
            place = Path(home, folder, "wandb")
            place.mkdir(parents=True, exist_ok=True)
            if not os.access(place, os.W_OK):
                raise OSError("not writable")
        except OSError:
            found[name] = str(run_dir.absolute() / "wandb/home" / folder / "wandb")
    if home == "~":  # W&B asks for it even where it need not
        found["HOME"] = str(run_dir.absolute() / "wandb/home")
    return {name: place for name, place in found.items() if name not in os.environ}


def _keep_code(run: Any) -> None:
    import wandb

    code = wandb.Artifact("code", type="code")  # log_code would walk through data/, too
    for path in (*CODE.glob("*.py"), *CODE.glob("common/**/*.py")):
        code.add_file(str(path), name=str(path.relative_to(CODE)), skip_cache=True)
    run.log_artifact(code)


def finish(run: Any, run_dir: Path, exit_code: int) -> tuple[str, list[str]]:
    """End a run; return what went wrong, if anything did, and two lines: how to look at it here,
    and where it is or how to send it.

    A run that failed or was stopped waits `STOP_SECONDS` for its upload, a finished one minutes.
    """
    place = Path(run.dir).parent.parent  # RUN/wandb, unless W&B was told another
    is_ours = place.resolve() == Path(run_dir, "wandb").resolve()
    folder = shlex.quote(str(Path(run_dir, "wandb") if is_ours else place))
    part = f"{folder}/{Path(run.dir).parent.name}"
    # one for each time it was resumed
    parts = f"{folder}/offline-run-*" + ("" if is_ours else shlex.quote(f"-{run.id}"))
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
    # it misses its process, and may exit with that process's status
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown(exit_code=1)
