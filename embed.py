"""Encode new images with a finished run: their latents and predicted classes.

The images are decoded as for training, many in parallel, and encoded in batches, on the GPU if
there is one. The file that is written holds, for each image in the order of `paths`:

    latents         float32 (N,D)    output of the encoder
    predictions     int64 (N,)       the most probable class, an index into the run's classes
    predicted_names text (N,)        its name
    confidences     float32 (N,)     its probability
    probabilities   float32 (N,K)    of all classes; `class_names` (K,) names them

`--export` writes the network itself, preprocessing included: `onnx` runs without PyTorch, `pt2`
with PyTorch alone. The file is kept only if its outputs equal the network's.

    python embed.py runs/joint-cifar10 holiday/ cat.jpg --out latents.npz
    python embed.py runs/joint-cifar10 holiday/ --out latents.parquet
    python embed.py runs/joint-cifar10 --export onnx --out encoder.onnx
    python embed.py runs/joint-cifar10 --export pt2 --out encoder.pt2
"""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import common  # isort: skip  # noqa: F401  (before torch, which reads how threads wait)

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import Positional, arg

from common import console, models
from common.config import Place, PositiveInt, parse
from common.data import datasets, decoding, layout
from common.display import tables
from common.errors import UserError, out_of_memory
from common.export import FileFormat, InputType, export_network
from common.files import atomic_write, read_json
from common.run import runs, runtime

# torchvision's images are 32×32 in training, some of them 28×28 with a border of background
TORCHVISION_SIZE, BORDER = 32, 2


@dataclass(frozen=True)
class Config:
    run: Annotated[Positional[Place], arg(metavar="RUN")]  # folder of a finished run
    out: Place  # file to write: .npz or .parquet; with --export .onnx or .pt2
    images: Annotated[Positional[tuple[Place, ...]], arg(metavar="IMAGES")] = ()  # files, folders
    batch_size: PositiveInt = 256  # images encoded at a time
    skip_unreadable: bool = False  # leave out images that cannot be read
    export: FileFormat | None = None  # write the network itself, without any images
    # input of the exported network: uint8 0 to 255, or float32 in [0,1]
    export_input: Annotated[InputType, arg(aliases=["--onnx_input"])] = "uint8"


def main(config: Config) -> dict[str, float]:
    # ---------------------------------------------------------------- Set-up
    runtime.check_alone("embed.py")
    runtime.set_threads()
    if config.export and config.images:
        raise UserError(f"--export {config.export} takes no images; leave them out")
    out = choose_out(config.out, config.export)
    network, description = load_run(Path(config.run))
    if config.export:
        return write_network(network, description, config, out)
    device = torch.device("cuda" if runtime.uses_cuda() else "cpu")
    network.to(device)

    # ---------------------------------------------------------------- Images
    files = list_images(config.images)
    is_torchvision = description["dataset"] in datasets.TORCHVISION
    chunks = decoding.decode_all(
        list(files),
        sum(files.values()),
        TORCHVISION_SIZE if is_torchvision else description["image_size"],
        border=BORDER if description["dataset"] in datasets.BORDERED else 0,
        white=description.get("white"),
    )
    paths: list[str] = []
    pixels = readable(chunks, files, description["channels"], config, paths)

    # ---------------------------------------------------------------- Encoding
    started, rows = time.perf_counter(), []
    with (
        out_of_memory("make --batch_size smaller"),
        console.progress(len(files), "encoding", is_main=True) as bar,
        torch.inference_mode(),
    ):
        for images in batches(pixels, config.batch_size):  # uint8 (B,C,S,S)
            if is_torchvision:
                images = datasets.resize(images, description["image_size"])
            latents, logits = network(torch.from_numpy(images).to(device))  # (B,D), (B,K)
            probabilities = logits.softmax(dim=1)
            confidences, predictions = probabilities.max(dim=1)
            row = (latents, predictions, confidences, probabilities)
            rows.append([tensor.cpu() for tensor in row])
            bar.update(len(images))
    if not rows:
        raise UserError(f"none of the {len(files)} files can be read as an image")
    rate = len(paths) / (time.perf_counter() - started)

    # ---------------------------------------------------------------- Writing
    latents, predictions, confidences, probabilities = (
        torch.cat(tensors).numpy() for tensors in zip(*rows, strict=True)
    )
    class_names = np.array(description["class_names"])
    columns = {
        "paths": np.array(paths),
        "latents": latents,
        "predictions": predictions,
        "predicted_names": class_names[predictions],
        "confidences": confidences,
        "probabilities": probabilities,
    }
    with written(out) as file:
        if out.suffix == ".npz":
            np.savez(file, **columns, class_names=class_names)
        else:
            write_parquet(file, columns, {"run": config.run, "class_names": class_names.tolist()})
    skipped = len(files) - len(paths)
    console.say(tables.class_counts(predictions, confidences, class_names))
    if skipped:
        named = layout.some(files.keys() - set(paths))
        console.say(f"skipped {skipped} of {len(files)} files, no readable images: {named}")
    console.say(f"{out}: {len(paths):,} images, {rate:,.0f} images/s on the {device.type}")
    return {"images": len(paths), "skipped": skipped, "images_per_second": rate}


class Network(nn.Module):
    """Images (B,C,S,S), uint8 or floats in [0,1], to latents (B,D) and logits (B,K)."""

    def __init__(self, encoder: nn.Module, classifier: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encoder(images)
        return latents, self.classifier(latents)


def choose_out(name: str, export: str | None) -> Path:
    """The file to write. `UserError`: it exists, or can't be written, for its name or its place."""
    out = Path(name)
    endings = (f".{export}",) if export else (".npz", ".parquet")
    if out.suffix not in endings:
        is_network = out.suffix in (".onnx", ".pt2")
        hint = f"; it is written by --export {out.suffix[1:]}" if is_network else ""
        raise UserError(f"--out {out} must end in {' or '.join(endings)}{hint}")
    if os.path.lexists(out):
        raise UserError(f"{out} exists; choose another --out, or remove it")
    folder = out.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {out}: {folder} is not a folder that we may write to")
    needed = {".parquet": ("pyarrow",), ".onnx": ("onnx", "onnxscript", "onnxruntime")}
    names = needed.get(out.suffix, ())
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        advice = "pip install -r requirements-export.txt"
        raise UserError(f"{out.suffix} files need {', '.join(missing)}: {advice}")
    return out


def load_run(run_dir: Path) -> tuple[Network, dict[str, Any]]:
    """Encoder and classifier of a finished run in eval mode, and its encoder.json."""
    if not (run_dir / "config.json").is_file():
        raise UserError(f"{run_dir} is no run: there is no {run_dir / 'config.json'}")
    if runs.finished(run_dir) is None:
        raise UserError(f"{run_dir} is not finished; resume it first: --resume {run_dir}")
    network = Network(models.load_encoder(run_dir), models.load_classifier(run_dir))
    return network.requires_grad_(False).eval(), read_json(run_dir / "encoder.json")


def list_images(given: Sequence[str]) -> dict[str, int]:
    """{path: bytes} of files and of all visible files in folders, in order, each of them once."""
    if not given:
        raise UserError("name the images behind the run: files, or folders that are searched")
    files: dict[str, int] = {}
    for name in given:
        if os.path.isdir(name):
            left_out: list[str] = []
            below = {path: length for path, length, _ in decoding.files_below(name, left_out)}
            if left_out:
                kinds = "thumbnails, masks, previews or hidden images are left out"
                console.say(f"{name}: {len(left_out)} {kinds}: {layout.some(left_out)}")
            if not below:
                raise UserError(f"there are no files in {name}; fill it or leave it out")
            files |= below
        elif os.path.exists(name):
            files[name] = os.path.getsize(name)
        else:
            raise UserError(f"there is no file or folder {name}")
    return files


def readable(
    chunks: Iterable[tuple[np.ndarray, dict[str, str]]],
    files: Iterable[str],
    channels: int,
    config: Config,
    paths: list[str],
) -> Iterator[np.ndarray]:
    """Yield the pixels uint8 (n,C,S,S) of decoded chunks, and append their files to `paths`.

    `UserError`: a file that cannot be read, unless skipped; an RGB image where C is 1.
    """
    names, problems = iter(files), {}
    for pixels, unreadable in chunks:
        here = [next(names) for _ in range(len(pixels) + len(unreadable))]
        if unreadable and not config.skip_unreadable:
            if not problems:
                console.say("a file cannot be read; checking the others before stopping")
            problems |= unreadable
        if problems:
            continue
        here = [name for name in here if name not in unreadable]
        if channels == 1:
            is_color = (pixels != pixels[:, :1]).any(axis=(1, 2, 3))
            if is_color.any():
                name = here[int(is_color.argmax())]
                raise UserError(
                    f"{name} is an RGB image, but {config.run} was trained on grayscale images; "
                    "convert it to grayscale, or use a run on RGB images"
                )
        paths += here
        yield pixels[:, :channels]
    if problems:
        named = layout.some(f"{name} ({reason})" for name, reason in problems.items())
        advice = "remove what cannot be read or pass --skip_unreadable=True"
        what = f"{len(problems)} files are no readable images"
        raise UserError(f"{what}: {named}; {advice}")


def batches(blocks: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Regroup blocks (n,C,S,S) into batches of `batch_size` images; the last one may be smaller.

    Blocks may be empty.
    """
    waiting: list[np.ndarray] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) < batch_size:
            continue
        joined = np.concatenate(waiting)
        whole = len(joined) - len(joined) % batch_size
        yield from np.split(joined[:whole], whole // batch_size)
        waiting = [joined[whole:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


@contextlib.contextmanager
def written(out: Path) -> Iterator[IO]:
    """`atomic_write`, but a failure such as a full disk is a `UserError`."""
    try:
        with atomic_write(out) as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None


def write_parquet(file: IO, columns: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write one column per array, matrices as lists of fixed length, and `facts` as metadata."""
    import pyarrow
    import pyarrow.parquet

    arrays = {}
    for name, values in columns.items():
        if values.ndim == 2:
            flat = pyarrow.array(values.ravel())
            arrays[name] = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
        elif values.dtype.kind == "U":  # a name of a file need not be UTF-8
            text = [value.encode(errors="backslashreplace").decode() for value in values.tolist()]
            arrays[name] = pyarrow.array(text)
        else:
            arrays[name] = pyarrow.array(values)
    metadata = {name: json.dumps(value) for name, value in facts.items()}
    table = pyarrow.table(arrays).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, file)


def write_network(
    network: Network, description: dict[str, Any], config: Config, out: Path
) -> dict[str, float]:
    """Write the network as a file of its own, and say what its input and outputs are."""
    shape = (description["channels"], description["image_size"], description["image_size"])
    content, sizes, difference = export_network(
        network, config.export, shape, config.export_input, description["class_names"]
    )
    with written(out) as file:
        file.write(content)
    console.say(
        f"{out}: images {config.export_input} (B,{','.join(map(str, shape))}) to latents "
        f"(B,{sizes[0]}) and logits (B,{sizes[1]}); differs from PyTorch by {difference:.1e} at "
        "most"
    )
    return {"difference": difference}


if __name__ == "__main__":
    main(parse(Config))
