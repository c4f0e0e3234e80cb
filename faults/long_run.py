"""Does a long run grow? Memory, open files and threads after epoch 5 and at the end, on digits.

    python faults/long_run.py                            200 epochs of each script
    python faults/long_run.py --epochs 6 --width 16      further flags go to the scripts

Beside them stand the times of a training step and of the checkpoint that ends each epoch. The
settings are those of tests/default_size.py. Memory is what is held once the allocators have given
back their free pages, so that it differs by tenths of a percent from run to run.
"""

import argparse
import ctypes
import gc
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["WANDB_MODE"] = "offline"

from default_size import FEW, SCRIPTS  # noqa: E402

from common.config import parse  # noqa: E402
from common.files import read_json, read_rows, write_json  # noqa: E402
from common.run import checkpoints  # noqa: E402

EARLY = 5  # epochs, by which everything has been loaded that ever will be


def main(methods: list[str], epochs: int, tracking: str, words: list[str]) -> list[dict]:
    """One dict per script; each runs in a process of its own, which writes what it saw."""
    found = []
    for method in methods:
        with tempfile.TemporaryDirectory() as place:
            flags = [f"--epochs={epochs}", f"--tracking={tracking}", f"--run_dir={place}/run"]
            process = os.fork()
            if not process:
                try:
                    watch(method, [*FEW, *SCRIPTS[method][1], *words, *flags], Path(place))
                    sys.stdout.flush()
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            if os.waitpid(process, 0)[1]:
                raise SystemExit(f"train_{method}.py failed")
            about = {"script": method, "epochs": epochs, "tracking": tracking}
            found.append(about | read_json(Path(place, "seen.json")))
    return found


def watch(method: str, words: list[str], place: Path) -> None:
    """Run a script; write down what it holds whenever it saves, which is once per epoch."""
    script, _ = SCRIPTS[method]
    save_last, start, seen, seconds = checkpoints.save_last, checkpoints.Writer.start, [], []

    def timed(folder: Path, state: dict) -> None:
        started = time.perf_counter()
        save_last(folder, state)
        seconds.append(time.perf_counter() - started)

    def starting(writer: checkpoints.Writer, write: Callable, *words: Any) -> None:
        if write is timed:
            writer.wait()  # nothing else is going on when memory is read
            seen.append(held())
        start(writer, write, *words)

    checkpoints.save_last, checkpoints.Writer.start = timed, starting
    script.main(parse(script.Config, words))
    rows = read_rows(place / "run/metrics.jsonl")
    steps = max(row["step"] for row in rows if "train/learning_rate" in row)
    trained = sum(row["time/epoch_seconds"] for row in rows if "time/epoch_seconds" in row)
    size = (place / "run/checkpoints/last.safetensors").stat().st_size
    timing = {
        "step_ms": 1000 * trained / steps,
        "checkpoint_ms": 1000 * sorted(seconds)[len(seconds) // 2],
        "checkpoint_mib": size / 2**20,
    }
    write_json(place / "seen.json", {"early": seen[EARLY], "late": seen[-1], **timing})


def held() -> dict[str, float]:
    """Resident memory in MiB, open files and threads of this process (Linux)."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # else a training keeps what it has freed
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return {"mib": mib, "files": files, "threads": threads}


def table(found: list[dict]) -> str:
    lines = [
        f"{'script':8}{'MiB after 5':>12}{'at the end':>11}{'change':>8}{'files':>8}{'threads':>9}"
        f"{'step ms':>9}{'checkpoint ms':>15}{'MiB':>6}"
    ]
    for run in found:
        early, late = run["early"], run["late"]
        lines.append(
            f"{run['script']:8}{early['mib']:12.1f}{late['mib']:11.1f}"
            f"{late['mib'] / early['mib'] - 1:+8.1%}"
            f"{early['files']:>5}→{late['files']:<2}{early['threads']:>6}→{late['threads']:<2}"
            f"{run['step_ms']:9.1f}{run['checkpoint_ms']:15.1f}{run['checkpoint_mib']:6.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--epochs", type=int, default=200, help="more than 5")
    parser.add_argument("--tracking", choices=("offline", "disabled"), default="offline")
    parser.add_argument("--out", type=Path, help="write what was seen there as JSON")
    arguments, further = parser.parse_known_args()
    if arguments.epochs <= EARLY:
        parser.error(f"--epochs {arguments.epochs}: memory is first read after epoch {EARLY}")
    results = main(arguments.scripts, arguments.epochs, arguments.tracking, further)
    print(table(results))
    if arguments.out:
        write_json(arguments.out, results)
