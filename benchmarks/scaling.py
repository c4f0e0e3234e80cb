"""How cost grows: of a step with batch, latent size and processes, of evaluation with the images.

Seconds of a step are fitted by a power of the size. Processes share one machine's cores and one
global batch. Each part of the evaluation after a training is measured once, on latents of two sizes
that do not fit the cache, a sixth of them test images; its share is that of 20 epochs at the speed
of train_joint.py on digits, the cheapest training, and beyond the measured sizes it is
extrapolated. The last claim trains from a folder's memory map, whose pages are thrown out of
memory again and again, as when the images are more than it holds, beside the same images in memory.

    python benchmarks/scaling.py --out runs/bench/scaling.json --plot docs/images/scaling.png
"""

import dataclasses
import functools
import math
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np

BATCHES = (32, 64, 128, 256, 512, 1024)
LATENTS = (16, 64, 256, 1024, 4096)
COUNTS = (512, 1024, 2048, 4096, 8192)  # embeddings in the loss
PROCESSES = (1, 2, 4)
EVALUATED = (10_000, 100_000, 200_000)  # training images; the last two give the exponents
EXTRAPOLATED = 1_000_000
EPOCHS = 20  # of the training that evaluation is a share of
CLASSES, DIMENSIONS = 10, 128
IMAGES = 6000  # in the folder
STEPS_BETWEEN = 20  # after so many steps the map's pages are thrown out


def main() -> None:
    from loss import ours as loss_step

    made = measure.parser(__doc__)
    made.add_argument("--plot", type=Path, help="where to draw it, a PNG")
    arguments = made.parse_args()
    place = measure.surroundings()
    rounds = min(arguments.rounds, 3)
    times, rows, lines = {}, [], {}
    for what, sizes, contend in (
        ("batch", BATCHES, functools.partial(joint_step, "batch_size")),
        ("latent_dim", LATENTS, functools.partial(joint_step, "latent_dim")),
        ("embeddings in the loss", COUNTS, loss_step),
    ):
        found = {
            size: measure.alternate({"ours": functools.partial(contend, size)}, rounds)["ours"]
            for size in sizes
        }
        times |= {f"{what} {size}": taken for size, taken in found.items()}
        lines[what] = [(size, taken.median) for size, taken in found.items()]
        rows.append(
            measure.claim(
                f"a step's time as a power of {what}, {sizes[0]:,} to {sizes[-1]:,}",
                exponent(lines[what]),
                "",
                ", ".join(f"{1000 * seconds:.3g}" for _, seconds in lines[what]) + " ms",
            )
        )
    speeds = {number: images_per_second(number) for number in PROCESSES}
    lines["processes"] = [(number, 1 / speed) for number, speed in speeds.items()]
    for number in PROCESSES[1:]:
        rows.append(
            measure.claim(
                f"{number} processes on {measure.CORES} cores, speed against one",
                speeds[number] / speeds[1],
                "",
                f"{speeds[number]:,.0f} images/s",
                f"{speeds[1]:,.0f} images/s",
                names=(f"{number} processes", "1"),
            )
        )
    rows += evaluation(speeds[1], times, place["threads"])
    with tempfile.TemporaryDirectory() as folder:
        place_of_images = make_folder(Path(folder))
        found = measure.alternate(
            {
                "memory map": functools.partial(train_from, place_of_images, False),
                "in memory": functools.partial(train_from, place_of_images, True),
            },
            arguments.rounds,
            units=STEPS_BETWEEN,
        )
    times |= found
    rows.append(
        measure.row(
            "training from a folder's memory map, pages thrown out",
            *(found["memory map"], found["in memory"], "≥ 0.8"),
            images=128,
            names=("memory map", "in memory"),
        )
    )
    if arguments.plot:
        draw(lines, arguments.plot, place)
    measure.report("scaling", place, rows, times, arguments.out)


def evaluation(speed: float, times: dict, threads: int) -> list[dict]:
    """A row for each part of the evaluation, and its share of the training at several sizes.

    `speed` is that of training, in images per second; `times` receives what was measured.
    """
    found = {count: evaluated(count) for count in EVALUATED}
    rows, totals = [], {count: sum(seconds.values()) for count, seconds in found.items()}
    totals[EXTRAPOLATED] = 0.0
    (near, far), first = EVALUATED[-2:], EVALUATED[0]
    for part in found[first]:
        seconds = [found[count][part] for count in EVALUATED]
        times |= {
            f"evaluation, {part}, {count}": measure.Times(1, threads, seconds=[taken])
            for count, taken in zip(EVALUATED, seconds, strict=True)
        }
        power = exponent([(near, seconds[-2]), (far, seconds[-1])])
        totals[EXTRAPOLATED] += seconds[-1] * (EXTRAPOLATED / far) ** max(power, 0)
        told = ", ".join(f"{each:.3g}" for each in seconds)
        sizes = ", ".join(f"{count:,}" for count in EVALUATED)
        what = f"evaluation, {part}, exponent from {near:,} to {far:,} images"
        rows.append(measure.claim(what, power, "≤ 1.2", f"{told} s of {sizes}"))
    for count, seconds in totals.items():
        training = EPOCHS * 0.9 * count / speed  # a tenth is held out
        told = f"{seconds:.0f} s of {seconds + training:,.0f} s"
        told += ", extrapolated" if count == EXTRAPOLATED else ""
        what = f"evaluation's share of {EPOCHS} epochs of {count:,} images"
        rows.append(measure.claim(what, seconds / (seconds + training), "≤ 0.10", told))
    return rows


def evaluated(count: int) -> dict[str, float]:
    """Seconds of each part of the evaluation after a training with so many images.

    The probes and metrics are those of the latents and, the same again, of PCA. Of the pictures,
    the two t-SNE maps; the pixels are a latent space of their own, and fewer than half as wide here
    as those of a color image.
    """
    import torch

    from common.evaluation import geometry, neighbors, probes, samples, scores
    from common.run import runtime

    runtime.start("no", seed=0)
    latents = synthetic(count, DIMENSIONS)
    test, labels = latents.test, latents.test_labels
    pixels = synthetic(count, 1024)
    asked, neighbors_of_pixels = samples.stratified(labels), neighbors_of(pixels)
    both = {  # of the latents and of PCA
        "linear probe": lambda: probes.fit_linear(latents, CLASSES),
        "neighbors, Euclidean and cosine": lambda: neighbors.predict_both(
            latents.train, latents.train_labels, test[asked]
        ),
        "retrieval": lambda: scores.retrieval(test, labels),
        "k-means": lambda: scores.clustering(test, labels),
        "geometry": lambda: geometry.shape(test, labels, "latent"),
    }
    once = {
        "pixels: neighbors and geometry": lambda: (
            neighbors_of_pixels(),
            geometry.shape(pixels.test, pixels.test_labels, "image"),
        ),
        "PCA": lambda: geometry.fit_pca(lambda: pixels.train.split(1024), DIMENSIONS),
        "two maps by t-SNE": lambda: [geometry.tsne(x.test[:2000], 0) for x in (latents, pixels)],
    }
    neighbors.predict(test, labels, test[:9])  # what is loaded once is not the evaluation's cost
    scores.clustering(test[:100], labels[:100])
    torch.linalg.eigh(torch.eye(9))
    found = {part: 2 * seconds_of(do) for part, do in both.items()}
    return found | {part: seconds_of(do) for part, do in once.items()}


def neighbors_of(latents) -> Callable:
    from common.evaluation import report

    return lambda: report.nearest(
        *(latents.train, latents.train_labels, latents.test, latents.test_labels)
    )


def seconds_of(do: Callable) -> float:
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def synthetic(count: int, dimensions: int):
    """Latents of overlapping classes: `count` images, a tenth held out, and a sixth to test."""
    import torch

    from common.evaluation.probes import Latents

    generator = torch.Generator().manual_seed(0)
    centers = 0.35 * torch.randn(CLASSES, dimensions, generator=generator)
    parts = []
    for size in (count * 9 // 10, count // 10, count // 6):
        labels = torch.arange(size).remainder(CLASSES)
        noise = torch.randn(size, dimensions, generator=generator)
        parts += [centers[labels] + noise, labels]
    return Latents(*parts)


def joint_step(field: str, size: int, turn: measure.Turn) -> None:
    """The steps of train_joint.py with one of its settings at `size`."""
    import train_joint

    train_joint.datasets.read = lambda *_: measure.arrays(20_000, 1)
    measure.long_epochs()
    measure.script(turn, train_joint, dataset="mnist", **{field: size})


def images_per_second(processes: int) -> float:
    """Of training digits with so many processes, the median of seven epochs after the first."""
    from common.files import read_rows

    with tempfile.TemporaryDirectory() as folder:
        flags = ["--epochs", "8", "--tracking", "disabled", "--test", "False"]
        flags += ["--run_dir", f"{folder}/run", "--batch_size", "128"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(processes)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        environment.pop("OMP_NUM_THREADS", None)  # the processes share the cores among them
        done = subprocess.run(
            [*launch, str(measure.ROOT / "train_joint.py"), *flags],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{processes} processes failed:\n{done.stdout}{done.stderr}")
        rows = read_rows(Path(folder) / "run/metrics.jsonl")
    name = "time/images_per_second"
    return statistics.median([row[name] for row in rows if name in row][1:])


def make_folder(folder: Path) -> Path:
    """A folder of `IMAGES` pictures of 64×64 in ten classes, decoded once for its map."""
    from PIL import Image

    from common.data.folder import load_folder

    images = measure.arrays(IMAGES, 3, 64).train_images.transpose(0, 2, 3, 1)
    for number, image in enumerate(images):
        place = folder / "train" / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png", compress_level=0)
    load_folder(folder, 64, show_progress=False)
    return folder


def train_from(folder: Path, in_memory: bool, turn: measure.Turn) -> None:
    import train_joint

    load = train_joint.datasets.load_folder
    maps = []

    def loaded(*arguments):
        arrays = load(*arguments)
        if not isinstance(arrays.train_images, np.memmap):
            raise SystemExit("a folder's images are no memory map any more")
        if in_memory:
            return dataclasses.replace(arrays, train_images=np.array(arrays.train_images))
        maps.append(arrays.train_images)
        return arrays

    train_joint.datasets.load_folder = loaded
    measure.long_epochs()
    steps = 0

    def turn_with_empty_cache() -> None:
        nonlocal steps
        steps += 1
        turn()
        if maps and steps % STEPS_BETWEEN == 0:
            throw_out(maps[0])

    settings = {"data_dir": str(folder), "image_size": 64, "batch_size": 128}
    measure.script(turn_with_empty_cache, train_joint, dataset="folder", **settings)


def throw_out(array: np.memmap) -> None:
    """Let the next look at the map's pages read them from the disk again."""
    array._mmap.madvise(mmap.MADV_DONTNEED)
    file = os.open(array.filename, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def exponent(points: list[tuple[int, float]]) -> float:
    """The p of seconds = c size^p through (size, seconds), by least squares of logarithms."""
    sizes, seconds = zip(*points, strict=True)
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def draw(lines: dict[str, list[tuple[int, float]]], path: Path, place: dict) -> None:
    """One panel per size, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained", dpi=120)
    for axes, (what, points) in zip(figure.subplots(1, len(lines)), lines.items(), strict=True):
        sizes, seconds = zip(*points, strict=True)
        times = [1000 * each for each in seconds]  # ms
        unit = "ms an image" if what == "processes" else "ms a step"
        axes.loglog(sizes, times, marker="o", base=2)
        axes.set_title(f"time ~ {what.split()[0]}^{exponent(points):.2f}", fontsize=9)
        axes.set_xlabel(what)
        axes.set_ylabel(unit)
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
        low, high = math.floor(math.log2(min(times))), math.ceil(math.log2(max(times)))
        ticks = [2.0**power for power in range(low, high + 1)]
        axes.set_yticks(ticks, [f"{tick:.4g}" for tick in ticks], fontsize=7)
        axes.minorticks_off()
    figure.suptitle(f"{place['device']}, {place['threads']} threads", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
