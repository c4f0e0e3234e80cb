"""Draw validation accuracy over training time of several runs, for RESULTS.md.

    python benchmarks/curves.py                the runs in results.jsonl whose curve is kept
    python benchmarks/curves.py RUN ...        these run folders instead
    python benchmarks/curves.py --out FILE     in place of docs/images/accuracy-over-time.png

The accuracy is that of five nearest neighbors, by cosine similarity, on the latents of the
validation images, which every script logs after each epoch; the time is that of the epochs, without
validation. Of the kept runs those of --data on the hardware with the most curves are drawn, of each
setting its first seed. Run folders must hold runs on the same images and the same hardware.
"""

import argparse
from pathlib import Path

import collect_results
from matplotlib.figure import Figure

from common import console
from common.display import plots
from common.errors import UserError
from common.files import read_rows, write

OUT = collect_results.ROOT / "docs/images/accuracy-over-time.png"


def main(folders: list[Path], data: str, out: Path) -> None:
    if folders:
        runs = [run for folder in folders if (run := collect_results.read_run(folder))]
        runs = [run for run in runs if run["curve"]]  # none before this accuracy was logged
        for name in ("fingerprint", "train_images", "device", "threads"):
            if len(found := {str(run["facts"][name]) for run in runs}) > 1:
                raise UserError(f"these runs differ in {name}: {', '.join(sorted(found))}")
    else:
        runs = kept_runs(data)
    if not runs:
        where = "among these folders" if folders else "is kept; name run folders"
        raise UserError(f"no run of {data} with a curve {where}")
    write(out, plots.saved(draw(runs)))


def kept_runs(data: str) -> list[dict]:
    """The first seed of each kept setting with a curve, on the hardware that has the most."""
    groups: dict[tuple, dict[tuple, dict]] = {}
    for run in read_rows(collect_results.KEPT):
        if run["data"] == data and run.get("curve"):
            hardware = tuple(run["facts"][name] for name in ("device", "threads"))
            *setting, _ = collect_results.identity(run)
            groups.setdefault(hardware, {}).setdefault(tuple(setting), run)
    return list(max(groups.values(), key=len, default={}).values())


def points(run: dict) -> tuple[list[float], list[float]]:
    """Minutes of training and validation accuracy in per cent, after each measured epoch."""
    minutes = run["seconds"] / run["settings"]["epochs"] / 60  # of one epoch
    epochs, accuracies = zip(*run["curve"], strict=True)
    return [epoch * minutes for epoch in epochs], [100 * accuracy for accuracy in accuracies]


def label(run: dict) -> str:
    """Method, encoder and optimizer."""
    encoder = collect_results.encoder_of(run["settings"])
    return f"{collect_results.kind_of(run)}: {encoder}, {run['settings']['optimizer']}"


@plots.styled
def draw(runs: list[dict]) -> Figure:
    """One curve a run; runs of one method have one color, the second is dashed."""
    figure = Figure(figsize=(6.4, 4), dpi=plots.DPI, layout="constrained")
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(run["method"] for run in runs))
    seen: list[str] = []
    for run in runs:
        dashes = ("-", "--", ":", "-.")[seen.count(run["method"]) % 4]
        seen.append(run["method"])
        color = plots.TEN[methods.index(run["method"])]
        style = {"color": color, "linestyle": dashes, "linewidth": 1.4, "marker": "o"}
        axes.plot(*points(run), **style, markersize=3, label=label(run))
    axes.set(xlabel="minutes of training", xlim=(0, None))
    axes.set_ylabel("nearest neighbors, % of validation images")
    facts = runs[0]["facts"]
    axes.set_title(f"{facts['device']}; {facts['train_images']:,} training images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=plots.PALE, linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    console.begin()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--data", default=collect_results.JPEG_COPY, help="whose kept runs")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    main(arguments.folders, arguments.data, arguments.out)
