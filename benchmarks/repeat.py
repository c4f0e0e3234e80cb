"""Train commands again with several seeds, several at a time: what RESULTS.md shows, or new ones.

    python benchmarks/repeat.py commands.txt --seeds 3 --jobs 2 --out runs/again
    python benchmarks/collect_results.py runs/again/* --write

Of a text file, such as RESULTS.md, all lines count that begin with `python train_`. Run it where
their --data_dir lies. Each command and seed gets a run folder, OUT/LINE-seedN, by the number of its
line. The same call again goes on where it was stopped.
"""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common  # isort: skip  # noqa: F401  (before torch, which reads how threads wait)

from common import console
from common.config import parse
from common.errors import UserError
from common.run import jobs


def commands(text: str) -> dict[int, list[str]]:
    """The words of each command after `python`, by the number of its line, from 1."""
    lines = enumerate(text.splitlines(), 1)
    return {n: shlex.split(line)[1:] for n, line in lines if line.startswith("python train_")}


def train(words: list[str], seed: int, folder: str) -> None:
    """Start, resume or leave as it is the run in that folder."""
    name, *flags = words
    script = importlib.import_module(Path(name).stem)
    flags += ["--seed", str(seed), "--resume", folder, "--tracking", "disabled"]
    script.main(parse(script.Config, flags))


def main(text: str, seeds: int, at_a_time: int, out: Path) -> int:
    """1 if a run failed, which is said; the others go on."""
    found = commands(text)
    if not found:
        raise UserError("no line begins with `python train_`")
    calls = {
        f"{number}-seed{seed}": (words, seed, str(out / f"{number}-seed{seed}"))
        for seed in range(seeds)
        for number, words in found.items()
    }
    failed = 0
    with console.progress(len(calls), "runs", is_main=True) as bar:
        for name, error in jobs.run(train, calls, at_a_time, out / "logs"):
            failed += error is not None
            console.say(f"{name} failed: {error}" if error else f"{name} is finished")
            bar.update()
    return 1 if failed else 0


if __name__ == "__main__":
    console.begin()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="with the commands")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    given = parser.parse_args()
    raise SystemExit(main(given.file.read_text("utf-8"), given.seeds, given.jobs, given.out))
