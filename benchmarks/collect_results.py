"""Finished runs become the tables of RESULTS.md and README.md; only what others reached is typed.

    python benchmarks/collect_results.py              the tables of all runs in results.jsonl
    python benchmarks/collect_results.py RUN ...      with these as well
    python benchmarks/collect_results.py RUN ... --write    keeps them, and writes both files anew

benchmarks/results.jsonl outlives the run folders: a line for each run, with every flag, versions,
hardware and all final metrics. A run made again (same flags and seed) replaces its line.
Runs that differ in nothing but the seed are one row: mean ± standard deviation (n − 1) and n.
Folders that hold no finished run, or one that left the test images unseen, are named and left out.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
from math import nan
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from pages import put_between_marks  # noqa: E402

import train_ae  # noqa: E402
import train_joint  # noqa: E402
import train_supcon  # noqa: E402
from common import models  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.files import read_rows, write  # noqa: E402
from common.runs import read_run as read_finished  # noqa: E402

SCRIPTS = {script.METHOD: script for script in (train_ae, train_joint, train_supcon)}
KEPT = ROOT / "benchmarks" / "results.jsonl"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
RECIPES_BEGIN, RECIPES_END = "<!-- recipes: begin -->\n", "<!-- recipes: end -->\n"
# A folder of images has no name of its own; its fingerprint tells which one it is.
JPEG_COPY = "CIFAR-10 (JPEG copy)"
FOLDERS = {
    "f5185bf6aa18a38c76e009464d6ecc90d0fd87879e61dfba555acd1791a14de8": JPEG_COPY,
}
IN_COMMANDS = {JPEG_COPY: "cifar10-images"}  # what such a folder is called in a command line
TITLES = {
    "digits": "Digits (scikit-learn)",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
}
NOT_IN_A_COMMAND = ("seed", "run_dir", "resume", "tracking", "project", "tags", "data_dir")
# Test accuracies in per cent of the student report that this project set out to beat.
REPORT = {
    ("MNIST", "ae"): "98.18",
    ("MNIST", "joint"): "99.10",
    ("MNIST", "supcon"): "99.58",
    (JPEG_COPY, "joint"): "73.09",
    (JPEG_COPY, "supcon"): "83.22",
}
# What public code reaches, in per cent; on CIFAR-10 itself, not on a copy.
PEERS = {
    ("MNIST", "ae"): "96",  # diar2705/Project-Deep-Learning-236781
    ("MNIST", "joint"): "99",  # the same
    (JPEG_COPY, "ae"): "63",  # the same
    (JPEG_COPY, "cross-entropy"): "94.9",  # plus-rkwitt/py_supcon_vs_ce
    (JPEG_COPY, "joint"): "94.9",  # the same, without the joint loss
    (JPEG_COPY, "supcon"): "94.8",  # the same
}
# What this project aims at: data, method, encoder (and whether it has residual blocks), what is
# measured, the goal on two CPU cores, and that on a GPU. Errors are shares of PCA's.
GOALS = (
    ("MNIST", "ae", "cnn", None, "test/accuracy", 99.3, None),
    ("MNIST", "ae", "cnn", None, "test/mse", 0.5, None),
    ("MNIST", "joint", "cnn", None, "test/accuracy", 99.7, None),
    ("MNIST", "supcon", "cnn", None, "test/accuracy", 99.75, None),
    (JPEG_COPY, "ae", "cnn", None, "test/accuracy", 66, None),
    (JPEG_COPY, "ae", "cnn", None, "test/mse", 1, None),
    (JPEG_COPY, "joint", "cnn", False, "test/accuracy", 81, None),
    (JPEG_COPY, "joint", "cnn", True, "test/accuracy", 89, None),
    (JPEG_COPY, "joint", "resnet18", None, "test/accuracy", 93, 95.5),
    (JPEG_COPY, "supcon", "resnet18", None, "test/accuracy", 91, 96.0),
)
SHOWN = ("MNIST", JPEG_COPY)  # in README.md
METHODS = {"ae": "autoencoder + classifier", "joint": "joint", "supcon": "contrastive + linear"}
PER_CENT = ("test/accuracy", "test/linear_accuracy", "test/knn_accuracy", "pca/accuracy")
COLUMNS = (
    *("row", "method", "encoder", "latents", "classifier %", "linear %", "kNN %"),
    *("classifier on PCA %", "report %", "peer %", "MSE (PCA)", "MAE (PCA)", "n", "epochs"),
    *("encoder training", "precision"),
)


def main(folders: list[Path], keep: bool) -> str:
    new = [run for folder in folders if (run := read_run(folder)) is not None]
    if folders and not new:
        raise UserError("no finished run among these folders; train one first")
    known = read_rows(KEPT) if KEPT.exists() else []
    runs = sorted({identity(run): run for run in known + new}.values(), key=identity)
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault(identity(run)[:-1], []).append(run)
    by_accuracy = sorted(groups, key=lambda key: (*key[:2], -on_test(groups[key])))
    groups = {key: groups[key] for key in by_accuracy}
    text = ""
    for title in dict.fromkeys(data for data, _, _ in groups):
        here = [found for (data, _, _), found in groups.items() if data == title]
        rows = [[str(number), *row_of(found)] for number, found in enumerate(here, 1)]
        text += f"\n### {title}\n\n" + markdown(COLUMNS, rows)
        lines = [f"# row {number}\n{command(found[0])}" for number, found in enumerate(here, 1)]
        text += "\n```bash\n" + "\n".join(lines) + "\n```\n"
        text += f"\n{surroundings([run for run in runs if run['data'] == title])}\n"
        text += f"\n{resumed(here)}\n"
    text += "\n### Goals\n\n" + goals(groups) + "\n"
    best = chosen(groups)
    short, lines = headline(best), recipes(best)
    if keep:
        write(KEPT, "".join(json.dumps(run, sort_keys=True) + "\n" for run in runs).encode())
        put_between_marks(ROOT / "RESULTS.md", BEGIN, END, text)
        put_between_marks(ROOT / "README.md", BEGIN, END, short)
        put_between_marks(ROOT / "README.md", RECIPES_BEGIN, RECIPES_END, lines)
    return text + short + lines


def chosen(groups: dict[tuple, list[dict]]) -> dict[tuple[str, str], list[dict]]:
    """Of each data set and method the setting that validation likes best, the two sets shown."""
    best: dict[tuple[str, str], list[dict]] = {}
    for (data, method, _), runs in groups.items():
        known = best.get((data, method))
        if data in SHOWN and (known is None or on_validation(runs) > on_validation(known)):
            best[data, method] = runs
    return best


def headline(best: dict[tuple[str, str], list[dict]]) -> str:
    """A row per method: what the chosen settings reach on the test images."""
    titles = [title for title in SHOWN if title in {data for data, _ in best}]
    columns, rows = ["test accuracy, %"], []
    for title in titles:
        columns += [title, "report", "peer"]
    for method, name in METHODS.items():
        row = [name]
        for title in titles:
            runs = best.get((title, method))
            network = f"({encoder_of(runs)}; n = {len(runs)})" if runs else ""
            row += [
                f"**{score(runs, 'test/accuracy')}** {network}" if runs else "–",
                REPORT.get((title, method), "–"),
                PEERS.get((title, method), "–"),
            ]
        rows.append(row)
    return "\n" + markdown(tuple(columns), rows) + "\n"


def goals(groups: dict[tuple, list[dict]]) -> str:
    """What was aimed at beside what the setting that validation likes best reaches."""
    rows = []
    for title, method, encoder, blocks, measure, goal, on_gpu in GOALS:
        fitting = [
            runs
            for (data, kind, _), runs in groups.items()
            if (data, kind, runs[0]["settings"]["encoder"]) == (title, method, encoder)
            and blocks in (None, bool(runs[0]["settings"]["blocks"]))
        ]
        runs = max(fitting, key=on_validation, default=[])
        aim, reached = f"≥ {goal} %", "not run"
        if measure == "test/mse":
            aim = f"MSE ≤ {goal} × PCA's"
        if runs and measure == "test/mse":
            errors = [
                [run["summary"].get(name, nan) for name in (measure, "pca/mse")] for run in runs
            ]
            reached = f"{spread([own / line for own, line in errors], 2)} ×"
        elif runs:
            reached = f"{score(runs, measure)} %"
        network = {None: encoder, False: f"{encoder}, no blocks", True: f"{encoder}, blocks"}[
            blocks
        ]
        gpu = "–" if on_gpu is None else f"≥ {on_gpu} %: not run"
        rows.append([title, method, network, aim, reached, gpu])
    return markdown(("data", "method", "encoder", "goal", "reached", "goal on a GPU"), rows)


def recipes(best: dict[tuple[str, str], list[dict]]) -> str:
    """The command of each chosen setting, and what it takes."""
    lines = []
    for title in SHOWN:
        for method, name in METHODS.items():
            if runs := best.get((title, method)):
                reached = f"{score(runs, 'test/accuracy')} %, n = {len(runs)}"
                lines += [f"# {title}, {name}: {reached}; encoder {minutes_of(runs)}"]
                lines += [command(runs[0])]
    return "\n```bash\n" + "\n".join(lines) + "\n```\n\n"


def on_validation(runs: list[dict]) -> float:
    """Accuracy on the validation images, by which settings are chosen; the mean over seeds."""
    return statistics.mean(run["summary"].get("val/accuracy", 0.0) for run in runs)


def identity(run: dict) -> tuple:
    """Data, method and flags; and the seed."""
    flags = {k: v for k, v in flags_of(run).items() if k not in NOT_IN_A_COMMAND}
    seed = run["settings"]["seed"]
    return run["data"], kind_of(run), json.dumps(flags, sort_keys=True), seed


def flags_of(run: dict) -> dict:
    """All flags of a run; those that it did not know yet had their default."""
    return dataclasses.asdict(SCRIPTS[run["method"]].Config()) | run["settings"]


def kind_of(run: dict) -> str:
    """The method; `cross-entropy` for the joint script without the error that makes the loss joint.

    That is the yardstick for the two other losses, never the joint row of the short table.
    """
    alone = run["method"] == "joint" and flags_of(run)["mae_weight"] == 0
    return "cross-entropy" if alone else run["method"]


def on_test(runs: list[dict]) -> float:
    """Accuracy on the test images, by which rows are ordered; the mean over seeds."""
    return statistics.mean(run["summary"]["test/accuracy"] for run in runs)


def read_run(folder: Path) -> dict | None:
    """What is kept of one run; None, said aloud, where it is not a finished and tested one."""
    try:
        run = read_finished(folder)
    except UserError as error:
        print(f"left out: {error}", file=sys.stderr)
        return None
    title = FOLDERS.get(run.facts["fingerprint"]) or TITLES.get(run.settings["dataset"])
    about_here = {*NOT_IN_A_COMMAND} - {"seed"}  # folders of this machine, and W&B's project
    return {
        "data": title or f"Folder {Path(run.settings['data_dir']).name}",
        "method": run.method,
        "settings": {k: v for k, v in run.settings.items() if k not in about_here},
        "facts": run.facts,
        "resumed": [
            {name: entry.get(name) for name in ("rows", "commit")} for entry in run.resumed
        ],
        "summary": run.summary,
        "seconds": run.cost()["training_seconds"],
    }


def row_of(runs: list[dict]) -> list[str]:
    """One row of the table: runs of equal settings but for the seed."""
    settings, method = runs[0]["settings"], kind_of(runs[0])
    return [
        method,
        encoder_of(runs),
        str(latents_of(runs[0])),
        *(score(runs, key) for key in PER_CENT),
        REPORT.get((runs[0]["data"], method), "–"),
        PEERS.get((runs[0]["data"], method), "–"),
        with_line(runs, "mse"),
        with_line(runs, "mae"),
        str(len(runs)),
        str(settings["epochs"]),
        minutes_of(runs),
        ", ".join(sorted({precision_of(run) for run in runs})),
    ]  # fmt: skip


def precision_of(run: dict) -> str:
    """What `--precision` came to on the hardware of this run."""
    facts = run["facts"]
    precision = facts.get("mixed_precision", facts.get("precision"))  # its name in early runs
    return {"no": "float32"}.get(precision, precision)


def encoder_of(runs: list[dict]) -> str:
    """The network in a few words, such as `cnn, blocks 1`."""
    settings = runs[0]["settings"]
    dials = [f"{name} {settings[name]}" for name in ("width", "blocks") if settings[name]]
    return ", ".join([settings["encoder"], *dials])


def latents_of(run: dict) -> int:
    """How many numbers the classifier, the linear probe and the neighbours read of an image."""
    names = ("encoder", "image_size", "width", "blocks")
    architecture = {name: run["settings"][name] for name in names}
    latent_dim = run["settings"].get("latent_dim")  # the contrastive script has none
    with torch.device("meta"):  # their number depends on neither the weights nor the colours
        network = models.build_encoder(**architecture, channels=3, latent_dim=latent_dim)
    return network.output_dim


def minutes_of(runs: list[dict]) -> str:
    """How long the encoder trained, the mean over the runs."""
    return f"{statistics.mean(run['seconds'] for run in runs) / 60:.0f} min"


def score(runs: list[dict], key: str) -> str:
    """A share of the summaries in per cent, two digits."""
    return spread([100 * run["summary"].get(key, nan) for run in runs], 2)


def spread(values: list[float], digits: int) -> str:
    """Mean, and ± standard deviation where there are several values; – where one is missing."""
    if any(value != value for value in values):
        return "–"
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def with_line(runs: list[dict], name: str) -> str:
    """The error of reconstruction and, in brackets, that of PCA of the same size (of any seed)."""
    own, line = (
        [run["summary"].get(f"{group}/{name}", nan) for run in runs] for group in ("test", "pca")
    )
    reached, floor = spread(own, 5), spread([statistics.mean(line)], 5)
    return reached if floor == "–" or reached == "–" else f"{reached} ({floor})"


def command(run: dict) -> str:
    """The command line of this run but for its seed: data, and what differs from the defaults."""
    script = SCRIPTS[run["method"]]
    defaults = dataclasses.asdict(script.Config())
    flags = flags_of(run)
    words = [
        f"--{name} {value}" if not isinstance(value, bool) else f"--{name}={value}"
        for name, default in defaults.items()
        if name not in NOT_IN_A_COMMAND and (value := flags[name]) != default
    ]
    if flags["dataset"] == "folder":
        name = IN_COMMANDS.get(run["data"], run["data"].removeprefix("Folder "))
        words.insert(1, f"--data_dir {shlex.quote(name)}")
    return " ".join(["python", f"{script.__name__}.py", *words])


def surroundings(runs: list[dict]) -> str:
    """Hardware, versions, commits and seeds of the runs of one table, each said once."""

    def each(name: str) -> str:
        values = (str(run["facts"].get(name)).split(" or ") for run in runs)  # "1 or 2" threads
        return " or ".join(sorted({value for several in values for value in several}))

    seeds = ", ".join(sorted({str(run["settings"]["seed"]) for run in runs}))
    return (
        f"Seeds {seeds}; {each('device')}; {each('threads')} threads, {each('processes')} process; "
        f"Python {each('python')}, torch {each('torch')}; commit {each('commit')}."
    )


def resumed(rows: list[list[dict]]) -> str:
    """Which rows of one table hold runs that were stopped and resumed, or that may.

    A run that was kept before this was recorded has no entry "resumed".
    """
    told, unknown = [], []
    for number, runs in enumerate(rows, 1):
        if any("resumed" not in run for run in runs):
            unknown.append(str(number))
        for run in runs:
            if entries := run.get("resumed"):
                commits = ", ".join(str(entry["commit"]) for entry in entries)
                told.append(f"row {number}, seed {run['settings']['seed']} (at commit {commits})")
    text = f"Resumed runs: {'; '.join(told) or 'none recorded'}."
    which = "any row" if len(unknown) == len(rows) else f"row {', '.join(unknown)}"
    return text + (f" Not recorded for {which}." if unknown else "")


def markdown(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table in Markdown, a header over its rows."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--write", action="store_true", help="keep them, and write both files anew")
    arguments = parser.parse_args()
    print(main(arguments.folders, arguments.write))
