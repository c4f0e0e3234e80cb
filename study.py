"""Which way of learning a latent space serves these images best, with how many labels?

Trains an autoencoder, a joint classifier, supervised contrastive learning and SimCLR on one
footing: the same encoder, optimizer, augmentation, order of images and time; then compares what
their latents are good for, with intervals, and recommends. Every run is a run folder like any
other, and its command stands in OUT/study.json.

The time (--minutes) is that of training, in equal shares; what a run's epochs take is measured
first. Encoders that learn without labels are trained once per seed, whatever the numbers of labels.
Measuring the latents comes on top. The same command again goes on where the study was stopped. What
to expect on 2 CPU cores: the first line below in about seven minutes, half of them for measuring.

    python study.py --minutes 3 --seeds 1                    handwritten digits, no download
    python study.py --dataset folder --data_dir pets --minutes 60 --labels_per_class 10 100 all
    python study.py --dataset cifar10 --epochs 8
"""

import contextlib
import io
import math
import os
import re
import shlex
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import common  # isort: skip  # noqa: F401  (before torch, which reads how threads wait)

import numpy as np

import compare
import train_ae
import train_joint
import train_supcon
from common import console, models
from common.config import (
    BatchSize,
    DatasetName,
    EncoderName,
    ImageSize,
    OptimizerName,
    Place,
    PositiveFloat,
    PositiveInt,
    Views,
    White,
    parse,
)
from common.data import augmentation, datasets, layout
from common.display import accuracies, plots, tables
from common.errors import UserError
from common.evaluation import report, studies
from common.evaluation.studies import Member
from common.files import lock, made, read_json, read_rows, write_json, write_text
from common.run import checkpoints, jobs, runs, runtime, tracking, wandb_backend

METHOD = "study"

Method = Literal["ae", "joint", "supcon", "simclr"]
SCRIPTS = {"ae": train_ae, "joint": train_joint, "supcon": train_supcon, "simclr": train_supcon}
WITHOUT_LABELS = ("ae", "simclr")  # what they learn does not depend on the number of labels
TRIAL_STEPS, TRIAL_STEPS_OF_A_GPU = 6, 200  # of each epoch of a trial: a second or more
LOCK = ".lock"
FREE = ("data_dir", "out", "tracking", "jobs")  # what may change when a study is continued


@dataclass(frozen=True)
class Config:
    # Data
    dataset: DatasetName = "digits"  # which images; folder: your own
    data_dir: Place = "data"  # where they lie; for folder it holds train/CLASS/* (and test/CLASS/*)
    image_size: ImageSize = 32  # pixels a side
    limit_train: BatchSize | None = None  # take only so many training images, for a quick try
    skip_unreadable: bool = False  # folder: leave out images that cannot be read
    labels: str | None = None  # folder: a CSV file of path, label (and group), in place of folders
    white: White | None = None  # folder: white of 16-bit and float images; None: 65535, 1 of float
    # What is compared
    methods: tuple[Method, ...] = ("ae", "joint", "supcon", "simclr")  # simclr: without labels
    labels_per_class: tuple[str, ...] = ("all",)  # such as 10 100 all: a run for each
    seeds: PositiveInt = 3  # runs of each method, with seeds 0, 1, ...
    # The same for all
    minutes: PositiveFloat | None = None  # of all trainings together; give this or --epochs
    epochs: PositiveInt | None = None  # of each run, in place of --minutes
    encoder: EncoderName = "airbench"  # the network in front of the latents
    width: PositiveInt = 32  # its base channels; airbench with 32 has 128 features
    latent_dim: PositiveInt = 128  # of ae and joint; the other two take the encoder's features
    augment: augmentation.Kind = "contrastive"  # random views; SimCLR needs strong ones
    views: Views = 2  # of supcon: random views of each image; simclr always has 2
    head: models.HeadName = "mlp"  # of supcon: from features to embeddings; simclr always has mlp
    flip: bool | None = None  # also mirror them; None: if its labels allow it, never a folder
    batch_size: BatchSize = 256  # images per step; all of them where they are fewer
    optimizer: OptimizerName = "muon"  # its rate does not depend on the size of the loss
    learning_rate: PositiveFloat = 0.2  # peak rate
    # Run
    jobs: PositiveInt = 1  # runs at a time, each in a process of its own
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # auto: bf16 where it is fast
    out: Place = "study"  # the folder of all runs and results; an existing study is continued
    project: str | None = None  # of W&B; None: what W&B is set to, else latent-spaces
    tags: str = ""  # of W&B, separated by commas
    tracking: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: W&B, if logged in


def main(config: Config) -> dict:
    runtime.check_alone("study.py")
    check(config)
    unique = {k: tuple(dict.fromkeys(getattr(config, k))) for k in ("methods", "labels_per_class")}
    out = Path(config.out)
    others = out.is_dir() and any(entry.name != LOCK for entry in out.iterdir())
    if others and not (out / "study.json").exists():
        raise UserError(f"{out} exists and holds no study; choose another --out")
    with made(out), lock(out / LOCK, busy=f"{out} is in use by another study; wait for its end"):
        return conduct(replace(config, **unique), out)


def conduct(config: Config, out: Path) -> dict:
    """The whole study, in the folder `out`, which no other process uses."""
    # ---------------------------------------------------------------- Plan
    budgets = sorted(config.labels_per_class, key=studies.number_of)
    members = [
        Member(f"{method}-{labels}-seed{seed}", method, labels, seed)
        for seed in range(config.seeds)
        for labels in budgets
        for method in config.methods
    ]
    planned = plan(config, out, members)
    places = ["--data_dir", config.data_dir]
    if config.labels:
        places += ["--labels", config.labels]
    flags = {name: [*words, *places] for name, words in planned.items()}

    # ---------------------------------------------------------------- Runs
    failed = {}
    trained_by = trainers(members)
    words = {name: [*of_run, "--tracking", config.tracking] for name, of_run in flags.items()}
    calls = {m: (str(out), m, words[m.name], trained_by.get(m)) for m in members}
    with console.progress(len(members), "runs", is_main=True) as bar:
        for follows in (False, True):  # those that take another's encoder come after it
            now = {m.name: call for m, call in calls.items() if (m in trained_by) == follows}
            for name, error in called(train, now, config.jobs, out / "logs"):
                if error:  # whatever it is, the others can be compared
                    failed[name] = error
                    console.say(f"{name} failed: {error}")
                elif config.jobs > 1:
                    console.say(f"{name} is finished; its output is in {out}/logs/{name}.log")
                bar.update()
    results = []
    for member in members:
        if member.name not in failed:
            try:
                results.append(studies.read(runs.read_run(out / "runs" / member.name), member))
            except UserError as error:
                failed[member.name] = str(error)
                console.say(f"{member.name} is left out: {error}")
    if not results:
        raise UserError(f"no run of {out} succeeded: {'; '.join(failed.values())}")
    groups = {labels: [r for r in results if r.member.labels == labels] for labels in budgets}
    groups = {labels: group for labels, group in groups.items() if group}
    *_, largest = groups.values()
    baselines = baselines_of(config, groups, flags)

    # ---------------------------------------------------------------- Comparison
    robust_baselines: dict[str, np.ndarray] = {}

    def recommend(robust: dict[str, np.ndarray]) -> list[str]:
        for result in largest:
            if (folder := str(result.run.folder)) in robust:  # else it could not be compared
                result.values["robust"] = robust[folder]
        names = {"PCA": f"PCA-{config.latent_dim}", "pixels": "pixels"}
        robust_baselines.update({k: robust[v] for k, v in names.items() if v in robust})
        same_time = config.minutes is not None
        return studies.recommendation_of(groups, baselines, robust_baselines, failed, same_time)

    compared = emptied(out / "comparison", "comparison.json")
    wandb = {"project": config.project, "tags": config.tags, "tracking": config.tracking}
    folders = tuple(str(result.run.folder) for result in largest)
    # the study itself shows what few labels do; here all encoders have seen the most labels
    comparison = compare.Config(
        folders, str(compared), config.data_dir, config.labels, label_draws=1, **wandb
    )
    lines = compare.main(comparison, recommend)["recommendation"]

    # ---------------------------------------------------------------- Files
    folder = emptied(out / "report", "results.json")
    rows = studies.table(groups, baselines, robust_baselines)
    figures = {
        "accuracy_by_labels": accuracies.by_labels(
            studies.curves(groups), list(groups), studies.baseline_curves(baselines)
        ),
        "accuracy_by_seconds": accuracies.by_seconds(studies.progress(largest)),
    }
    with made(folder):
        write_json(folder / "results.json", {"recommendation": lines, "failed": failed})
    advice = "".join(f"- {line}\n" for line in lines)
    markdown = f"# Recommendation\n\n{advice}\n# Measurements\n\n{tables.as_markdown(rows)}"
    write_text(folder / "study.md", markdown)

    # ---------------------------------------------------------------- W&B
    title = f"study {runs.data_name(asdict(config))}: {', '.join(config.methods)}"
    labels = {"name": title[: runs.LONGEST_NAME], "job_type": METHOD}
    labels |= {"group": group_of(config), "tags": [METHOD, *runs.own_tags(config.tags)]}
    with tracking.open_tracker(
        folder,
        settings={k: v if v is None else str(v) for k, v in asdict(config).items()},
        facts=runtime.facts(runtime.start("no", seed=0)),
        labels=labels,
        mode=config.tracking,
        project=config.project,
        keep_rows=None,
        is_main=True,
    ) as tracker:
        (folder / "checkpoints").rmdir()  # there is nothing to resume
        tracker.table("tables/recommendation", ["recommendation"], [[line] for line in lines], 0)
        header, *others = [[row.text, *row.cells] for row in rows if row.cells]
        tracker.table("tables/study", header, others, step=0)
        for name, figure in figures.items():
            tracker.figure(name, plots.saved(figure), name.replace("_", " "), step=0)
        found = studies.by_method(largest, "linear")
        end = tracker.finish({f"{m}/linear_accuracy": np.mean(v) for m, v in found.items()})
    end += [f"page:         {compared}/index.html", f"study:        {folder}/study.md"]
    said = [f"- {line}" for line in lines]
    for line in ("", tables.as_text(rows), "", "recommendation", *said, "", *end):
        console.say(line)
    return {"recommendation": lines, "failed": failed}


def check(config: Config) -> None:
    """`UserError` for settings that make no study."""
    if (config.minutes is None) == (config.epochs is None):
        raise UserError("say how long to train: --minutes (all runs together) or --epochs (each)")
    if not config.methods or not config.labels_per_class:
        raise UserError("--methods and --labels_per_class need at least one value each")
    for text in config.labels_per_class:
        if text != "all" and not re.fullmatch("[1-9][0-9]*", text):
            raise UserError(f"--labels_per_class {text}: give numbers above 0, or all")


def group_of(config: Config) -> str:
    """The name under which W&B files all runs of the study."""
    return (
        os.environ.get("WANDB_RUN_GROUP")
        or f"study {runs.folder_name(Path(config.out))}"[: runs.LONGEST_NAME]
    )


# --------------------------------------------------------------------------- Planning and training


def plan(config: Config, out: Path, members: Sequence[Member]) -> dict[str, list[str]]:
    """The flags of each member's script, by its name: those of OUT/study.json, or new ones.

    `UserError`: the study in OUT is another one; the time is too short for one epoch.
    """
    path = out / "study.json"
    if path.exists():
        return continued(config, path)
    arrays = read_images(config)
    counts = learned_images(arrays, config.limit_train, members)
    batches = {name: min(config.batch_size, count) for name, count in counts.items()}
    flags = {m.name: shared(config, m, batches[m.name]) for m in members}
    if config.minutes is None:
        epochs = dict.fromkeys(flags, config.epochs)
    else:
        kinds = {m.name: (m.method, batches[m.name]) for m in members}
        speed = speeds(config, list(dict.fromkeys(kinds.values())), max(counts.values()))
        trainings = len(members) - len(trainers(members))
        rounds = math.ceil(trainings / config.jobs)
        share = 60 * config.minutes / rounds  # seconds of training of each run
        # seconds an epoch, whose last, shorter batch is left out
        takes = {k: counts[k] // batch * batch / speed[m, batch] for k, (m, batch) in kinds.items()}
        slowest = max(takes, key=takes.get)
        if takes[slowest] > share:
            needed = math.ceil(10 * takes[slowest] * rounds / 60) / 10
            raise UserError(
                f"--minutes {config.minutes:g} are too few: each of {trainings} may train "
                f"for {share:.1f} s, and one epoch of {slowest} takes {takes[slowest]:.1f} s; take "
                f"at least {needed:.1f}, or fewer --methods, --seeds or --labels_per_class"
            )
        epochs = {name: round(share / seconds) for name, seconds in takes.items()}
    for name, words in flags.items():
        every = max(1, epochs[name] // 10)
        words += ["--epochs", str(epochs[name]), "--evaluate_every", str(every)]
    script = {m.name: SCRIPTS[m.method].__name__ for m in members}
    commands = {name: f"python {script[name]}.py {shlex.join(w)}" for name, w in flags.items()}
    out.mkdir(parents=True, exist_ok=True)
    about = {"settings": settings_of(config), "fingerprint": arrays.fingerprint}
    write_json(path, {**about, "jobs": config.jobs, "commands": commands})
    return flags


def continued(config: Config, path: Path) -> dict[str, list[str]]:
    """The flags in a study.json. `UserError`: it is a study with other settings or images."""
    stored, settings = read_json(path), settings_of(config)
    odd = [name for name in settings if stored["settings"].get(name) != settings[name]]
    if config.labels and stored["settings"].get("labels"):
        odd = [name for name in odd if name != "labels"]  # the file moves with the images
    if odd:
        had = ", ".join(f"--{name} {stored['settings'].get(name)}" for name in odd)
        raise UserError(f"{path.parent} holds a study with {had}; take these, or another --out")
    fingerprint = read_images(config).fingerprint
    if stored.get("fingerprint", fingerprint) != fingerprint:
        raise UserError(
            f"images or labels in {config.data_dir} are not those that the study in {path.parent} "
            "began with; restore them, or choose another --out"
        )
    return {name: shlex.split(command)[2:] for name, command in stored["commands"].items()}


def settings_of(config: Config) -> dict[str, Any]:
    """What may not change when a study is continued, as JSON gives it back."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}


def read_images(config: Config) -> Any:
    """The images of the study as `datasets.read` returns them, not yet split."""
    place = config.dataset, config.data_dir, config.image_size
    more = {"white": config.white, "labels": config.labels}
    return datasets.read(*place, config.skip_unreadable, **more)


def learned_images(
    arrays: Any, limit_train: int | None, members: Sequence[Member]
) -> dict[str, int]:
    """How many training images each member learns from, by its name.

    `UserError` where a class has fewer images than labels are asked for.
    """
    asked = [int(member.labels) for member in members if member.labels != "all"]
    # the smaller numbers are inside the largest
    pretrain = datasets.split_data(arrays, limit_train, max(asked, default=None)).pretrain
    labeled, classes = int((pretrain.labels >= 0).sum()), len(arrays.class_names)
    counts = {}
    for member in members:
        few = labeled if member.labels == "all" else classes * int(member.labels)
        counts[member.name] = len(pretrain) if member.method in ("ae", "simclr") else few
    return counts


def shared(config: Config, member: Member, batch_size: int) -> list[str]:
    """The flags that are the same for all methods, and the few that cannot be."""
    flags: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "dataset",
            "data_dir",
            "image_size",
            "limit_train",
            "skip_unreadable",
            "white",
            "labels",
        )
    }
    if member.labels != "all":
        flags["labels_per_class"] = member.labels
    flags |= {
        name: getattr(config, name) for name in ("encoder", "width", "augment", "flip", "optimizer")
    }
    flags |= {"learning_rate": config.learning_rate, "schedule": "linear", "warmup_epochs": 0}
    flags |= {"batch_size": batch_size, "seed": member.seed}
    if member.method in ("ae", "joint"):
        flags["latent_dim"] = config.latent_dim
    if member.method == "supcon":
        flags |= {"views": config.views, "head": config.head}
    if member.method == "simclr":
        flags["supervised"] = False
    flags |= {"precision": config.precision, "tracking": config.tracking}
    flags |= {"project": config.project, "group": group_of(config), "tags": config.tags}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def speeds(
    config: Config, kinds: Sequence[tuple[str, int]], available: int
) -> dict[tuple[str, int], float]:
    """Images per second of training, by method and batch size, in the second of two short epochs.

    With as many runs beside each other as there will be. `available` is the number of training
    images.
    """
    found = {}
    steps = TRIAL_STEPS_OF_A_GPU if runtime.uses_cuda() else TRIAL_STEPS
    with tempfile.TemporaryDirectory() as folder:
        for method, batch in kinds:
            console.say(f"measuring how fast {method} trains, {batch} images a step")
            names = [f"{method}-{batch}-{k}" for k in range(config.jobs)]
            members = [Member(name, method, "all", seed=0) for name in names]
            words = shared(config, members[0], batch)
            words += ["--limit_train", str(min(steps * batch, available)), "--epochs", "2"]
            words += ["--knn_images", "10", "--tsne_images", "10", "--tracking", "disabled"]
            words += ["--test", "False"]
            calls = {member.name: (folder, member, words, None) for member in members}
            logs, spoken = Path(folder) / method, io.StringIO()
            with (  # what is said of so few images misleads
                contextlib.redirect_stdout(spoken),
                contextlib.redirect_stderr(spoken),
                layout.said_once(),
            ):
                errors = [e for _, e in called(train, calls, config.jobs, logs) if e]
            if errors:
                written = [log.read_text(encoding="utf-8") for log in logs.glob("*.log")]
                console.say("".join([spoken.getvalue(), *written]))
                raise UserError(f"{method} does not train: {errors[0]}")
            key = "time/images_per_second"
            rows = [read_rows(Path(folder) / "runs" / name / "metrics.jsonl") for name in names]
            last = [[row[key] for row in each if key in row][-1] for each in rows]
            found[method, batch] = np.mean(last)
    return found


def called(
    function: Callable, calls: Mapping[str, tuple], at_a_time: int, logs: Path
) -> Iterator[tuple[str, str | None]]:
    """`jobs.run`; one call at a time happens in this process, where its output is seen."""
    if at_a_time > 1:
        try:
            yield from jobs.run(function, calls, at_a_time, logs)
        except KeyboardInterrupt:
            console.say("stopped; the same command again continues it")
            raise SystemExit(130) from None
        return
    for name, arguments in calls.items():
        try:
            function(*arguments)
            yield name, None
        except SystemExit:
            console.say("the same command again continues the study")
            raise
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            yield name, str(error) or type(error).__name__


def trainers(members: Sequence[Member]) -> dict[Member, Member]:
    """Of each member whose encoder another one trains: that one, which has the most labels."""
    last = {(m.method, m.seed): m for m in members}  # they are ordered by labels
    found = {m: last[m.method, m.seed] for m in members if m.method in WITHOUT_LABELS}
    return {m: trainer for m, trainer in found.items() if m != trainer}


def train(out: str, member: Member, words: Sequence[str], trained_by: Member | None) -> None:
    """Start a run, resume it, or do nothing where it is finished.

    It takes over the encoder of the run of `trained_by`, if that succeeded.
    """
    script, folder = SCRIPTS[member.method], Path(out) / "runs" / member.name
    if trained_by and (source := folder.with_name(trained_by.name) / "summary.json").exists():
        config = read_json(source.with_name("config.json"))
        few = int(member.labels)  # trainers have the most, so it is a number
        count = few * len(config["facts"]["class_names"])
        facts = {"train_images": count, "trained_by": trained_by.name}
        facts["wandb_id"] = wandb_backend.new_id()
        checkpoints.branch(source.parent, folder, {"labels_per_class": few}, facts)
    script.main(parse(script.Config, [*words, "--resume", str(folder)]))


def baselines_of(
    config: Config, groups: dict[str, list[studies.Result]], flags: dict[str, list[str]]
) -> dict[str, dict[str, list[np.ndarray]]]:
    """`studies.baselines_of` the images that the runs of each group have learned from, by seed."""
    member = next(iter(groups.values()))[0].member
    settings = parse(SCRIPTS[member.method].Config, flags[member.name])
    images = datasets.load(replace(settings, labels_per_class=None), show_progress=False)
    pca, _ = report.fit_pca(images.pretrain, config.latent_dim)  # whatever the labels
    found: dict[str, dict[str, list[np.ndarray]]] = {labels: {} for labels in groups}
    for labels, group in groups.items():
        seeds = list(dict.fromkeys(result.member.seed for result in group))
        if labels == "all":  # the same images for every seed
            right = [studies.baselines_of(images, pca)] * len(seeds)
        else:
            drawn = [images.train.few(int(labels), seed) for seed in seeds]
            right = [studies.baselines_of(replace(images, train=train), pca) for train in drawn]
        for name in right[0]:
            found[labels][name] = [of_seed[name] for of_seed in right]
    return found


def emptied(folder: Path, proof: str) -> Path:
    """A folder of results that a former call has made goes; `proof` is a file that only it has."""
    if (folder / proof).is_file():
        shutil.rmtree(folder)
    return folder


if __name__ == "__main__":
    with layout.said_once():
        main(parse(Config))
