"""Data sets: loading, splits, order of the training images, device.

The validation images are drawn with a fixed seed, so every script and every stage holds out the
same ones. The order of the training images is a pure function of (seed, epoch), for the global
batch: each process takes its slice of it. Folders are read by `folder.py`.
"""

import contextlib
import dataclasses
import filecmp
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..files import checksum, lock
from .fetching import fetch_ahead
from .folder import Arrays, load_folder
from .layout import say
from .notes import notes_on_flips, notes_on_splits

# Data sets whose labels a horizontal flip keeps; it changes those of digits and letters. Of a
# folder nobody knows: text, signs and the left and right hand are not what their mirror shows.
FLIPPABLE = ("fashion_mnist", "cifar10", "cifar100")
Floats = tuple[float, ...]

SPLIT_SEED = 20_240_229  # of the held-out images, independent of the run's seed
VALIDATION_FRACTION = 0.1  # of the training images
TEST_FRACTION = 0.2  # of all images, if the data set has no test split
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "svhn": "SVHN"}  # its classes
TORCHVISION |= {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
BORDERED = ("mnist", "fashion_mnist")  # of 28×28 pixels, to which `resize` adds a border


@dataclasses.dataclass(frozen=True)
class Split:
    """A subset of the images of one array, in a fixed order.

    Attributes:
        source: uint8 (M,C,S,S), all images of the array; may be memory-mapped.
        rows: int64 (N,), indices into `source`, on the same device.
        labels: int64 (N,), on the device where batches are returned.
        change: a transform of images (B,C,S,S) and their positions, applied to each batch.
        per_epoch: how many of them an epoch of training takes, drawn at random; None: all.
    """

    source: Tensor
    rows: Tensor
    labels: Tensor
    change: Callable[[Tensor, Tensor | slice], Tensor] | None = None
    per_epoch: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, positions: Tensor | slice) -> Tensor:
        """The images at `positions` of this split, uint8 (B,C,S,S), on the labels' device.

        After a `change` they are what it makes of them, such as floats in [0,1].
        """
        if isinstance(positions, Tensor):
            positions = positions.to(self.rows.device)
        images = self.source[self.rows[positions]].to(self.labels.device, non_blocking=True)
        return images if self.change is None else self.change(images, positions)

    def batches(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each row of `order`, int64 (steps,B) on the CPU, and the images at these positions.

        Both are on the labels' device; images that did not fit there are fetched ahead.
        """
        device, is_there = self.labels.device, self.source.device == self.labels.device
        positions = order.to(device)  # at once: a step does not wait for a copy
        if is_there:
            return ((row, self.images(row)) for row in positions)
        images = fetch_ahead(lambda row: self.source[self.rows[row]], order, device)
        return zip(positions, images, strict=True)

    def blocks(self) -> Iterator[Tensor]:
        """All images in order, as `images` gives them, in blocks of `images_at_once`."""
        count = images_at_once(self.source.shape[-1])
        for start in range(0, len(self), count):
            yield self.images(slice(start, start + count))

    def thumbnails(self, positions: Tensor, side: int) -> np.ndarray:
        """The images at `positions` int64 (N,), uint8 (N,C,s,s): larger ones scaled to `side`.

        A few at a time, since all of them in full size may not fit into memory.
        """
        full = self.source.shape[-1]
        blocks = (self.images(few).cpu().numpy() for few in positions.split(images_at_once(full)))
        return np.concatenate([resize(b, side) if full > side else b for b in blocks])

    def sample(self, count: int) -> "Split":
        """At most `count` of the images, stratified, with a fixed seed."""
        chosen = torch.from_numpy(stratified_order(self.labels.cpu().numpy(), SPLIT_SEED)[:count])
        return self._at(chosen)

    def few(self, count: int, seed: int) -> "Split":
        """`count` images of each class, as `few_per_class` draws them."""
        return self._at(torch.from_numpy(few_per_class(self.labels.cpu().numpy(), count, seed)))

    def to(self, device: torch.device) -> "Split":
        """The split on a device of another kind; itself where it is on one of this kind."""
        if self.labels.device.type == device.type:
            return self
        moved = (a.to(device) for a in (self.source, self.rows, self.labels))
        return Split(*moved, self.change, self.per_epoch)

    def balanced(self) -> "Split":
        """The images, followed by copies until every class has as many as the largest.

        An epoch takes as many as there were, so it draws the classes evenly: the images of a rare
        one several times, each time augmented in another way, and of a frequent one some. Classes
        without images stay so.
        """
        labels = self.labels.cpu()
        members = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
        most = max(map(len, members))
        copies = [m.repeat(-(-most // len(m)))[len(m) : most] for m in members]
        chosen = torch.cat([torch.arange(len(labels)), *copies])
        return dataclasses.replace(self._at(chosen), per_epoch=len(self))

    def _at(self, chosen: Tensor) -> "Split":
        if self.change is not None:  # it may depend on the positions
            raise ValueError("choose the images first, then what changes them")
        rows, labels = (a[chosen.to(a.device)] for a in (self.rows, self.labels))
        return Split(self.source, rows, labels)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """The splits of a data set.

    `train` are the training images with labels, `pretrain` all of them, for methods that learn
    without labels: the same unless labels are few or missing (-1). `mean` and `std` are those of
    each channel of `pretrain`, in [0,1].
    """

    train: Split
    pretrain: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: Floats
    std: Floats
    fingerprint: str

    @property
    def channels(self) -> int:
        return self.train.source.shape[1]

    def to(self, device: torch.device) -> "ImageData":
        """The data with labels on `device`, and images too if they fit into half of a GPU's free
        memory; otherwise each batch is moved on its own.
        """
        names = ("train", "pretrain", "validation", "test")
        splits = {name: getattr(self, name) for name in names}
        sources = {id(split.source): split.source for split in splits.values()}
        size = sum(source.numel() for source in sources.values())
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what a run before this one has left
        fits = device.type != "cuda" or size < torch.cuda.mem_get_info(device)[0] / 2
        place = device if fits else torch.device("cpu")
        moved = {key: source.to(place) for key, source in sources.items()}
        for name, s in splits.items():
            splits[name] = Split(moved[id(s.source)], s.rows.to(place), s.labels.to(device))
        return dataclasses.replace(self, **splits)


def load(config: Any, show_progress: bool = True) -> ImageData:
    """Read the data set of a `TrainingConfig` and split it: `read`, then `split_data`.

    `UserError` as those two, and where a single test image is to be evaluated.
    """
    place = config.dataset, config.data_dir, config.image_size
    arrays = read(*place, config.skip_unreadable, show_progress, config.white, config.labels)
    images = split_data(arrays, config.limit_train, config.labels_per_class, config.seed)
    if config.test and len(images.test) < 2:
        raise UserError(
            "1 test image is too few to measure a latent space; add images, or pass --test=False"
        )
    if show_progress:
        say(notes_on_splits(arrays, images))
        flip, augment = getattr(config, "flip", None), getattr(config, "augment", None)
        say(notes_on_flips(config.dataset, flip, augment))
    return images


def read(
    dataset: str,
    data_dir: str | Path,
    image_size: int,
    skip_unreadable: bool = False,
    show_progress: bool = True,
    white: float | None = None,
    labels: str | None = None,
) -> Arrays:
    """Read a named data set, downloading it if it is not in `data_dir` yet, or an image folder.

    Raises:
        UserError: the data set cannot be downloaded or read.
    """
    data_dir = Path(data_dir)
    if dataset == "folder":
        return load_folder(data_dir, image_size, skip_unreadable, show_progress, white, labels)
    if white is not None or labels is not None:
        raise UserError(
            f"--white and --labels are for --dataset folder, not {dataset}; leave them out"
        )
    test_images, test_labels = None, None
    if dataset == "digits":
        train_images, train_labels, class_names = _digits(image_size)
    else:
        train_images, train_labels, class_names = _torchvision(dataset, data_dir, True)
        test_images, test_labels, _ = _torchvision(dataset, data_dir, False)
        train_images, test_images = (resize(a, image_size) for a in (train_images, test_images))
    arrays = (train_images, train_labels, test_images, test_labels)
    chunks = (memoryview(a).cast("B") for a in arrays if a is not None)
    return Arrays(*arrays, class_names, checksum(*chunks, repr(class_names).encode()))


def split_data(
    arrays: Arrays,
    limit_train: int | None = None,
    labels_per_class: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Split off validation (and test, if there is none); compute mean and std for normalization.

    `arrays` may also come from `folder.load_folder`. Images without a label join `pretrain` alone.
    `limit_train` keeps that many training images, stratified, those with a label first, of which
    `labels_per_class` keep their labels, drawn with `seed`: with one seed the images of a smaller
    number are among those of a larger one. Validation and test stay whole, with their labels.

    Raises:
        UserError: too few images to split, or fewer than `labels_per_class` of some class.
    """
    train_images, train_labels = arrays.train_images, arrays.train_labels
    labeled, unlabelled = (np.flatnonzero(is_it) for is_it in (train_labels >= 0, train_labels < 0))
    order = labeled[stratified_order(train_labels[labeled], SPLIT_SEED)]

    def part(own: tuple, fraction: float, spare: int) -> tuple:
        """Images, labels and rows of a part: its own, or held out of what is left of `order`."""
        nonlocal order
        if own[0] is not None:
            return *own, np.arange(len(own[1]))
        count = max(1, round(fraction * len(order)))
        held, order = hold_out(order, count, arrays.groups, spare)
        return train_images, train_labels, held

    own_test = arrays.test_images, arrays.test_labels
    own_validation = arrays.validation_images, arrays.validation_labels
    # one group for each of the parts that follow
    spare = 2 if own_validation[0] is None else 1
    test_images, test_labels, test_rows = part(own_test, TEST_FRACTION, spare)
    validation_images, validation_labels, validation_rows = part(
        own_validation, VALIDATION_FRACTION, spare=1
    )
    if len(order) < 2 or not (len(test_rows) and len(validation_rows)):
        groups = "" if arrays.groups is None else f" in {len(np.unique(arrays.groups))} groups"
        raise UserError(f"{len(labeled)} images{groups} are too few to hold some out; add images")
    train_rows = order[:limit_train]
    unlabelled = np.random.RandomState(SPLIT_SEED).permutation(unlabelled)
    pretrain_rows = np.concatenate([order, unlabelled])[:limit_train]
    if labels_per_class:
        train_rows = train_rows[few_per_class(train_labels[train_rows], labels_per_class, seed)]
        sizes = np.bincount(train_labels[train_rows], minlength=len(arrays.class_names))
        if sizes.min() < labels_per_class:
            name = arrays.class_names[int(sizes.argmin())]
            raise UserError(
                f"--labels_per_class {labels_per_class}: class {name} has {sizes.min()} training "
                "images; take fewer labels, or add images"
            )

    train_source = _as_tensor(train_images)
    validation_source, test_source = (
        train_source if images is train_images else _as_tensor(images)
        for images in (validation_images, test_images)
    )
    mean, std = channel_statistics(train_images, pretrain_rows)

    def split(source: Tensor, labels: np.ndarray, rows: np.ndarray) -> Split:
        return Split(source, torch.from_numpy(rows), torch.from_numpy(labels[rows]))

    return ImageData(
        train=split(train_source, train_labels, train_rows),
        pretrain=split(train_source, train_labels, pretrain_rows),
        validation=split(validation_source, validation_labels, validation_rows),
        test=split(test_source, test_labels, test_rows),
        class_names=arrays.class_names,
        mean=mean,
        std=std,
        fingerprint=arrays.fingerprint,
    )


def hold_out(
    order: np.ndarray, count: int, groups: np.ndarray | None, spare: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` of the rows in `order`, and the others.

    Of groups, which stay whole: in the order of their first rows, those that have at most 1.5 times
    what is missing. If these are not half of `count`, the smallest one that is left joins them.
    At least `spare` groups are left, even if too little is held out.
    """
    if groups is None:
        return order[:count], order[count:]
    of, held = groups[order], np.zeros(len(order), bool)
    sizes, left = np.bincount(of), list(dict.fromkeys(of.tolist()))
    for group in list(left):
        missing = count - held.sum()
        if missing > 0 and sizes[group] <= 1.5 * missing and len(left) > spare:
            held |= of == group
            left.remove(group)
    if held.sum() < count / 2 and len(left) > spare:
        held |= of == min(left, key=lambda group: sizes[group])
    return order[held], order[~held]


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order of 0 … N−1 in which every prefix is stratified.

    Within a class the order is random; the r-th of n members is placed at (r + 1/2)/n.
    """
    random = np.random.RandomState(seed)  # its stream is frozen by NumPy, Generator's is not
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((random.permutation(len(labels)), position))


def few_per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of `count` random members of each class, in order; fewer where a class has fewer.

    With one seed, those of a smaller count are among those of a larger one.
    """
    random = np.random.RandomState(seed % 2**32)
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(chosen))


def channel_statistics(images: np.ndarray, rows: np.ndarray) -> tuple[Floats, Floats]:
    """Mean and standard deviation (1 if there is none) of each channel over `rows`, in [0,1]."""
    sums = np.zeros((2, images.shape[1]))
    for block in np.array_split(rows, max(1, len(rows) // images_at_once(images.shape[-1], 1024))):
        values = images[block] / 255.0  # float64
        sums += values.sum(axis=(0, 2, 3)), np.square(values).sum(axis=(0, 2, 3))
    mean, square = sums / (len(rows) * images[0, 0].size)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())


def _digits(image_size: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """1,797 handwritten digits of 8×8 (Alpaydin & Kaynak 1998, in scikit-learn), enlarged."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images).view(-1, 1, 8, 8) * (255 / 16)
    large = torch.empty(len(small), 1, image_size, image_size, dtype=torch.uint8)
    for rows in torch.arange(len(small)).split(images_at_once(image_size, len(small))):
        large[rows] = F.interpolate(small[rows], image_size, mode="bilinear").round().byte()
    return large.numpy(), labels.astype(np.int64), tuple("0123456789")


def _torchvision(
    dataset: str, data_dir: Path, is_train: bool
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    import torchvision

    dataset_class = getattr(torchvision.datasets, TORCHVISION[dataset])
    kwargs = {"train": is_train}
    if dataset == "svhn":
        kwargs = {"split": "train" if is_train else "test"}
    try:
        part = dataset_class(data_dir, **kwargs, download=False)
    except RuntimeError:  # torchvision's error for missing files
        try:
            _download(dataset_class, data_dir, kwargs)
            part = dataset_class(data_dir, **kwargs, download=False)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(":")
            raise UserError(
                f"{dataset} is not in {data_dir} and cannot be downloaded ({reason}); connect to "
                "the network, or put torchvision's files there (--data_dir names the folder)"
            ) from None
    except Exception as error:
        advice = "delete them and run again to download them anew"
        raise UserError(f"{dataset} in {data_dir} cannot be read ({error}); {advice}") from None
    images = np.asarray(part.data)
    if images.ndim == 3:  # (N,H,W), grayscale
        images = images[:, None]
    elif images.shape[-1] == 3:  # CIFAR is (N,H,W,C), SVHN (N,C,H,W)
        images = images.transpose(0, 3, 1, 2)
    labels = np.asarray(part.labels if dataset == "svhn" else part.targets, dtype=np.int64)
    class_names = getattr(part, "classes", None) or [str(n) for n in range(labels.max() + 1)]
    if dataset == "mnist":
        class_names = [str(n) for n in range(10)]  # torchvision: "0 - zero"
    return np.ascontiguousarray(images), labels, tuple(class_names)


def _download(dataset_class: type, data_dir: Path, kwargs: dict[str, Any]) -> None:
    """Download a data set of torchvision into `data_dir`; no file that lies there is replaced.

    torchvision writes over files that fail its checks, so it works in a folder of ours, and what is
    new moves. `UserError` if other files lie in its place.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with lock(data_dir / ".download.lock"):  # the other processes wait for it
        with contextlib.suppress(RuntimeError):  # another process may have done it
            dataset_class(data_dir, **kwargs, download=False)
            return
        with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as ours:
            archive = data_dir / getattr(dataset_class, "filename", "")
            if archive.is_file():  # CIFAR's, not unpacked yet
                shutil.copy(archive, ours)
            dataset_class(ours, **kwargs, download=True)
            files = [path for path in sorted(Path(ours).rglob("*")) if path.is_file()]
            places = [data_dir / path.relative_to(ours) for path in files]
            pairs = list(zip(files, places, strict=True))
            others = [b for a, b in pairs if os.path.lexists(b) and not _equal(a, b)]
            if others:
                raise UserError(
                    f"{others[0]} is not torchvision's file of that name, and is not overwritten; "
                    "move it away, or name another folder by --data_dir"
                )
            for path, place in pairs:
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():
                    path.rename(place)


def _equal(first: Path, second: Path) -> bool:
    return second.is_file() and filecmp.cmp(first, second, shallow=False)


def resize(images: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 (N,C,H,H) to (N,C,S,S): 28×28 is padded with background to 32×32, then all resized."""
    from torchvision.transforms.v2.functional import resize

    if images.shape[-1] == 28:
        images = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    if images.shape[-1] == image_size:
        return images
    return resize(torch.from_numpy(images), [image_size, image_size], antialias=True).numpy()


def images_at_once(image_size: int, most: int = 512) -> int:
    """Images per block without gradients: `most` up to 32×32 pixels, fewer of larger ones."""
    return max(1, most * 32**2 // max(image_size, 32) ** 2)


def _as_tensor(images: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # a read-only memory map is fine: nothing writes to images
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(images)
