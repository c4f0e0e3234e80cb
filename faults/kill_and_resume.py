"""Does a run that is killed at any moment and resumed end with the same bits?

    python faults/kill_and_resume.py                      20 random kills per script
    python faults/kill_and_resume.py --processes 2 --kills 5 --points
    python faults/kill_and_resume.py --signal TERM --points

Per script, at its default encoder and width: one run without a fault, then runs that a signal ends
at a random moment of their training, or `kill -9` at a point where it would hurt most (POINTS), and
`--resume` takes to the end. KILL leaves the checkpoint of the last epoch, TERM one of the last
step. Compared are the weights, the latents, the rows of metrics.jsonl (but for times and memory),
the figures and the W&B id. The runs are forked from one process that has imported everything,
since the imports take longer than so short a training.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = "1"  # no pool of threads that a fork would lose

import numpy as np  # noqa: E402
import sklearn.manifold  # noqa: E402, F401
import wandb  # noqa: E402, F401
from default_size import FEW, SCRIPTS  # noqa: E402
from tiny import latents_of, rows_of, timeless  # noqa: E402

from common.config import parse  # noqa: E402
from common.files import read_json, write_json  # noqa: E402
from common.run import checkpoints, tracking  # noqa: E402

WORDS = (*FEW, "--epochs=4")  # a checkpoint after the first epoch has an optimizer's state
IN_TRAINING = ("training", "evaluation", "checkpoint")
# Killed before or after the file is renamed into place for the n-th time; or half a row is written.
POINTS = {
    "checkpoint": ("next.safetensors", 3, "before"),
    "between": ("last.safetensors", 3, "before"),  # the one before it is previous.safetensors now
    "best": ("best.safetensors", 1, "after"),
    "row": ("metrics.jsonl", 6, "half"),
    "encoder": ("encoder.safetensors", 1, "before"),
    "unfinished": ("summary.json", 1, "before"),
    "finished": ("summary.json", 1, "after"),
}


def main(
    methods: list[str], kills: int, points: list[str], processes: int, mode: str, seed: int,
    number: signal.Signals,
) -> list[dict]:  # fmt: skip
    """One dict per script: how often it was tried, survived, lost, and each kill.

    `number` is the signal of the random kills.
    """
    chance = random.Random(seed)
    found = []
    with tempfile.TemporaryDirectory() as place:
        for method in methods:
            straight = Path(place, method)
            ids = start(method, straight, processes, mode)
            wait_for_training(straight, ids[0])
            started = time.time()
            finish(method, straight, processes, mode, ids)
            # encoder.json is the first file after the training
            duration = (straight / "encoder.json").stat().st_mtime - started
            trials = []
            for trial_number, point in enumerate([None] * kills + points):
                folder = Path(place, f"{method}-{trial_number}")
                trial = None
                while trial is None:  # a run that ended before its moment was not killed
                    shutil.rmtree(folder, ignore_errors=True)
                    moment = point or chance.uniform(0, duration)
                    trial = kill(method, folder, processes, mode, moment, number, chance)
                finish(method, folder, processes, mode)
                trial["lost"] = differences(straight, folder, trial["wandb_id"])
                trials.append(trial)
                shutil.rmtree(folder)
            lost = sum(bool(trial["lost"]) for trial in trials)
            counts = {"tried": len(trials), "survived": len(trials) - lost, "lost": lost}
            counts["in_training"] = sum(trial["in"] in IN_TRAINING for trial in trials)
            counts["from_a_later_step"] = sum(trial["step"] > 0 for trial in trials)
            about = {"script": method, "processes": processes, "training_seconds": duration}
            found.append({**about, **counts, "kills": trials})
    return found


def wait_for_training(folder: Path, process: int) -> None:
    """Return once the run in `folder` has written its first checkpoint, or has ended."""
    while not (folder / "checkpoints/last.safetensors").exists():
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            return
        time.sleep(0.005)


def start(
    method: str, folder: Path, processes: int, mode: str, point: str | None = None
) -> list[int]:
    """Fork the processes of one run, started or resumed in `folder`; return their ids.

    At `point`, one of POINTS, its first process kills itself.
    """
    script, own = SCRIPTS[method]
    words = [] if (folder / "config.json").exists() else [*WORDS, *own]
    words += [f"--resume={folder}", f"--tracking={mode}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ids = []
    sys.stdout.flush()
    for rank in range(processes):
        ids.append(os.fork())
        if ids[-1]:
            continue
        code = 1
        try:
            if processes > 1:  # what torchrun sets
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
                os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
            output = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if point and rank == 0:
                die_at(*POINTS[point])
            script.main(parse(script.Config, words))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return ids


def finish(
    method: str, folder: Path, processes: int, mode: str, ids: list[int] | None = None
) -> None:
    """Start or resume the run in `folder`, unless `ids` are its processes, and wait for its end."""
    for process in ids or start(method, folder, processes, mode):
        if os.waitpid(process, 0)[1]:
            sys.exit(f"{folder} did not finish:\n{Path(f'{folder}.log').read_text()}")


def die_at(name: str, count: int, when: str) -> None:
    """Let this process kill itself where POINTS says."""
    rename, append = os.replace, tracking.append
    passed = Counter()

    def now(path: Path, at: str) -> bool:
        passed[at] += Path(path).name == name
        return at == when and passed[at] == count and Path(path).name == name

    def replace(source: Path, path: Path) -> None:
        if now(path, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, path)
        if now(path, "after"):
            os.kill(os.getpid(), signal.SIGKILL)

    def append_half(path: Path, data: bytes) -> None:
        if now(path, "half"):
            append(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(path, data)

    os.replace, tracking.append = replace, append_half


def kill(
    method: str, folder: Path, processes: int, mode: str, moment: float | str,
    number: signal.Signals, chance: random.Random,
) -> dict | None:  # fmt: skip
    """Start a run; after `moment` seconds of training send `number` to one process, then the
    others; at a point of POINTS, kill them with -9.

    `chance` draws which one is first. None if the run was over by then.
    """
    if isinstance(moment, str):
        ids = start(method, folder, processes, mode, point=moment)
        os.waitid(os.P_PID, ids[0], os.WEXITED | os.WNOWAIT)
        number = signal.SIGKILL
    else:
        ids = start(method, folder, processes, mode)
        wait_for_training(folder, ids[0])
        time.sleep(moment)
        chance.shuffle(ids)
    for process in ids:
        os.kill(process, number)
    states = [os.waitpid(process, 0)[1] for process in ids]
    if not any(states):
        assert not isinstance(moment, str), f"the run never came to the point {moment!r}"
        return None
    config, last = folder / "config.json", folder / "checkpoints/last.safetensors"
    wandb_id = read_json(config)["facts"]["wandb_id"] if config.exists() else None
    step = checkpoints.load(last)["step"] if last.exists() else 0
    return {"at": moment, "in": stage(folder), "step": step, "wandb_id": wandb_id}


def stage(folder: Path) -> str:
    """What the run in `folder` was at when it was killed, as far as its files tell."""
    saved, rows = folder / "checkpoints", folder / "metrics.jsonl"
    if (folder / "summary.json").exists():
        return "finished"
    if any(saved.glob(".*.part*")) or (saved / "next.safetensors").exists():
        return "checkpoint"
    if not (saved / "last.safetensors").exists():
        return "set-up"
    if (folder / "encoder.json").exists():
        return "classifier, final evaluation"
    lines = [line for line in rows.read_text().splitlines(keepends=True) if line.endswith("\n")]
    last = json.loads(lines[-1]) if lines else {}
    return "evaluation" if "train/loss" in last and last["epoch"] % 1 == 0 else "training"


def differences(straight: Path, folder: Path, wandb_id: str | None) -> list[str]:
    """What is not as it is in the run without a fault, or is left over; `wandb_id`: at the kill."""
    names = {str(path.relative_to(straight)) for path in straight.glob("*.safetensors")}
    names |= {str(path.relative_to(straight)) for path in straight.glob("figures/*")}
    pairs = {name: (straight / name, folder / name) for name in names}
    wrong = [n for n, (a, b) in pairs.items() if not b.exists() or a.read_bytes() != b.read_bytes()]
    first, second = (latents_of(run) for run in (straight, folder))
    wrong += [n for n in first if not np.array_equal(first[n], second.get(n))]
    wrong += [] if rows_of(straight) == rows_of(folder) else ["metrics.jsonl"]
    first, second = (timeless(read_json(run / "summary.json")) for run in (straight, folder))
    wrong += [] if first == second else ["summary.json"]
    ids = {path.name.split("-")[-1] for path in folder.glob("wandb/offline-run-*")}
    wrong += ["W&B id"] if wandb_id and ids - {wandb_id} else []
    return wrong + [path.name for path in folder.rglob(".*.part*")]


def table(found: list[dict]) -> str:
    head = ("processes", "tried", "in training", "resumed after step 0", "survived", "lost")
    lines = [f"{'script':8}{''.join(f'  {title}' for title in head)}  killed in"]
    for run in found:
        stages = Counter(trial["in"] for trial in run["kills"])
        where = ", ".join(f"{name} {count}" for name, count in stages.most_common())
        names = ("processes", "tried", "in_training", "from_a_later_step", "survived", "lost")
        counts = (f"  {run[n]:>{len(title)}}" for n, title in zip(names, head, strict=True))
        lines.append(f"{run['script']:8}{''.join(counts)}  {where}")
        lines += [
            f"  lost at {trial['at']} in {trial['in']}: {', '.join(trial['lost'])}"
            for trial in run["kills"]
            if trial["lost"]
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--kills", type=int, default=20, help="random ones per script")
    parser.add_argument("--points", nargs="*", choices=POINTS, default=list(POINTS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tracking", choices=("offline", "disabled"), default="offline")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL", help="of the moments")
    parser.add_argument("--out", type=Path, help="write the counts there as JSON")
    arguments = parser.parse_args()
    results = main(
        arguments.scripts,
        arguments.kills,
        arguments.points,
        arguments.processes,
        arguments.tracking,
        arguments.seed,
        signal.Signals[f"SIG{arguments.signal}"],
    )
    print(table(results))
    if arguments.out:
        write_json(arguments.out, results)
    sys.exit(any(run["lost"] for run in results))
