"""What the parts of gpu.py do; each returns what it found, as a dictionary for JSON."""

import argparse
import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch

GRAY, COLOR = 1, 3
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
# Runs the script whose path and flags follow.
DETERMINISTIC = """
import runpy, sys, common, torch
torch.use_deterministic_algorithms(True, warn_only=True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LEFT_OUT = "left out"  # the status of a part that lacks its data; the next call asks again


# ------------------------------------------------------------------- Does it run, stop and go on?


def smoke(method: str, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A script on digits, once straight and once stopped and resumed: the same numbers?

    With PyTorch's deterministic algorithms: otherwise two runs on a GPU differ by rounding, which a
    training amplifies, whether one of them was stopped or not.
    """
    base = arguments.work / f"smoke-{method}-{mode}"
    flags = [*METHODS[method], *MODES.get(mode, ["--precision", mode]), "--log_every", "5"]
    flags += ["--tracking", "disabled", "--tsne_images", "100", "--epochs", "4"]
    if arguments.small:
        flags += ["--width", "8", "--limit_train", "256", "--batch_size", "32", "--test", "False"]
    elif mode != "bf16":
        flags += ["--test", "False"]  # the evaluation of the test images is tried once
    script = ["-c", DETERMINISTIC, str(measure.ROOT / f"train_{method}.py")]
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    folders, commands = [], []
    for name in ("straight", "stopped"):
        folder = Path(f"{base}-{name}")
        folders.append(Path(f"{folder}-{time.time_ns()}") if folder.exists() else folder)
        command = [sys.executable, "-W", "ignore", *script, *flags]
        commands.append([*command, "--resume", str(folders[-1])])
    straight = subprocess.Popen(commands[0], cwd=measure.ROOT)  # both at once, to save time
    try:
        stop_after_rows(commands[1], folders[1], 3)
        subprocess.run(commands[1], check=True, cwd=measure.ROOT)
    finally:
        code = straight.wait()
    if code:
        raise RuntimeError(f"the run that was not stopped ended with {code}")
    return compared(rows_of(folders[0]), rows_of(folders[1]))


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
    os.environ["CHECK_WAITING"] = "1"  # common.run.runtime.forbid_waiting
    words = [*METHODS[method], "--epochs", "3", "--log_every", "1000", "--batch_size", "32"]
    words += ["--tracking", "disabled", "--tsne_images", "100", "--test", "False"]
    words += ["--width", "8"] if arguments.small else []
    folder = arguments.work / f"sync-{method}-{time.time_ns()}"
    from common.config import parse

    script.main(parse(script.Config, [*words, "--run_dir", str(folder)]))
    return {"checked": not measure.IS_CPU}


# ----------------------------------------------------------------------------------- How fast?


def compile_step(
    method: str, encoder: str, channels: int, batch: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Compile what `steps` will time, which then finds it in the compiler's cache."""
    from overhead import bare

    settings = (method, encoder, channels, batch)
    started = time.perf_counter()
    contenders = {
        "script": functools.partial(scripted, *settings, True),
        "bare": functools.partial(bare, *settings, compiled=True),
    }
    measure.alternate(contenders, 0, units=2)
    return {"compiled_in": round(time.perf_counter() - started)}


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
        peers = installed("kornia.augmentation", "lightly.transforms")
        contenders |= {name: getattr(program, name) for name in peers}
    return beside_peers(contenders, arguments)


def losses(arguments: argparse.Namespace) -> dict[str, Any]:
    """The contrastive loss with its gradient, ours against the usual form."""
    import loss as program

    count = 512 if arguments.small else 2048
    contenders = {"ours": program.ours, "usual form": program.usual}
    if installed("pytorch_metric_learning.losses") and not arguments.small:
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


def installed(*modules: str) -> list[str]:
    """The packages of those modules that can be imported, with all that they need."""
    found = []
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
            found.append(module.partition(".")[0])
    return found


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
