"""One short visit to a GPU: does everything run there, how fast is it, what do trainings reach?

    python benchmarks/gpu.py                              at most 9 minutes
    python benchmarks/gpu.py --data_dir cifar10-images    with the trainings on that folder
    python benchmarks/gpu.py --small                      on a CPU: the same parts in a small form

Needs nothing but the repository and what requirements.txt names. Each part is a process of its own
with a time limit; what it found, or its error, is a line of --out at once. The same command again
does the parts that are missing, then those that failed: of both, first those that measure no time,
several at once, then the others one by one. Trainings that were stopped go on.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_parts
import measure
import torch
from gpu_parts import COLOR, GRAY, LEFT_OUT, METHODS, MODES

# What is trained to the end: name, data ("mnist", or "folder" for --data_dir), script and flags.
LARGE = (
    "--encoder airbench --width 128 --blocks 1 --augment cutout --flip True --optimizer muon "
    "--learning_rate 0.2 --batch_size 1000 --schedule linear --warmup_epochs 0 --epochs 30 "
    "--evaluate_every 10"
)
HEADLINES = (
    ("joint", "folder", f"train_joint.py {LARGE} --label_smoothing 0.2"),
    (
        "contrastive", "folder",
        f"train_supcon.py {LARGE} --views 1 --head none --temperature 0.05",
    ),
    (
        "joint, MNIST", "mnist",
        "train_joint.py --dataset mnist --blocks 1 --epochs 15 --augment affine --evaluate_every 5",
    ),
)  # fmt: skip
# Method, encoder, channels, batch: of contrastive learning so many images in two views each.
STEPS = (
    ("supcon", "resnet18", COLOR, 512),
    ("supcon", "resnet18", COLOR, 1024),
    ("joint", "cnn", GRAY, 128),
    ("joint", "airbench", COLOR, 128),
    ("joint", "resnet18", COLOR, 512),
)
GRACE = 15  # seconds in which a part that is told to stop may end


@dataclasses.dataclass(frozen=True)
class Part:
    """A name, the function that does it, and after how many seconds it is stopped."""

    name: str
    do: Callable[[argparse.Namespace], dict[str, Any]]
    seconds: float
    is_timed: bool = True  # so nothing runs beside it


def parts(small: bool) -> list[Part]:
    """What is to be done, in this order."""
    found = []
    for method in METHODS:
        for mode in ["no"] if small else MODES:  # the others are slow on a CPU, or refused
            do = functools.partial(gpu_parts.smoke, method, mode)
            found.append(Part(f"smoke {method} {mode}", do, 150, is_timed=False))
        do = functools.partial(gpu_parts.sync, method)
        found.append(Part(f"sync {method}", do, 100, is_timed=False))
    for step in () if small else STEPS:  # a small form has nothing compiled
        name = f"compile {step[0]} {step[1]} {step[3]}"
        do = functools.partial(gpu_parts.compile_step, *step)
        found.append(Part(name, do, 200, is_timed=False))
    for step in STEPS[2:3] if small else STEPS:
        name = f"step {step[0]} {step[1]} {step[3]}"
        found.append(Part(name, functools.partial(gpu_parts.steps, *step), 100))
    found += [Part("augmentation", gpu_parts.augmentation, 60), Part("loss", gpu_parts.losses, 60)]
    for name, data, words in HEADLINES:
        do = functools.partial(gpu_parts.headline, name, data, words)
        found.append(Part(f"training {name}", do, 240))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="lines of JSON; benchmarks/gpu.jsonl")
    parser.add_argument("--data_dir", type=Path, help="a folder of images for the trainings")
    parser.add_argument("--mnist_dir", type=Path, default=measure.ROOT / "data")
    parser.add_argument("--work", type=Path, default=measure.ROOT / "runs/gpu", help="run folders")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, at most")
    parser.add_argument("--patience", type=float, default=1.0, help="times each part's limit")
    parser.add_argument("--jobs", type=int, default=min(6, -(-os.cpu_count() // 4)))
    parser.add_argument("--only", nargs="+", default=[""], help="parts whose names begin so")
    parser.add_argument("--small", action="store_true", help="a small form, for a CPU")
    parser.add_argument("--do", help=argparse.SUPPRESS)  # one part, in this process
    arguments = parser.parse_args()
    ends = time.monotonic() + 60 * arguments.minutes
    if arguments.out is None:
        name = "gpu-small.jsonl" if arguments.small else "gpu.jsonl"
        place = measure.ROOT / ("runs" if arguments.small else "benchmarks")
        arguments.out = place / name
    arguments.out, arguments.work = arguments.out.resolve(), arguments.work.resolve()
    wanted = [p for p in parts(arguments.small) if p.name.startswith(tuple(arguments.only))]
    if arguments.do:
        (part,) = (part for part in wanted if part.name == arguments.do)
        return do(part, arguments)
    if not arguments.small and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --small tries the same parts on a CPU")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    status = read(arguments.out)
    missing = [part for part in wanted if part.name not in status]
    failed = [part for part in wanted if status.get(part.name, "ok") != "ok"]

    def take(part: Part) -> None:
        if stopped.is_set():
            return
        left = ends - time.monotonic() - GRACE
        if left < 10:
            print(f"{part.name}: no time is left; the same command again goes on here")
            return
        seconds = min(arguments.patience * part.seconds, left)
        line = carry_out(part, seconds, arguments, stopped)
        with lock, arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(shown(line), flush=True)

    lock, stopped = threading.Lock(), threading.Event()
    queue = missing + failed
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            list(pool.map(take, [part for part in queue if not part.is_timed]))
            for part in queue:
                if part.is_timed:
                    take(part)
        except BaseException:  # Ctrl-C: the parts that run end, no other begins
            stopped.set()
            raise
    status = read(arguments.out)
    undone = [part.name for part in wanted if status.get(part.name) not in ("ok", LEFT_OUT)]
    print(f"{len(wanted) - len(undone)} of {len(wanted)} parts are done; {arguments.out}")
    if undone:
        print("not done: " + ", ".join(undone))
    return 1 if undone else 0


def read(path: Path) -> dict[str, str]:
    """How each part went the last time, by its name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the end of a line that was cut off
            result = json.loads(line)
            found[result["part"]] = result["status"]
    return found


def shown(line: dict[str, Any]) -> str:
    """A result in one line."""
    apart = ("part", "status", "seconds", "device", "torch", "commit", "log")
    rest = {key: value for key, value in line.items() if key not in apart}
    told = ", ".join(f"{key} {value}" for key, value in rest.items())
    return f"{line['part']}: {line['status']} in {line['seconds']} s: {told}"


def carry_out(
    part: Part, seconds: float, arguments: argparse.Namespace, stopped: threading.Event
) -> dict[str, Any]:
    """A part in a process of its own: what it found, or its error and the end of its output.

    It ends early where `stopped` is set meanwhile.
    """
    log = arguments.work / (part.name.replace(" ", "-").replace(",", "") + ".log")
    words = [sys.executable, "-W", "ignore", __file__, "--do", part.name]
    for name in ("out", "data_dir", "mnist_dir", "work"):
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name}", str(value)]
    words += ["--small"] if arguments.small else []
    found = log.with_suffix(".json")
    found.unlink(missing_ok=True)
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(arguments.work / "compiled")} | os.environ
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            while (code := process.poll()) is None and time.monotonic() - began < seconds:
                if stopped.wait(0.1):
                    break
        finally:
            if process.poll() is None:
                end(process)
    line = {"part": part.name, "status": "ok", "seconds": round(time.monotonic() - began, 1)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    line |= {"device": device, "torch": torch.__version__}
    line["commit"] = measure.runtime.commit()
    if found.exists():
        line |= json.loads(found.read_text(encoding="utf-8"))
    if code is None:
        line |= {"status": "stopped", "error": f"longer than {seconds:.0f} s"}
    elif code:
        line |= {"status": "failed"} | ({} if "error" in line else {"error": f"exit {code}"})
    if "error" in line:
        line["log"] = log.read_text(errors="replace")[-2000:]
    return line


def end(process: subprocess.Popen) -> None:
    """Ask a part to stop, so that it saves what it has and ends its own; then make it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def do(part: Part, arguments: argparse.Namespace) -> int:
    """Do one part here and leave what it found beside its log; 1 where it failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    code = 0
    try:
        found = part.do(arguments)
    except Exception as error:  # whatever it is, it is written down
        traceback.print_exc()
        found, code = {"error": f"{type(error).__name__}: {error}"[:500]}, 1
    name = part.name.replace(" ", "-").replace(",", "") + ".json"
    (arguments.work / name).write_text(json.dumps(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
