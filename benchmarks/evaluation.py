"""Evaluation after training as a share of a run of 20 epochs on MNIST.

One epoch is trained and counted 20 times; what comes after it runs in full: encoding, probes,
geometry, t-SNE, pictures, and PCA with its own classifier. The classifier on the frozen encoder is
the autoencoder's second stage of training, not evaluation.

    python benchmarks/evaluation.py --out runs/bench/evaluation.json
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure

EPOCHS = 20


def main() -> None:
    made = measure.parser(__doc__)
    made.add_argument("--methods", nargs="+", default=["joint", "ae"], help="ae, joint, supcon")
    arguments = made.parse_args()
    place = measure.surroundings()
    rows, times = [], {}
    with tempfile.TemporaryDirectory() as folder:
        data_dir = measure.mnist_folder(arguments.data_dir, Path(folder) / "data")
        for name in arguments.methods:
            epoch, second_stage, rest = phases(name, data_dir, Path(folder) / name)
            whole = EPOCHS * epoch + second_stage + rest
            rows.append(
                measure.claim(
                    f"train_{name}.py, MNIST, evaluation's share of {EPOCHS} epochs",
                    rest / whole,
                    "≤ 0.10",
                    f"{rest:.1f} s of {whole:.0f} s",
                )
            )
            for what, seconds in (
                ("epoch", epoch),
                ("second stage", second_stage),
                ("evaluation", rest),
            ):
                times[f"{name}, {what}"] = measure.Times(1, place["threads"], seconds=[seconds])
    measure.report("evaluation", place, rows, times, arguments.out)


def phases(name: str, data_dir: Path, run_dir: Path) -> tuple[float, float, float]:
    """Seconds of an epoch, of the second stage of training, and of evaluation at the end."""
    script = __import__(f"train_{name}")
    from common.files import read_rows

    save_last, train_classifier = script.checkpoints.save_last, script.probes.train_classifier
    ends, stages = [], []

    def save(*arguments: Any) -> None:
        ends.append(time.perf_counter())
        save_last(*arguments)

    def train(*arguments: Any, **recipe: Any) -> Iterator[dict[str, float]]:
        started = time.perf_counter()
        yield from train_classifier(*arguments, **recipe)
        stages.append(time.perf_counter() - started)

    script.checkpoints.save_last, script.probes.train_classifier = save, train
    settings = {"dataset": "mnist", "data_dir": str(data_dir), "run_dir": str(run_dir)}
    if name == "supcon":
        settings["encoder"] = "cnn"
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        script.main(script.Config(epochs=1, tracking="disabled", **settings))
    finished = time.perf_counter()
    script.checkpoints.save_last, script.probes.train_classifier = save_last, train_classifier
    rows = read_rows(run_dir / "metrics.jsonl")
    epoch = next(row["time/epoch_seconds"] for row in rows if "time/epoch_seconds" in row)
    second_stage = stages[0] if name == "ae" else 0.0
    return epoch, second_stage, finished - ends[-1] - second_stage


if __name__ == "__main__":
    main()
