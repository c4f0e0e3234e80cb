"""How the cost of a step grows with batch, latent size and processes; images on the disk.

Seconds of a step are fitted by a power of the size. Processes share one machine's cores and one
global batch. The last claim trains from a folder's memory map, whose pages are thrown out of
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
from pathlib import Path

import measure
import numpy as np

BATCHES = (32, 64, 128, 256, 512, 1024)
LATENTS = (16, 64, 256, 1024, 4096)
COUNTS = (512, 1024, 2048, 4096, 8192)  # embeddings in the loss
PROCESSES = (1, 2, 4)
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
    """A folder of 6,000 pictures of 64×64 in ten classes, decoded once so that its map is there."""
    from PIL import Image

    from common.data.folder import load_folder

    images = measure.arrays(6000, 3, 64).train_images.transpose(0, 2, 3, 1)
    for number, image in enumerate(images):
        place = folder / "train" / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png", compress_level=0)
    load_folder(folder, 64, show_progress=False)
    return folder


def train_from(folder: Path, in_memory: bool, turn: measure.Turn) -> None:
    import train_joint

    load = train_joint.folders.load_folder
    maps = []

    def loaded(*arguments):
        arrays = load(*arguments)
        if not isinstance(arrays.train_images, np.memmap):
            raise SystemExit("a folder's images are no memory map any more")
        if in_memory:
            return dataclasses.replace(arrays, train_images=np.array(arrays.train_images))
        maps.append(arrays.train_images)
        return arrays

    train_joint.folders.load_folder = loaded
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
