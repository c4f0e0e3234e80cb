"""One short visit to a GPU: does everything run there, how fast is it, what do trainings reach?

    python benchmarks/gpu.py                              at most 9 minutes
    python benchmarks/gpu.py --data_dir cifar10-images    with the trainings on that folder
    python benchmarks/gpu.py --small                      on a CPU: the same parts in a small form

Needs nothing but the repository and what requirements.txt names. Each part is a process of its own
with a time limit; what it found, or its error, is a line of --out at once. The same command again
does the parts that are missing, then those that failed. Trainings that were stopped go on.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch

# What is trained to the end: name, data ("mnist", or "folder" for --data_dir), script and flags.
HEADLINES = (
    (
        "joint, airbench", "folder",
        "train_joint.py --encoder airbench --optimizer muon --learning_rate 0.2 --batch_size 500 "
        "--schedule linear --warmup_epochs 0 --epochs 20 --mae_weight 0 --label_smoothing 0.2 "
        "--flip True --evaluate_every 5 --compile True",
    ),
    (
        "contrastive, airbench", "folder",
        "train_supcon.py --encoder airbench --optimizer muon --learning_rate 0.2 --batch_size 500 "
        "--schedule linear --warmup_epochs 0 --epochs 40 --flip True --evaluate_every 10 "
        "--compile True",
    ),
    (
        "joint, MNIST", "mnist",
        "train_joint.py --dataset mnist --blocks 1 --epochs 15 --augment affine --evaluate_every 5",
    ),
)  # fmt: skip
GRAY, COLOR = 1, 3
# Method, encoder, channels, batch: of contrastive learning so many images in two views each.
STEPS = (
    ("supcon", "resnet18", COLOR, 512),
    ("joint", "resnet18", COLOR, 512),
    ("supcon", "resnet18", COLOR, 1024),
    ("joint", "cnn", GRAY, 128),
    ("joint", "airbench", COLOR, 128),
)
# Dense bf16 operations a second, from the vendor's data sheets; the first name that fits counts.
PEAKS = {
    **{"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12},
    **{"A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12},
}
METHODS = {"ae": ["--classifier_epochs", "2"], "joint": [], "supcon": ["--encoder", "cnn"]}
MODES = {
    "bf16": ["--precision", "bf16"],
    "fp16": ["--precision", "fp16"],
    "compiled": ["--compile", "True"],
}
SYNC_STEPS = range(8, 24)  # those in which nothing may wait for the GPU
LEFT_OUT = "left out"  # the status of a part that lacks its data; the next call asks again
GRACE = 15  # seconds in which a part that is told to stop may end


@dataclasses.dataclass(frozen=True)
class Part:
    """A name, the function that does it, and after how many seconds it is stopped."""

    name: str
    do: Callable[[argparse.Namespace], dict[str, Any]]
    seconds: float


def parts(small: bool) -> list[Part]:
    """What is to be done, in this order."""
    found = []
    # a small form on a CPU has no fp16, and one mode of each script
    modes = {"ae": ["no"], "joint": ["bf16"], "supcon": ["compiled"]} if small else {}
    for method in METHODS:
        for mode in modes.get(method, MODES):
            do = functools.partial(smoke, method, mode)
            found.append(Part(f"smoke {method} {mode}", do, 90))
        found.append(Part(f"sync {method}", functools.partial(sync, method), 60))
    for step in STEPS[3:4] if small else STEPS:
        name = f"step {step[0]} {step[1]} {step[3]}"
        found.append(Part(name, functools.partial(steps, *step), 150))
    found += [Part("augmentation", augmentation, 60), Part("loss", losses, 60)]
    for name, data, words in HEADLINES:
        do = functools.partial(headline, name, data, words)
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
    for part in missing + failed:
        left = ends - time.monotonic() - GRACE
        if left < 10:
            print(f"{part.name}: no time is left; the same command again goes on here")
            break
        line = carry_out(part, min(arguments.patience * part.seconds, left), arguments)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(shown(line), flush=True)
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


def carry_out(part: Part, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """A part in a process of its own: what it found, or its error and the end of its output."""
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
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        except BaseException:
            end(process)
            raise
        if code is None:
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


# ------------------------------------------------------------------- Does it run, stop and go on?


def smoke(method: str, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A script on digits, once straight and once stopped and resumed: the same numbers?"""
    base = arguments.work / f"smoke-{method}-{mode}"
    flags = [*METHODS[method], *MODES.get(mode, ["--precision", mode]), "--log_every", "5"]
    flags += ["--tracking", "disabled", "--tsne_images", "100", "--epochs", "4"]
    if arguments.small:
        flags += ["--width", "8", "--limit_train", "256", "--batch_size", "32", "--test", "False"]
    script = measure.ROOT / f"train_{method}.py"
    rows = {}
    for name in ("straight", "stopped"):
        folder = Path(f"{base}-{name}")
        if folder.exists():
            folder = Path(f"{folder}-{time.time_ns()}")
        command = [sys.executable, "-W", "ignore", str(script), *flags]
        command += ["--resume", str(folder)]
        if name == "stopped":
            stop_after_rows(command, folder, 3)
        subprocess.run(command, check=True, cwd=measure.ROOT)
        rows[name] = rows_of(folder)
    return compared(rows["straight"], rows["stopped"])


def stop_after_rows(command: list[str], folder: Path, count: int) -> None:
    """Start a run and stop it with SIGTERM once it has logged some rows, or let it end."""
    process = subprocess.Popen(command, cwd=measure.ROOT)
    while process.poll() is None and len(rows_of(folder)) < count:
        time.sleep(0.01)
    process.terminate()
    code = process.wait()
    if code not in (0, 128 + signal.SIGTERM):
        raise RuntimeError(f"a run that was told to stop ended with {code}")
    print(f"stopped after {len(rows_of(folder))} rows", flush=True)


def rows_of(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def compared(straight: list[dict], resumed: list[dict]) -> dict[str, Any]:
    """Whether two runs logged the same, and the largest relative difference of their losses."""
    timed = ("time/", "memory/")
    pairs = []
    for one, other in zip(straight, resumed, strict=True):
        names = [name for name in one if not name.startswith(timed)]
        pairs += [(name, one[name], other[name]) for name in names]
    losses = [(a, b) for name, a, b in pairs if name == "train/loss"]
    return {
        "same": all(a == b for _, a, b in pairs),
        "loss_differs_by": max(abs(a - b) / max(abs(a), 1e-12) for a, b in losses),
        "loss": losses[-1][0],
    }


def sync(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Some steps in which every wait for the GPU is an error (PyTorch's sync debug mode)."""
    import importlib

    script = importlib.import_module(f"train_{method}")
    os.environ["LATENT_SYNC_DEBUG"] = "1"
    schedule, is_gpu = script.optimizers.schedule, not measure.IS_CPU

    def at_each_step(kind: str, step: int, *others: Any) -> float:
        if is_gpu:
            torch.cuda.set_sync_debug_mode("error" if step in SYNC_STEPS else "default")
        return schedule(kind, step, *others)

    script.optimizers.schedule = at_each_step
    words = [*METHODS[method], "--epochs", "3", "--log_every", "1000", "--batch_size", "32"]
    words += ["--tracking", "disabled", "--tsne_images", "100", "--test", "False"]
    words += ["--width", "8"] if arguments.small else []
    folder = arguments.work / f"sync-{method}-{time.time_ns()}"
    from common.config import parse

    script.main(parse(script.Config, [*words, "--run_dir", str(folder)]))
    return {"steps": len(SYNC_STEPS), "checked": is_gpu}


# ----------------------------------------------------------------------------------- How fast?


def steps(
    method: str, encoder: str, channels: int, batch: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """A script's compiled step and its plain one against the same network in a bare loop."""
    from overhead import bare

    settings = (method, encoder, channels, batch)
    contenders = {
        "script": functools.partial(scripted, *settings, True),
        "plain": functools.partial(scripted, *settings, False),
        "bare": functools.partial(bare, *settings, compiled=True),
    }
    if arguments.small:  # compiling takes a minute on a busy core
        contenders = {"script": contenders["plain"], "bare": functools.partial(bare, *settings)}
    times = measure.alternate(contenders, 3 if arguments.small else 7, seconds=0.3)
    value, spread = measure.ratio(times["script"], times["bare"])
    needed = operations(method, encoder, channels, batch)
    found = {
        "step_ms": {name: round(1000 * taken.median, 3) for name, taken in times.items()},
        "script_over_bare": round(value, 3),
        "spread": round(spread, 3),
        "images_per_second": round(batch / times["script"].median),
        "gflop_per_step": round(needed / 1e9, 1),
        "gib": round(times["script"].memory / 2**30, 2),
    }
    if peak := peak_of_chip():
        share = {name: needed / taken.median / peak for name, taken in times.items()}
        found["share_of_bf16_peak"] = {name: round(value, 3) for name, value in share.items()}
    return found


def scripted(
    method: str, encoder: str, channels: int, batch: int, compiled: bool, turn: measure.Turn
) -> None:
    from overhead import module_of

    module = module_of(method)
    module.datasets.read = lambda *_: measure.arrays(20_000, channels)
    measure.long_epochs()
    settings = {"dataset": "cifar10" if channels == COLOR else "mnist", "compile": compiled}
    measure.script(turn, module, encoder=encoder, batch_size=batch, **settings)


def operations(method: str, encoder: str, channels: int, batch: int) -> int:
    """Floating-point operations of a step, forward and backward, counted by PyTorch.

    Counted on tensors without content, so on no device at all.
    """
    from overhead import loss_of, network_of
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = network_of(method, encoder, channels)
        images, labels = torch.empty(batch, channels, 32, 32), torch.zeros(batch).long()
        loss_of(method, network, images, labels).backward()
    return counter.get_total_flops()


def peak_of_chip() -> float | None:
    name = "" if measure.IS_CPU else torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def augmentation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two views of images, ours against those libraries that are installed."""
    import augmentation as program

    contenders = {"ours": program.ours, "torchvision (PIL)": program.torchvision_pil}
    if not arguments.small:
        contenders["torchvision v2"] = program.torchvision_v2
        contenders |= {name: getattr(program, name) for name in installed("kornia", "lightly")}
    return beside_peers(contenders, arguments)


def losses(arguments: argparse.Namespace) -> dict[str, Any]:
    """The contrastive loss with its gradient, ours against the usual form."""
    import loss as program

    count = 512 if arguments.small else 2048
    contenders = {"ours": program.ours, "usual form": program.usual}
    if installed("pytorch_metric_learning") and not arguments.small:
        contenders["pytorch-metric-learning"] = program.metric_learning
    found = {name: functools.partial(contend, count) for name, contend in contenders.items()}
    return {"embeddings": count} | beside_peers(found, arguments)


def beside_peers(contenders: dict[str, Callable], arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each, and how many times as fast ours is."""
    times = measure.alternate(contenders, 3 if arguments.small else 7, seconds=0.3)
    peers = [name for name in contenders if name != "ours"]
    return {
        "ms": {name: round(1000 * taken.median, 3) for name, taken in times.items()},
        "times_as_fast": {
            name: round(1 / measure.ratio(times["ours"], times[name])[0], 2) for name in peers
        },
    }


def installed(*packages: str) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name)]


# --------------------------------------------------------------------- What do trainings reach?


def headline(name: str, data: str, words: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A whole training; stopped when its time is over, it goes on with the next call."""
    script, *flags = words.split()
    small = "-small" if arguments.small else ""
    folder = arguments.work / f"training-{name.replace(', ', '-')}{small}"
    if arguments.small:
        flags = ["--encoder", "cnn", "--width", "8", "--epochs", "1", "--limit_train", "512"]
        flags += ["--tsne_images", "50", "--test", "False"]
    elif data == "folder":
        if arguments.data_dir is None:
            return {"status": LEFT_OUT, "why": "it needs --data_dir"}
        flags += ["--dataset", "folder", "--data_dir", str(arguments.data_dir)]
    elif not (arguments.mnist_dir / "MNIST/raw").exists():
        return {"status": LEFT_OUT, "why": f"there is no MNIST in {arguments.mnist_dir}"}
    else:
        flags += ["--data_dir", str(arguments.mnist_dir)]
    command = [sys.executable, "-W", "ignore", str(measure.ROOT / script), *flags]
    command += ["--tracking", "disabled", "--resume", str(folder)]
    # in the group of this part: a signal to it reaches the run, which saves and stops
    subprocess.run(command, check=True, cwd=measure.ROOT)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    timed = [row for row in rows_of(folder) if "time/epoch_seconds" in row]
    names = ("val/accuracy", "test/accuracy", "test/linear_accuracy", "test/knn_accuracy")
    return {
        **{key: round(summary[key], 4) for key in names if key in summary},
        "epoch_seconds": timed[-1]["time/epoch_seconds"],
        "images_per_second": round(timed[-1]["time/images_per_second"]),
        "command": " ".join([script, *flags]),
    }


if __name__ == "__main__":
    raise SystemExit(main())
