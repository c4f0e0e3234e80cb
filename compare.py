"""Compare the latent spaces of finished runs: the same metrics on the same test images.

Only probes are trained. Each run's encoder is loaded and encodes all images; classification,
geometry, label efficiency, robustness to noise and shift, and cost are reported beside the same
metrics of the raw pixels and of PCA of the same size. Runs that differ in their seed only become
one column: mean ± standard deviation.

What to expect on a CPU: digits in about a minute; with 10,000 test images, and probes that learn
from 5,000, each space takes 20 to 25 s of one core, about half of them for t-SNE. Wide ResNets need
a GPU. OUT holds the table (table.md, table.csv), all numbers (comparison.json), sheet.png with its
parts in figures/, and index.html, which opens from disk: images selected in one map are lit in all
of them, and a click on one shows its nearest neighbors in every space.

    python compare.py runs/ae-mnist runs/joint-mnist runs/supcon-mnist --out comparison
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
from zipfile import BadZipFile

import common  # isort: skip  # noqa: F401  (before torch, which reads how threads wait)

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from tyro.conf import Positional, arg

from common import console, models
from common.config import Draws, Place, Points, PositiveInt, parse
from common.data import corruptions, datasets
from common.display import page, plots, sheet, tables
from common.errors import UserError
from common.evaluation import comparison, pictures, report, samples
from common.files import lock, made, write, write_json, write_text
from common.run import runs, runtime, tracking

METHOD = "compare"
LOCK = ".comparing"  # not .lock, which the tracker holds
CONFUSIONS = 5  # the most frequent ones are shown
LARGEST_PCA_SPACE = 512  # dimensions; probes on more take minutes
TOLERANCE = 0.005  # of accuracy, between the run's own and ours: rounding differs between machines


@dataclass(frozen=True)
class Config:
    # Data
    runs: Annotated[Positional[tuple[Place, ...]], arg(metavar="RUN")] = ()  # finished runs
    out: Place = "comparison"  # a new folder for the results
    data_dir: Place | None = None  # where the images lie; None: where the first run found them
    labels: str | None = None  # folder: their CSV file; None: where the first run found it
    # Evaluation
    map_images: Points = 2000  # test images in the maps
    robust_images: PositiveInt = 5000  # test images for noise and shift
    label_draws: Draws = 3  # how often the few labels are drawn
    # Run
    project: str | None = None  # of W&B; None: what W&B is set to, else latent-spaces
    tags: str = ""  # of W&B, separated by commas
    tracking: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: W&B, if logged in


def main(config: Config, recommend: Callable[[dict], list[str]] = lambda robust: []) -> dict:
    """Compare runs and return what was found.

    A study passes `recommend`, which gets the share of corruptions that the linear probe stands on
    each image (M,), by the folder of a run or by "PCA-128" and so on, and returns the lines for the
    top of the page; they join what is found.
    """
    runtime.check_alone("compare.py")
    if not config.runs:
        raise UserError("name the folders of finished runs: python compare.py RUN RUN --out OUT")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(entry.name != LOCK for entry in out.iterdir())):
        raise UserError(f"{out} exists; choose another --out, or remove it")
    runs.check_writable(out)
    with (
        made(out),
        lock(out / LOCK, busy=f"another comparison writes to {out}; choose another --out"),
    ):
        return compare(config, recommend, out)


def compare(config: Config, recommend: Callable[[dict], list[str]], out: Path) -> dict:
    """As `main`, with results in the folder `out`, which no other process uses."""
    # ---------------------------------------------------------------- Set-up
    started = time.perf_counter()
    accelerator = runtime.start("no", seed=0)
    device = runtime.measuring_device(accelerator.device)
    runs.check_project(config.project)
    chosen, left_out = runs.choose_runs(config.runs)

    # ---------------------------------------------------------------- Data
    refuse_if_none(chosen, left_out)
    settings, fingerprint = chosen[0].settings, chosen[0].facts["fingerprint"]
    place, size = Path(config.data_dir or settings["data_dir"]), settings["image_size"]
    data_name = runs.data_name({**settings, "data_dir": place})
    more = {"white": settings.get("white"), "labels": config.labels or settings.get("labels")}
    skip = settings["skip_unreadable"]
    arrays = datasets.read(settings["dataset"], place, size, skip, **more)
    if arrays.fingerprint != fingerprint:
        raise UserError(
            f"the images in {place} are not those of {', '.join(str(r.folder) for r in chosen)} "
            f"(fingerprint {arrays.fingerprint[:8]}, not {fingerprint[:8]}); "
            "name others by --data_dir"
        )
    full, networks = datasets.split_data(arrays, None), {}
    for run in chosen:
        try:
            check_split(run, full)
            networks[run.folder] = load_networks(run.folder, device)
        except UserError as error:
            left_out[str(run.folder)] = str(error)
    chosen = [run for run in chosen if run.folder in networks]
    refuse_if_none(chosen, left_out)
    warnings = [f"left out: {reason}" for reason in left_out.values()]
    for warning in warnings:
        console.say(warning)
    # probes learn from images that all runs have trained on
    limit, few = smallest(chosen, "limit_train"), smallest(chosen, "labels_per_class")
    images = (datasets.split_data(arrays, limit) if limit else full).to(device)
    learned = {run.folder: images for run in chosen}
    if few:
        learned = labeled_images(chosen, full.train, images, few)
    images = learned[chosen[0].folder]  # for PCA and pixels
    named, names, labels = runs.by_name(chosen), images.class_names, images.test.labels
    mapped, subset = images.test.sample(config.map_images), images.test.sample(config.robust_images)
    corrupted = corruptions.all_corrupted(subset)
    map_indices = pictures.positions(mapped, images.test)
    facts = [
        f"{data_name}, {len(images.test):,} test images that no run has seen, the same for all",
        f"probes learn from {len(images.train):,} training images"
        + (", those that have a label in a run of that seed; " if few else "; ")
        + f"{len(images.validation):,} validation images select their L2 penalty",
        f"t-SNE of {len(mapped):,} test images, noise and shift on {len(subset):,}",
    ]
    if len(asked := samples.stratified(labels)) < len(labels):
        facts.append(
            f"neighbors, silhouette and uniformity of a stratified sample of {len(asked):,} of the "
            "test images; their standard errors are in comparison.json"
        )
    for run in (run for run in chosen if run.resumed):
        commits = ", ".join(str(entry.get("commit")) for entry in run.resumed)
        facts.append(f"{run.folder} was stopped and resumed (at commit {commits})")

    # ---------------------------------------------------------------- The spaces of the runs
    spaces: dict[str, list[comparison.Space]] = {}
    tables_of: dict[str, list[str]] = {}  # by space: the names of its tables in W&B
    robust: dict[str, np.ndarray] = {}  # by folder, or baseline: what `recommend` gets
    for name, run in ((name, run) for name, group in named.items() for run in group):
        console.say(f"measuring {run.folder}")
        encoder, classifier, head = networks[run.folder]
        begun = time.perf_counter()
        latents = report.encode_splits(encoder, nn.Identity(), learned[run.folder], with_test=True)
        seconds = time.perf_counter() - begun
        space, probe = comparison.measure(
            name, latents, classifier, map_indices, config.label_draws
        )
        errors = {key: run.summary.get(f"test/{key}") for key in ("mse", "mae")}
        space.metrics.update({key: value for key, value in errors.items() if value is not None})
        (accuracies, _), (_, right) = comparison.robustness(encoder, [classifier, probe], corrupted)
        robust[str(run.folder)] = right
        space.metrics.update(accuracies, **run.cost())
        encoded = len(images.train) + len(images.validation) + len(images.test)
        space.metrics["encoded_per_second"] = encoded / seconds
        spaces.setdefault(name, []).append(space)
        tables_of.setdefault(name, []).append(runs.folder_name(run.folder))
        reported, ours = run.summary["test/accuracy"], space.metrics["accuracy"]
        if abs(reported - ours) > TOLERANCE:
            warnings.append(
                f"{run.folder} reported {reported:.2%}, but its files reach {ours:.2%} here"
            )
            console.say(f"warning: {warnings[-1]}")
        if head is not None:  # supcon's projections are a second space
            latents, title = latents.projected(head), f"{name} projection"
            space, probe = comparison.measure(title, latents, None, map_indices, config.label_draws)
            projection = comparison.Projection(encoder, head)
            ((accuracies, _),) = comparison.robustness(projection, [probe], corrupted)
            space.metrics.update(accuracies)
            spaces.setdefault(title, []).append(space)
            tables_of.setdefault(title, []).append(f"{runs.folder_name(run.folder)}_projection")

    # ---------------------------------------------------------------- Baselines
    own, encoders = list(spaces), {}
    for size in sorted({group[0].map_latents.shape[1] for group in spaces.values()}):
        pca, why_not = fit_pca(images.pretrain, size)
        if pca is None:
            facts.append(f"PCA-{size} is left out: {why_not}")
        else:
            encoders[f"PCA-{size}"] = comparison.PCAEncoder(pca)
    if why_not := report.pixels_too_large(images):
        facts.append(f"the pixels are left out: {why_not}")
    else:
        encoders["pixels"] = comparison.Pixels()
    for name, encoder in encoders.items():
        console.say(f"measuring {name}")
        latents = report.encode_splits(encoder, nn.Identity(), images, with_test=True)
        space, probe = comparison.measure(name, latents, None, map_indices, config.label_draws)
        ((accuracies, robust[name]),) = comparison.robustness(encoder, [probe], corrupted)
        space.metrics.update(accuracies)
        if name != "pixels":
            space.metrics.update(report.pca_errors(encoder.pca, images.test))
        spaces[name] = [space]

    # ---------------------------------------------------------------- Numbers
    columns = {name: [space.metrics for space in group] for name, group in spaces.items()}
    rows = tables.side_by_side(columns)
    class_accuracies, confusions = {}, {}
    for name, group in spaces.items():
        class_accuracies[name] = comparison.class_accuracies(group, labels, len(names))
        confusions[name] = comparison.confusions(group, labels, len(names), CONFUSIONS)
    results = {"dataset": settings["dataset"], "fingerprint": fingerprint, "class_names": names}
    results |= {"notes": facts, "warnings": warnings, "runs": {}, "spaces": {}}
    for name, group in named.items():
        results["runs"][name] = [
            {
                **{"folder": str(run.folder), "settings": run.settings},
                **{"facts": run.facts, "resumed": run.resumed},
            }
            for run in group
        ]
    for name, metrics in columns.items():
        mean, std = tables.means_and_stds(metrics)
        results["spaces"][name] = {
            **{"n": len(metrics), "mean": mean, "std": std, "runs": metrics},
            "class_accuracy": class_accuracies[name].tolist(),
            "confusions": [[names[true], names[guess], x] for true, guess, x in confusions[name]],
        }

    # ---------------------------------------------------------------- Pictures
    shown, maps = mapped.labels.cpu().numpy(), []
    for name in [name for name in ("pixels", *own) if name in spaces]:
        first, count = spaces[name][0], len(spaces[name])
        knn, silhouette, trust = (
            first.metrics[key] for key in ("knn_accuracy", "silhouette", "trustworthiness")
        )
        note = f"kNN {knn:.1%}   silhouette {silhouette:.2f}   trust {trust:.2f}"
        title = name if count == 1 else f"{name} (the first of {count} seeds)"
        nearest = comparison.nearest(first.map_latents, comparison.MAP_NEIGHBORS).cpu().numpy()
        predictions = first.predictions[map_indices].cpu().numpy()
        confidences = first.confidences[map_indices].cpu().numpy()
        maps.append(page.Map(title, note, first.points, nearest, predictions, confidences))
    kinds = {"labels": ("linear, from few labels", "labels per class")}
    kinds |= {kind: (f"with {kind}", unit) for kind, (unit, _) in corruptions.CORRUPTIONS.items()}
    lines = {
        head: {name: comparison.accuracy_curve(group, kind) for name, group in spaces.items()}
        for kind, head in kinds.items()
    }
    panels = [plots.Embedding(m.points, m.title, m.note) for m in maps]
    figures = {
        "maps": (plots.embeddings(panels, shown, names), "t-SNE of the same images in each space"),
        "classes": (sheet.classes(class_accuracies, names), "Accuracy of each class in each space"),
        "mistakes": (sheet.mistakes(confusions, names), "Most frequent confusions"),
        "lines": (sheet.lines(lines, list(encoders)), "Accuracy: few labels, corrupted images"),
    }
    figures["sheet"] = sheet.stack([figure for figure, _ in figures.values()]), "All figures"
    pngs = {name: plots.saved(figure) for name, (figure, _) in figures.items()}

    # ---------------------------------------------------------------- Files
    if recommended := recommend(robust):
        results["recommendation"] = recommended
    write_json(out / "comparison.json", results)
    write_text(out / "table.md", tables.as_markdown(rows))
    write_text(out / "table.csv", tables.as_csv(columns))
    write(out / "sheet.png", pngs["sheet"])
    text = page.build(
        f"{len(own)} latent spaces of {data_name}",
        facts,
        warnings,
        rows,
        pngs["sheet"],
        maps,
        mapped.thumbnails(torch.arange(len(mapped)), page.THUMB),
        map_indices.cpu().numpy(),
        shown,
        names,
        sheet.class_colors(len(names)),
        recommendation=recommended,
    )
    write_text(out / "index.html", text)

    # ---------------------------------------------------------------- W&B
    tags = [METHOD, *runs.own_tags(data_name), *runs.own_tags(config.tags)]
    title = f"compare {data_name}: {', '.join(own)}"[: runs.LONGEST_NAME]
    with tracking.open_tracker(
        out,
        settings=asdict(config),
        facts={**runtime.facts(accelerator), "fingerprint": fingerprint, "warnings": warnings},
        labels={"name": title, "group": data_name, "job_type": METHOD, "tags": tags},
        mode=config.tracking,
        project=config.project,
        keep_rows=None,
        is_main=True,
    ) as tracker:
        (out / "checkpoints").rmdir()  # there is nothing to resume
        header, *others = [[row.text, *row.cells] for row in rows if row.cells]
        tracker.table("tables/comparison", header, others, step=0)
        used: Counter[str] = Counter()  # folders in different places may have one name
        for name in own:
            for table, space in zip(tables_of[name], spaces[name], strict=True):
                used[table] += 1
                again = "" if used[table] == 1 else f"-{used[table]}"
                key = f"tables/embeddings/{table}{again}".replace(" ", "_")
                guesses = space.predictions[map_indices]
                _, head, cells = tables.embeddings(mapped, space.map_latents, guesses, names)
                tracker.table(key, head, cells, step=0)
        for name, (_, caption) in figures.items():
            tracker.figure(name, pngs[name], caption, step=0)
        summary = {
            f"{name}/{key}": x
            for name, f in results["spaces"].items()
            for key, x in f["mean"].items()
        }
        end = tracker.finish(summary)
    end += [f"took:         {time.perf_counter() - started:.0f} s"]
    end += [f"page:         {out}/index.html"]
    for line in ("", tables.as_text(rows), "", *facts, *warnings, "", *end):
        console.say(line)
    return results


def labeled_images(
    chosen: Sequence[runs.Run], full: datasets.Split, images: datasets.ImageData, few: int
) -> dict[Path, datasets.ImageData]:
    """`images` by run folder, with training images of which the run has had the labels.

    They are `few` of each class, or as many as every run has of it, drawn by the run's seed from
    the images that its --limit_train left: the first ones of `full`, all training images.
    """
    source, trains = images.train, {}
    for run in chosen:
        first = slice(run.settings.get("limit_train"))
        rows = full.rows[first].to(source.rows.device)
        labels = full.labels[first].to(source.labels.device)
        trains[run.folder] = replace(source, rows=rows, labels=labels)
    counts = [torch.bincount(train.labels) for train in trains.values()]
    few = min(few, *(int(count[count > 0].min()) for count in counts))
    return {
        run.folder: replace(images, train=trains[run.folder].few(few, run.settings["seed"]))
        for run in chosen
    }


def smallest(chosen: list[runs.Run], name: str) -> int | None:
    """The smallest number that a run has for this setting; None if it limits none of them."""
    return min((number for run in chosen if (number := run.settings.get(name))), default=None)


def fit_pca(split, dimensions: int) -> tuple:
    """`report.fit_pca`, or why it is left out."""
    if dimensions > LARGEST_PCA_SPACE:
        return None, f"measuring more than {LARGEST_PCA_SPACE} dimensions takes minutes"
    return report.fit_pca(split, dimensions)


def refuse_if_none(chosen: list[runs.Run], left_out: dict[str, str]) -> None:
    """`UserError` with all reasons if every run was left out."""
    if not chosen:
        raise UserError(f"no run is left to compare: {'; '.join(left_out.values())}")


def check_split(run: runs.Run, full: datasets.ImageData) -> None:
    """`UserError` if a run was trained or tested on other images than this version's split."""
    count = min(run.settings.get("limit_train") or len(full.train), len(full.train))
    if few := run.settings.get("labels_per_class"):
        count = few * len(full.class_names)
    if run.facts["train_images"] != count:
        difference = f"trained on {run.facts['train_images']:,} images where we have {count:,}"
        raise UserError(f"{run.folder} has another split: it {difference}")
    try:
        labels = np.load(run.folder / "latents.npz")["labels"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(f"{run.folder} is damaged: latents.npz ({error})") from None
    if not np.array_equal(labels, full.test.labels.numpy()):
        raise UserError(f"{run.folder} has another split: it was scored on other test images")


def load_networks(folder: Path, device: torch.device) -> tuple:
    """Encoder, classifier and projection head (or None) of a run, in eval mode."""
    encoder, classifier, head = models.load_encoder(folder), models.load_classifier(folder), None
    if (folder / "head.safetensors").exists():
        try:
            if state := load_file(folder / "head.safetensors"):
                name, last = ("linear", "weight") if "weight" in state else ("mlp", "2.weight")
                head = models.projection_head(name, *state[last].T.shape)
                head.load_state_dict(state)
        except models.LOAD_ERRORS as error:
            raise UserError(f"the head in {folder} cannot be loaded ({error})") from None
    return tuple(network and network.to(device).eval() for network in (encoder, classifier, head))


if __name__ == "__main__":
    main(parse(Config))
