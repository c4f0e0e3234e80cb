"""The start: from the command to the first training step on digits, and our own share of it.

The first is a process of its own from its creation until its first step is done. The second is
what `python -X importtime` says of our own files, without what they import.

    python benchmarks/startup.py --out runs/bench/startup.json
"""

import re
import subprocess
import sys
import tempfile
import time

import measure

SCRIPTS = ("train_ae", "train_joint", "train_supcon")
FIRST_STEP = """
import sys, time
import {name} as script
schedule, calls = script.optimizers.schedule, []
def at_each_step(*arguments):
    calls.append(time.time())
    if len(calls) == 2:
        print("first step", calls[1], flush=True)
        raise SystemExit
    return schedule(*arguments)
script.optimizers.schedule = at_each_step
script.main(script.parse(script.Config, sys.argv[1:]))
"""


def main() -> None:
    arguments = measure.parser(__doc__).parse_args()
    place = measure.surroundings()
    rows, times = [], {}
    for name in SCRIPTS:
        # the width of the page's first example: the start is asked for, not the network
        width = ["--width", "8"] if name == "train_supcon" else []
        found = measure.Times(1, place["threads"])
        for number in range(1 + min(3, arguments.rounds)):
            seconds = first_step(name, width)
            found.seconds += [seconds] if number else []  # the first one fills the disk's cache
        times[f"{name}, start"] = found
        own, everything = imports(name)
        rows.append(
            measure.claim(
                f"{name}.py on digits, seconds from the command to the first step",
                found.median,
                "≤ 8",
                f"{found.median:.2f} s, of it {everything:.2f} s of imports",
                spread=found.spread,
            )
        )
        rows.append(
            measure.claim(f"{name}.py, seconds of imports in our files", own, "≤ 1", f"{own:.3f} s")
        )
    measure.report("startup", place, rows, times, arguments.out)


def first_step(name: str, flags: list[str]) -> float:
    """Seconds from starting the process to the end of its first step."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags, "--tracking", "disabled", "--run_dir", f"{folder}/run"]
        command = [sys.executable, "-c", FIRST_STEP.format(name=name), *flags]
        started = time.time()
        done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True)
    found = re.search(r"first step ([\d.]+)", done.stdout)
    if not found:
        raise SystemExit(f"{name} made no step:\n{done.stdout}{done.stderr}")
    return float(found.group(1)) - started


def imports(name: str) -> tuple[float, float]:
    """Seconds of importing a script: in our own files, and in all."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {name}"]
    done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, check=True)
    own = everything = 0
    for microseconds, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \| +(\S+)", done.stderr):
        everything += int(microseconds)
        if module == name or module.split(".")[0] == "common":
            own += int(microseconds)
    return own / 1e6, everything / 1e6


if __name__ == "__main__":
    main()
