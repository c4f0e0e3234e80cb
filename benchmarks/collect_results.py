"""Write the tables of RESULTS.md and README.md from finished runs; only others' results are typed.

    python benchmarks/collect_results.py              the tables of all runs in results.jsonl
    python benchmarks/collect_results.py RUN ...      with these as well
    python benchmarks/collect_results.py RUN ... --write    keeps them, and writes both files anew

benchmarks/results.jsonl keeps one line per run, with every flag, versions, hardware, all final
metrics and the curve that curves.py draws. A run made again (same flags and seed, on a CPU or on a
GPU) replaces its line. Runs that differ in the seed only are one row: mean ± standard deviation
(n − 1) and n. The table of tries is that of benchmarks/tries.py.
Folders that hold no finished run, or one that left the test images unseen, are named and left out.
"""

import dataclasses
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import tries  # noqa: E402
from pages import collect, put_between_marks  # noqa: E402
from scipy import stats  # noqa: E402

import train_ae  # noqa: E402
import train_joint  # noqa: E402
import train_supcon  # noqa: E402
from common import models  # noqa: E402
from common.config import renamed  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.files import read_rows, write_rows  # noqa: E402
from common.run import runtime  # noqa: E402
from common.run.runs import Run  # noqa: E402
from common.run.runs import read_run as read_finished  # noqa: E402

SCRIPTS = {script.METHOD: script for script in (train_ae, train_joint, train_supcon)}
KEPT = ROOT / "benchmarks" / "results.jsonl"
# What is written: page and name of the part between two marks.
PARTS = (
    *(("RESULTS.md", "tables"), ("README.md", "tables"), ("RESULTS.md", "recipes")),
    ("RESULTS.md", "tries"),
)
# names of image folders, by their fingerprint
JPEG_COPY = "CIFAR-10 (JPEG copy)"
CLIP_ART = "Clip art"  # the eight largest topics of Debian's openclipart-png
FOLDERS = {
    "f5185bf6aa18a38c76e009464d6ecc90d0fd87879e61dfba555acd1791a14de8": JPEG_COPY,
    "981dab0fdd62a17161425ffba2ea32f9b4543d04dbde22181ada5cad69ec5ce4": CLIP_ART,
}
# their --data_dir in the commands that are shown
IN_COMMANDS = {JPEG_COPY: "cifar10-images", CLIP_ART: "clipart"}
TITLES = {
    "digits": "Digits (scikit-learn)",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
}
NOT_IN_A_COMMAND = (
    *("seed", "run_dir", "resume", "tracking", "project", "group", "tags", "data_dir"),
)
# Test accuracies in per cent of the student report that this project set out to beat.
REPORT = {
    ("MNIST", "ae"): "98.18",
    ("MNIST", "joint"): "99.10",
    ("MNIST", "supcon"): "99.58",
    (JPEG_COPY, "joint"): "73.09",
    (JPEG_COPY, "supcon"): "83.22",
}
# Test accuracies of public code in per cent; on CIFAR-10 itself, not on a copy.
PEERS = {
    ("MNIST", "ae"): "96",  # diar2705/Project-Deep-Learning-236781
    ("MNIST", "joint"): "99",  # the same
    (JPEG_COPY, "ae"): "63",  # the same
    (JPEG_COPY, "cross-entropy"): "94.9",  # plus-rkwitt/py_supcon_vs_ce
    (JPEG_COPY, "joint"): "94.9",  # the same, without the joint loss
    (JPEG_COPY, "supcon"): "94.8",  # the same
}
# flags that `paired` rows have in common
BESIDE = ("dataset", "image_size", "limit_train", "labels_per_class", "encoder", "width", "blocks")
BESIDE += ("epochs", "batch_size", "optimizer", "learning_rate", "schedule", "augment", "flip")
SHOWN = ("MNIST", JPEG_COPY)  # in README.md
METHODS = {"ae": "autoencoder + classifier", "joint": "joint", "supcon": "contrastive + linear"}
CURVE = "val/knn_cosine_accuracy"  # which every script logs; drawn by curves.py
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
    kept = read_rows(KEPT) if KEPT.exists() else []
    runs = sorted({identity(run): run for run in kept + new}.values(), key=identity)
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault(identity(run)[:-1], []).append(run)
    by_accuracy = sorted(groups, key=lambda key: (*key[:2], -on_test(groups[key])))
    groups = {key: groups[key] for key in by_accuracy}
    text = ""
    for title in dict.fromkeys(data for data, *_ in groups):
        here = [found for (data, *_), found in groups.items() if data == title]
        rows = [[str(number), *row_of(found)] for number, found in enumerate(here, 1)]
        text += f"\n### {title}\n\n" + markdown(COLUMNS, rows)
        lines = [f"# row {number}\n{command(found[0])}" for number, found in enumerate(here, 1)]
        text += "\n```bash\n" + "\n".join(lines) + "\n```\n"
        text += f"\n{surroundings([run for run in runs if run['data'] == title])}\n"
        text += f"\n{resumed(here)}\n"
        text += "".join(f"\n{line}\n" for line in paired(here))
    best, on_gpu = (best_settings(groups, gpu) for gpu in (False, True))
    tried = f"\n{tries.table(tries.ROWS)}\n"
    texts = (text, headline(best, on_gpu), recipes(best) + recipes(on_gpu), tried)
    if keep:
        write_rows(KEPT, runs, sort_keys=True)
        for (page, name), part in zip(PARTS, texts, strict=True):
            put_between_marks(ROOT / page, *marks(name), part)
    return "".join(texts)


def marks(name: str) -> tuple[str, str]:
    """The lines around a part of a page that is written here."""
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def best_settings(
    groups: dict[tuple, list[dict]], on_gpu: bool
) -> dict[tuple[str, str], list[list[dict]]]:
    """`unbeaten` settings of each data set shown and method, trained on a CPU or on a GPU."""
    found: dict[tuple[str, str], list[list[dict]]] = {}
    for (data, method, *_), runs in groups.items():
        if data in SHOWN and is_on_gpu(runs[0]) == on_gpu:
            found.setdefault((data, method), []).append(runs)
    return {key: unbeaten(settings) for key, settings in found.items()}


def unbeaten(settings: list[list[dict]]) -> list[list[dict]]:
    """Those that are more accurate on validation than every quicker one, the quickest first."""
    kept: list[list[dict]] = []
    for runs in sorted(settings, key=seconds_of):
        if not kept or on_validation(runs) > on_validation(kept[-1]):
            kept.append(runs)
    return kept


def headline(
    best: dict[tuple[str, str], list[list[dict]]], on_gpu: dict[tuple[str, str], list[list[dict]]]
) -> str:
    """A row per method: test accuracy of the best setting on validation, on a CPU and on a GPU."""
    titles = [title for title in SHOWN if title in {data for data, _ in (*best, *on_gpu)}]
    with_gpu = {data for data, _ in on_gpu}
    columns, rows = ["test accuracy, %"], []
    for title in titles:
        columns += [title, *([f"{title}, on a GPU"] if title in with_gpu else []), "peer"]
    for method, name in METHODS.items():
        row = [name]
        for title in titles:
            row.append(reached(best.get((title, method)), "–"))
            if title in with_gpu:
                row.append(reached(on_gpu.get((title, method)), "not run"))
            row.append(PEERS.get((title, method), "–"))
        rows.append(row)
    return "\n" + markdown(tuple(columns), rows) + "\n"


def reached(settings: list[list[dict]] | None, otherwise: str) -> str:
    """The accuracy of the best of these settings, with its encoder and number of seeds."""
    if not settings:
        return otherwise
    runs = settings[-1]
    return (
        f"**{score(runs, 'test/accuracy')}** ({encoder_of(runs[0]['settings'])}; n = {len(runs)})"
    )


def recipes(best: dict[tuple[str, str], list[list[dict]]]) -> str:
    """The commands of all these settings, each with its accuracy and duration, as a block."""
    lines = []
    for title in SHOWN:
        for method, name in METHODS.items():
            for runs in best.get((title, method), []):
                reached = f"{score(runs, 'test/accuracy')} %, n = {len(runs)}"
                lines += [f"# {title}, {name}: {reached}; encoder {minutes_of(runs)}"]
                lines += [command(runs[0])]
    return "\n```bash\n" + "\n".join(lines) + "\n```\n\n"


def seconds_of(runs: list[dict]) -> float:
    """Mean training time of the encoder."""
    return statistics.mean(run["seconds"] for run in runs)


def on_validation(runs: list[dict]) -> float:
    """Mean validation accuracy over seeds, by which settings are chosen."""
    return statistics.mean(run["summary"].get("val/accuracy", 0.0) for run in runs)


def identity(run: dict) -> tuple:
    """What identifies a run: data, method, flags, the GPU if it was on one, and seed."""
    flags = {k: v for k, v in flags_of(run).items() if k not in NOT_IN_A_COMMAND}
    gpu = run["facts"]["device"] if is_on_gpu(run) else ""
    setting = json.dumps(flags, sort_keys=True), gpu
    return run["data"], kind_of(run), *setting, run["settings"]["seed"]


def is_on_gpu(run: dict) -> bool:
    """Whether a run trained on a GPU."""
    return "cuda" in run["facts"] or run["facts"]["device"].endswith(runtime.APPLE_GPU)


def flags_of(run: dict) -> dict:
    """All flags of a run, with defaults for those that its version lacked."""
    return renamed(dataclasses.asdict(SCRIPTS[run["method"]].Config()) | run["settings"])


def kind_of(run: dict) -> str:
    """The method; `cross-entropy` for the joint script without its MAE term.

    That is the baseline of the two other losses, never the joint row of the short table.
    """
    alone = run["method"] == "joint" and flags_of(run)["mae_weight"] == 0
    return "cross-entropy" if alone else run["method"]


def on_test(runs: list[dict]) -> float:
    """Mean test accuracy over seeds, by which rows are sorted."""
    return statistics.mean(run["summary"]["test/accuracy"] for run in runs)


def read_run(folder: Path) -> dict | None:
    """What is kept of one run; None, with a message, if it is not finished or not tested."""
    try:
        run = read_finished(folder)
    except UserError as error:
        print(f"left out: {error}", file=sys.stderr)
        return None
    title = FOLDERS.get(run.facts["fingerprint"]) or TITLES.get(run.settings["dataset"])
    local = {*NOT_IN_A_COMMAND} - {"seed"}  # folders of this machine, and W&B's project
    return {
        "data": title or f"Folder {Path(run.settings['data_dir']).name}",
        "method": run.method,
        "settings": {k: v for k, v in run.settings.items() if k not in local},
        "facts": run.facts,
        "resumed": [
            {name: entry.get(name) for name in ("rows", "commit")} for entry in run.resumed
        ],
        "summary": run.summary,
        "seconds": run.cost()["training_seconds"],
        "curve": curve_of(run),
    }


def curve_of(run: Run) -> list[tuple[float, float]]:
    """Epoch and accuracy of nearest neighbors on validation, after each measured epoch."""
    rows = [row for row in run.rows if CURVE in row and "time/epoch_seconds" in row]
    return [(row["epoch"], row[CURVE]) for row in rows]


def row_of(runs: list[dict]) -> list[str]:
    """One row of the table: runs of equal settings but for the seed."""
    settings, method = runs[0]["settings"], kind_of(runs[0])
    return [
        method,
        encoder_of(settings),
        str(latents_of(runs[0])),
        *(score(runs, key) for key in PER_CENT),
        REPORT.get((runs[0]["data"], method), "–"),
        PEERS.get((runs[0]["data"], method), "–"),
        with_pca(runs, "mse"),
        with_pca(runs, "mae"),
        str(len(runs)),
        str(settings["epochs"]),
        minutes_of(runs),
        ", ".join(sorted({precision_of(run) for run in runs})),
    ]  # fmt: skip


def precision_of(run: dict) -> str:
    """The precision that `--precision` selected on this run's hardware."""
    precision = run["facts"]["mixed_precision"]
    return {"no": "float32"}.get(precision, precision)


def encoder_of(settings: Mapping[str, Any]) -> str:
    """A short name of the encoder of a run with these flags, such as `cnn, blocks 1`."""
    sizes = [f"{name} {settings[name]}" for name in ("width", "blocks") if settings[name]]
    return ", ".join([settings["encoder"], *sizes])


def latents_of(run: dict) -> int:
    """The dimension of the latents that classifier, linear probe and kNN use."""
    names = ("encoder", "image_size", "width", "blocks")
    architecture = {name: run["settings"][name] for name in names}
    latent_dim = run["settings"].get("latent_dim")  # the contrastive script has none
    with torch.device("meta"):  # it depends on neither weights nor channels
        network = models.build_encoder(**architecture, channels=3, latent_dim=latent_dim)
    return network.output_dim


def minutes_of(runs: list[dict]) -> str:
    """Mean training time of the encoder, and on which GPU if on one."""
    seconds = seconds_of(runs)
    text = f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"
    return f"{text} on one {runs[0]['facts']['device']}" if is_on_gpu(runs[0]) else text


def score(runs: list[dict], key: str) -> str:
    """A metric of the summaries in per cent, two digits."""
    return mean_and_std([100 * run["summary"].get(key, nan) for run in runs], 2)


def mean_and_std(values: list[float], digits: int) -> str:
    """Mean, and ± standard deviation if there are several values; – if one is missing."""
    if any(value != value for value in values):
        return "–"
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def with_pca(runs: list[dict], name: str) -> str:
    """The reconstruction error and, in brackets, that of PCA of the same size (of any seed)."""
    own, pca = (
        [run["summary"].get(f"{group}/{name}", nan) for run in runs] for group in ("test", "pca")
    )
    own, pca = mean_and_std(own, 5), mean_and_std([statistics.mean(pca)], 5)
    return own if "–" in (own, pca) else f"{own} ({pca})"


def command(run: dict) -> str:
    """The command line of this run without its seed: data, and flags that are not defaults."""
    script = SCRIPTS[run["method"]]
    defaults = dataclasses.asdict(script.Config(evaluate_every=1))  # the default beside --epochs
    flags = flags_of(run)
    arguments = [
        f"--{name} {value}" if not isinstance(value, bool) else f"--{name}={value}"
        for name, default in defaults.items()
        if name not in NOT_IN_A_COMMAND and (value := flags[name]) != default
    ]
    if flags["dataset"] == "folder":
        name = IN_COMMANDS.get(run["data"], run["data"].removeprefix("Folder "))
        arguments.insert(1, f"--data_dir {shlex.quote(name)}")
    return " ".join(["python", f"{script.__name__}.py", *arguments])


def surroundings(runs: list[dict]) -> str:
    """Hardware, versions, commits and seeds of the runs of one table."""

    def each(name: str) -> str:
        return " or ".join(sorted({str(run["facts"].get(name)) for run in runs}))

    seeds = ", ".join(sorted({str(run["settings"]["seed"]) for run in runs}))
    return (
        f"Seeds {seeds}; {each('device')}; threads {each('threads')}, processes "
        f"{each('processes')}; Python {each('python')}, torch {each('torch')}; commit "
        f"{each('commit')}."
    )


def resumed(rows: list[list[dict]]) -> str:
    """The runs of one table that were stopped and resumed."""
    found = []
    for number, runs in enumerate(rows, 1):
        for run in runs:
            if entries := run["resumed"]:
                commits = ", ".join(str(entry["commit"]) for entry in entries)
                found.append(f"row {number}, seed {run['settings']['seed']} (at commit {commits})")
    return f"Resumed runs: {'; '.join(found) or 'none'}."


def paired(rows: list[list[dict]]) -> list[str]:
    """How much joint and contrastive training differ, where all else that is in `BESIDE` is equal.

    A sentence for each such pair of rows of one table with at least two common seeds: the mean of
    the differences of their test accuracies by seed, with its 95 % interval by Student's t.
    """
    joint, supcon = (
        [
            (number, training_of(runs[0]), {run["settings"]["seed"]: run for run in runs})
            for number, runs in enumerate(rows, 1)
            if runs[0]["method"] == method
        ]
        for method in ("joint", "supcon")
    )
    lines = []
    for (number, training, ours), (other, same, theirs) in itertools.product(joint, supcon):
        if training == same and len(seeds := sorted(ours.keys() & theirs.keys())) > 1:
            differences = [100 * (on_test([ours[s]]) - on_test([theirs[s]])) for s in seeds]
            error = statistics.stdev(differences) / len(seeds) ** 0.5
            half = stats.t.ppf(0.975, len(seeds) - 1) * error
            lines.append(
                f"Row {number} minus row {other}, with the same network, epochs, batches and "
                f"optimizer: {statistics.mean(differences):.2f} ± {half:.2f} points (95 %, paired "
                f"over seeds {', '.join(map(str, seeds))})."
            )
    return lines


def training_of(run: dict) -> tuple:
    """What `paired` rows have in common: the flags in `BESIDE`, and whether it was on a GPU."""
    flags = flags_of(run)
    return is_on_gpu(run), *(flags[name] for name in BESIDE)


def markdown(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    collect(main, __doc__, "RUN")
