"""Draw validation accuracy over training time of several runs, for RESULTS.md.

    python benchmarks/curves.py RUN ...            as docs/images/accuracy-over-time.png
    python benchmarks/curves.py RUN ... --out FILE

The accuracy is that of five nearest neighbors on the latents of the validation images, which every
script logs after each epoch; the time is that of the epochs, without validation. All runs must
have trained on the same images and the same hardware.
"""

import argparse
import io
from pathlib import Path

import collect_results
from matplotlib.figure import Figure

from common import console
from common.display import plots
from common.errors import UserError
from common.files import write
from common.run.runs import Run, read_run

OUT = collect_results.ROOT / "docs/images/accuracy-over-time.png"
KEY = "val/knn_accuracy"


def main(folders: list[Path], out: Path) -> None:
    runs = [read_run(folder) for folder in folders]
    for name in ("fingerprint", "train_images", "device", "threads"):
        if len(found := {str(run.facts[name]) for run in runs}) > 1:
            raise UserError(f"these runs differ in {name}: {', '.join(sorted(found))}")
    draw(runs).savefig(image := io.BytesIO(), format="png")
    write(out, image.getvalue())


def points(run: Run) -> tuple[list[float], list[float]]:
    """Minutes of training and validation accuracy in per cent, after each measured epoch."""
    minutes = run.cost()["training_seconds"] / run.settings["epochs"] / 60  # of one epoch
    rows = [row for row in run.rows if KEY in row and "time/epoch_seconds" in row]
    return [row["epoch"] * minutes for row in rows], [100 * row[KEY] for row in rows]


def label(run: Run) -> str:
    """Method, encoder and optimizer."""
    encoder = collect_results.encoder_of(run.settings)
    return f"{run.method}: {encoder}, {run.settings['optimizer']}"


@plots.styled
def draw(runs: list[Run]) -> Figure:
    """One curve a run; runs of one method have one color, the second is dashed."""
    figure = Figure(figsize=(6.4, 4), dpi=plots.DPI, layout="constrained")
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(run.method for run in runs))
    seen: list[str] = []
    for run in runs:
        dashes = ("-", "--", ":", "-.")[seen.count(run.method) % 4]
        seen.append(run.method)
        color = plots.TEN[methods.index(run.method)]
        style = {"color": color, "linestyle": dashes, "linewidth": 1.4, "marker": "o"}
        axes.plot(*points(run), **style, markersize=3, label=label(run))
    axes.set(xlabel="minutes of training", xlim=(0, None))
    axes.set_ylabel("nearest neighbors, % of validation images")
    facts = runs[0].facts
    axes.set_title(f"{facts['device']}; {facts['train_images']:,} training images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=plots.PALE, linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    console.begin()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    main(arguments.folders, arguments.out)
