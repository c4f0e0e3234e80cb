"""How is a speed or a memory claim measured?   contenders by turns, each in a process of its own

A contender is a function `contend(turn, ...)` at the top of a program. It prepares, then calls
`turn()` before each unit of its work (a step, a batch, a call of a loss):

    def ours(turn):
        images = ...
        while True:
            turn()
            augment(images)

    times = measure.alternate({"ours": ours, "peer": peer}, rounds=7)

All of them wait; one at a time is told to go for some units. In between its process and the
workers of its DataLoader are stopped, so that nothing is prepared at another's expense, and what
one does to threads or to malloc stays with it.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("WANDB_MODE", "disabled")

from common.run import runtime, session  # noqa: E402

DEVICE = torch.device("cuda" if runtime.uses_cuda() else "cpu")
IS_CPU = DEVICE.type == "cpu"
CORES = runtime.usable_cores()
PACKAGES = (
    *("torch", "torchvision", "accelerate", "numpy", "scikit-learn", "pillow", "kornia"),
    *("pytorch-metric-learning", "lightly"),
)
Contender = Callable[..., None]
PATIENCE = 5  # seconds in which all contenders together may end
WARM_UPS = 4  # units: a script compiles its second step, and a GPU's graph comes after that


class Finished(BaseException):
    """No further turn is wanted."""


@dataclass
class Times:
    """What one contender took: wall seconds of a unit in each round, and its memory.

    Attributes:
        seconds: of one unit, one number a round. cpu_seconds: the same of the process's own
            processor time, without its workers; it tells a busy machine from a slow contender.
        memory: bytes that the work took at most, above what was there before the first unit.
    """

    units: int = 0
    threads: int = 0
    memory: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / 2 / self.median


class Turn:
    """Called before each unit of work: tells the parent what the last ones took, and waits."""

    def __init__(self, pipe):
        self._pipe, self._left, self._units = pipe, 0, 0
        self._before = None

    def __call__(self) -> None:
        if self._left > 1:
            self._left -= 1
            return
        if self._units:
            self._report()
        else:
            _synchronize()
            self._before = _memory()
            self._pipe.send(("ready", {"threads": torch.get_num_threads()}))
        self._units = self._left = self._pipe.recv()
        if not self._units:
            raise Finished
        _synchronize()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(0 if IS_CPU else 2)]
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        if self._events:
            self._events[0].record()

    def _report(self) -> None:
        if self._events:
            self._events[1].record()
        _synchronize()
        wall = time.perf_counter() - self._wall
        if self._events:
            wall = self._events[0].elapsed_time(self._events[1]) / 1000
        cpu = time.process_time() - self._cpu
        memory = _memory() - self._before
        self._pipe.send(("done", {"seconds": wall, "cpu_seconds": cpu, "memory": memory}))


def alternate(
    contenders: Mapping[str, Contender], rounds: int = 7, seconds: float = 0.5, units: int = 0
) -> dict[str, Times]:
    """Time the contenders by turns, after a warm-up each.

    A turn lasts about `seconds`, or exactly `units` units. Every second round goes backwards, so
    that a machine which slows down is unfair to nobody.
    """
    children = {}
    try:
        for name, contend in contenders.items():
            children[name] = _Child(name, contend)
        for child in children.values():  # which start side by side
            child.wait()
        result = {}
        for name, child in children.items():
            result[name] = Times(threads=child.threads)
            single = units or 1
            for _ in range(1 if units else WARM_UPS):  # allocates, compiles, fills queues
                child.go(single)
            once = child.go(single)["seconds"] / single
            result[name].units = units or max(1, math.ceil(seconds / max(once, 1e-6)))
        for number in range(rounds):
            for name in list(children)[:: 1 if number % 2 == 0 else -1]:
                times = result[name]
                told = children[name].go(times.units)
                times.seconds.append(told["seconds"] / times.units)
                times.cpu_seconds.append(told["cpu_seconds"] / times.units)
                times.memory = told["memory"]
        return result
    finally:
        for child in children.values():
            child.tell_to_end()
        ends = time.monotonic() + PATIENCE
        for child in children.values():
            child.end(ends)


def peak_memory(contend: Contender, units: int = 1) -> Times:
    """Run some units in a process that does nothing else; `memory` of the result is the answer."""
    child = _Child("memory", contend)
    try:
        child.wait()
        told = child.go(units)
        return Times(units, child.threads, told["memory"], [told["seconds"] / units], [])
    finally:
        child.tell_to_end()
        child.end(time.monotonic() + PATIENCE)


class _Child:
    def __init__(self, name: str, contend: Contender):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_contend, args=(other, contend))
        self._process.start()
        other.close()

    def wait(self) -> None:
        """Until it is ready for its first unit; then it is stopped."""
        self.threads = self._told()["threads"]
        self._signal(signal.SIGSTOP)

    def go(self, units: int) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        self._pipe.send(units)
        told = self._told()
        self._signal(signal.SIGSTOP)
        return told

    def tell_to_end(self) -> None:
        with contextlib.suppress(OSError):
            self._signal(signal.SIGCONT)
            self._pipe.send(0)

    def end(self, until: float) -> None:
        """Kill it, if it has not ended by then, and the workers that it left behind."""
        self._process.join(max(0.0, until - time.monotonic()))
        with contextlib.suppress(OSError):
            self._signal(signal.SIGKILL)
        self._process.join()

    def _told(self) -> dict[str, Any]:
        try:
            kind, told = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SystemExit(f"{self.name}: its process ended ({self._process.exitcode})") from None
        if kind == "failed":
            raise SystemExit(f"{self.name} failed:\n{told}")
        return told

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def _contend(pipe, contend: Contender) -> None:
    os.setsid()  # a group of its own: signals to it reach its workers as well
    try:
        contend(Turn(pipe))
        pipe.send(("failed", "it ended before its turns were over"))
    except Finished:
        pass
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def _synchronize() -> None:
    if not IS_CPU:
        torch.cuda.synchronize()


def _memory() -> int:
    """The most bytes held so far: by tensors on the GPU where there is one, else by the process."""
    if not IS_CPU:
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def script(turn: Turn, module: Any, **settings: Any) -> None:
    """A contender: the training script itself, one of its steps being a unit.

    Its learning rate is asked for at the start of each step, and that is where the turn changes;
    nothing else of the script is touched. Evaluation between epochs falls into a turn unless the
    turns are over before the first epoch is.
    """
    schedule = module.optimizers.schedule

    def at_each_step(*arguments: Any) -> float:
        turn()
        return schedule(*arguments)

    module.optimizers.schedule = at_each_step
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),  # the progress bar
    ):
        settings = {"tracking": "disabled", "run_dir": f"{folder}/run"} | settings
        module.main(module.Config(**settings))


def long_epochs() -> None:
    """As many steps in an epoch as the turns may want, so that no evaluation falls into one."""
    session.epoch_batches = lambda count, size, *_: torch.randint(0, count, (20_000, size))


def arrays(count: int, channels: int, size: int = 32, classes: int = 10) -> Any:
    """A data set in memory, as `datasets.read` returns it, of random images."""
    from common.data.datasets import Arrays

    generator = torch.Generator().manual_seed(0)

    def some(number: int) -> tuple[Any, Any]:
        shape = (number, channels, size, size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return images.numpy(), torch.arange(number).remainder(classes).numpy()

    names = tuple(str(number) for number in range(classes))
    return Arrays(*some(count), *some(10 * classes), names, "random")


def mnist_folder(data_dir: Path, otherwise: Path) -> Path:
    """`data_dir` if MNIST is there, else `otherwise`, with random images in MNIST's format."""
    if (data_dir / "MNIST/raw/train-images-idx3-ubyte").exists():
        return data_dir
    raw = otherwise / "MNIST/raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        labels = torch.arange(count).remainder(10).byte()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return otherwise


# ------------------------------------------------------------------------------ what is reported


def ratio(ours: Times, peer: Times) -> tuple[float, float]:
    """Ours over the peer's seconds, the median over rounds, and its spread as a share of it."""
    pairs = [a / b for a, b in zip(ours.seconds, peer.seconds, strict=True)]
    times = Times(seconds=pairs)
    return times.median, times.spread


def row(
    what: str,
    ours: Times,
    peer: Times,
    goal: str,
    images: int = 0,
    names: tuple[str, str] = ("ours", "peer"),
) -> dict[str, Any]:
    """A claim about time. Goal "≥ 8": ours is 8 times as fast; "≤ 0.6": it takes 0.6 of the time.

    `images` in a unit, if speed is to be shown as images per second.
    """
    value, spread = ratio(ours, peer)
    value = 1 / value if goal.startswith("≥") else value

    def shown(times: Times) -> str:
        if images:
            return f"{images / times.median:,.0f} images/s ± {times.spread:.0%}"
        return f"{1000 * times.median:,.4g} ms ± {times.spread:.0%}"

    return claim(what, value, goal, shown(ours), shown(peer), spread, names)


def claim(
    what: str,
    value: float,
    goal: str,
    ours: str,
    peer: str = "–",
    spread: float = 0.0,
    names: tuple[str, str] = ("ours", "peer"),
) -> dict[str, Any]:
    """One line of the table; `goal` is "≥ number" or "≤ number", or empty where there is none."""
    found = {"what": what, "ours": ours, "peer": peer, "names": names}
    return found | {"value": value, "spread": spread, "goal": goal, "met": is_met(value, goal)}


def is_met(value: float, goal: str) -> bool | None:
    """Whether a value reaches its goal; None without one."""
    if not goal:
        return None
    sign, number = goal.split()[:2]
    return value >= float(number) if sign == "≥" else value <= float(number)


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that every program has; from here on SIGTERM ends its contenders as well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--out", type=Path, help="where to write what was measured, as JSON")
    made.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    made.add_argument("--data_dir", type=Path, default=ROOT / "data", help="where MNIST may lie")
    return made


def surroundings() -> dict[str, Any]:
    """What the numbers hold for: hardware, threads, versions, commit."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "device": runtime.device_name(DEVICE),
        "cores": CORES,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # of the machine, when the program began
        "python": platform.python_version(),
        "versions": versions,
        "commit": runtime.commit(),
    }


def report(
    program: str, place: dict, rows: list[dict], times: Mapping[str, Times], out: Path | None
) -> None:
    """Print the rows of a program and write them, with all that was measured, to `out`."""
    print(table(rows), flush=True)
    versions = ", ".join(f"{name} {number}" for name, number in place["versions"].items())
    print(f"\n{place['device']}; {place['threads']} threads; {versions}", flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        measured = {name: asdict(found) for name, found in times.items()}
        content = {"program": program, "surroundings": place, "rows": rows, "times": measured}
        out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(rows: list[dict], with_goals: bool = True) -> str:
    """The rows as Markdown, the goal beside each ratio, or only which direction is better."""
    columns = ("goal", "met") if with_goals else ("better",)
    lines = [("what", "ours", "peer", "ratio", *columns), ("---",) * (4 + len(columns))]
    for found in rows:
        value = f"{found['value']:.3g}" + (f" ± {found['spread']:.0%}" if found["spread"] else "")
        met = {None: "", True: "yes", False: "**no**"}[found["met"]]
        peer = found["peer"] if found["peer"] == "–" else f"{found['names'][1]}: {found['peer']}"
        better = {"≥": "higher", "≤": "lower", "": "–"}[found["goal"][:1]]
        cells = (found["goal"] or "–", met) if with_goals else (better,)
        lines.append((found["what"], found["ours"], peer, value, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
