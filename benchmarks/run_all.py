"""All benchmarks one after the other, and one table with the goal beside each ratio.

    python benchmarks/run_all.py                         prints the table, leaves runs/bench/*.json
    python benchmarks/run_all.py --only loss startup     some of them
    python benchmarks/run_all.py --write                 also into docs/benchmarks.md

A program that fails is named at the end and keeps the others from nothing; the exit code is 1
then. What the time is not enough for is named as well. The table comes from the JSON files alone.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import measure
from pages import put_between_marks

PROGRAMS = (
    *("augmentation", "loss", "encoders", "supcon", "overhead", "autoencoder", "startup"),
    *("scaling", "evaluation"),
)
ROUNDS = {"supcon": 5, "autoencoder": 5, "overhead": 5}
PLOT = measure.ROOT / "docs/images/scaling.png"
PAGE = measure.ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
WHOLE_SECONDS = 60 * 60  # of all programs together; a slow machine takes 40 minutes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=PROGRAMS, metavar="NAME")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "runs/bench")
    parser.add_argument("--data_dir", type=Path, default=measure.ROOT / "data")
    parser.add_argument("--write", action="store_true", help="put the table into docs/")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed, began = [], time.monotonic()
    for name in arguments.only:
        out = arguments.out / f"{name}.json"
        out.unlink(missing_ok=True)
        flags = ["--out", str(out), "--data_dir", str(arguments.data_dir)]
        flags += ["--rounds", str(ROUNDS[name])] if name in ROUNDS else []
        if name == "scaling":
            flags += ["--plot", str(PLOT if arguments.write else out.with_suffix(".png"))]
        print(f"\n{name}", flush=True)
        started = time.monotonic()
        if not run(name, flags, WHOLE_SECONDS - (started - began)):
            failed.append(name)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    found = [read(path) for name in PROGRAMS if (path := arguments.out / f"{name}.json").exists()]
    if not found:
        raise SystemExit("nothing was measured")
    print("\n" + page_of(found, with_goals=True))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    if arguments.write:
        write(page_of(found, with_goals=False))
    return 1 if failed else 0


def run(name: str, flags: list[str], seconds: float) -> bool:
    """Run one program; False where it fails or takes longer than `seconds`."""
    program = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, "-W", "ignore", str(program), *flags]
    process = subprocess.Popen(command, cwd=measure.ROOT)
    try:
        return process.wait(max(1, seconds)) == 0
    except subprocess.TimeoutExpired:
        print(f"{name}: the {WHOLE_SECONDS} s of all programs are over", file=sys.stderr)
        return False
    finally:
        process.terminate()  # it ends its contenders first
        process.wait()


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def page_of(found: list[dict], with_goals: bool) -> str:
    """The table of all rows, and the machine and versions that they hold for."""
    rows = [row for program in found for row in program["rows"]]
    wanted = [row["met"] for row in rows if row["met"] is not None]
    lines = [measure.table(rows, with_goals), ""]
    lines += [f"{sum(wanted)} of {len(wanted)} goals are met.\n"] if with_goals else []
    places = {}
    for program in found:
        told = {key: value for key, value in program["surroundings"].items() if key != "load"}
        places.setdefault(json.dumps(told), []).append(program)
    for place, programs in places.items():
        told = json.loads(place)
        versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
        load = max(program["surroundings"]["load"] for program in programs)
        lines.append(
            f"{', '.join(program['program'] for program in programs)}: {told['device']}, of which "
            f"{told['cores']} used, {told['threads']} threads, load before each at most {load}; "
            f"Python {told['python']}, {versions}; commit {told['commit']}."
        )
    return "\n".join(lines) + "\n"


def write(text: str) -> None:
    """Put the table between the two marks of docs/benchmarks.md."""
    put_between_marks(PAGE, BEGIN, END, f"\n{text}\n")


if __name__ == "__main__":
    raise SystemExit(main())
