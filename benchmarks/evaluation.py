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
from unittest import mock

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
            settings = {"dataset": "mnist", "data_dir": str(data_dir)}
            settings |= {"encoder": "cnn"} if name == "supcon" else {}
            run_dir = str(Path(folder) / name)
            epoch, second_stage, rest = phases(name, run_dir=run_dir, **settings)
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


def phases(name: str, **settings: Any) -> tuple[float, float, float]:
    """Seconds of an epoch, of the second stage of training, and of evaluation at the end."""
    from common.evaluation import probes
    from common.files import read_rows
    from common.run.session import Session

    script = __import__(f"train_{name}")
    load_best, train_classifier = Session.load_best, probes.train_classifier
    ends, stages = [], []

    def after_training(session: Session, *arguments: Any) -> None:
        ends.append(time.perf_counter())
        load_best(session, *arguments)

    def train(*arguments: Any, **recipe: Any) -> Iterator[dict[str, float]]:
        started = time.perf_counter()
        yield from train_classifier(*arguments, **recipe)
        stages.append(time.perf_counter() - started)

    with (
        mock.patch.object(Session, "load_best", after_training),
        mock.patch.object(probes, "train_classifier", train),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        script.main(script.Config(epochs=1, tracking="disabled", **settings))
    finished = time.perf_counter()
    rows = read_rows(Path(settings["run_dir"]) / "metrics.jsonl")
    epoch = next(row["time/epoch_seconds"] for row in rows if "time/epoch_seconds" in row)
    second_stage = stages[0] if name == "ae" else 0.0
    return epoch, second_stage, finished - ends[0] - second_stage


if __name__ == "__main__":
    main()
