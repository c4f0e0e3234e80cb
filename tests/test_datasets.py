import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import datasets, fetching
from common.errors import UserError


def arrays(count=100, classes=4, size=8, with_test=True, seed=0):
    random = np.random.RandomState(seed)

    def part(count):
        images = random.randint(0, 256, (count, 1, size, size)).astype(np.uint8)
        labels = (np.arange(count) % classes).astype(np.int64)
        images[:, 0, 0, 0] = labels  # the label can be read off the image
        return images, labels

    test = part(40) if with_test else (None, None)
    names = tuple(f"class {n}" for n in range(classes))
    return datasets.Arrays(*part(count), *test, names, "fingerprint")


def write_mnist(root, train=60, test=20):
    """Small files in the format of the real ones (IDX)."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = random.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 2049, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return images, labels


def test_digits_are_the_real_ones_enlarged():
    loaded = datasets.read("digits", "data", 32)
    assert loaded.train_images.shape == (1797, 1, 32, 32)
    assert loaded.train_images.dtype == np.uint8
    assert loaded.train_images.max() == 255
    assert loaded.class_names == tuple("0123456789")
    assert loaded.test_images is None
    # enlarged 4x without overshoot, the mean gray stays
    from sklearn.datasets import load_digits

    small = load_digits().images * (255 / 16)
    assert abs(loaded.train_images.mean() - small.mean()) < 0.5
    assert datasets.read("digits", "data", 16).train_images.shape[-1] == 16


def test_mnist_is_read_from_its_files_and_padded_with_background(tmp_path):
    images, labels = write_mnist(tmp_path)
    loaded = datasets.read("mnist", tmp_path, 32)
    assert loaded.train_images.shape == (60, 1, 32, 32)
    assert np.array_equal(loaded.test_images[:, 0, 2:30, 2:30], images)
    assert loaded.test_images[:, :, :2].max() == 0
    assert np.array_equal(loaded.test_labels, labels)
    assert loaded.class_names == tuple("0123456789")
    assert datasets.read("mnist", tmp_path, 16).train_images.shape[-1] == 16


def test_cifar10_is_read_from_its_files(tmp_path, monkeypatch):
    import torchvision

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.RandomState(0)
    planes = random.randint(0, 256, (20, 3072)).astype(np.uint8)
    batch = {"data": planes, "labels": [n % 10 for n in range(20)]}
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": [f"class {n}" for n in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    # the real files' checksums cannot match files that a test makes
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    loaded = datasets.read("cifar10", tmp_path, 32)
    assert loaded.train_images.shape == (100, 3, 32, 32)
    assert np.array_equal(loaded.test_images.reshape(20, 3072), planes)
    assert loaded.class_names[3] == "class 3"


def test_svhn_is_read_from_its_files(tmp_path, monkeypatch):
    import torchvision
    from scipy.io import savemat

    images = np.random.RandomState(0).randint(0, 256, (32, 32, 3, 20)).astype(np.uint8)
    labels = np.arange(1, 21).reshape(-1, 1) % 11  # SVHN calls the digit 0 "10"
    for name in ("train", "test"):
        savemat(tmp_path / f"{name}_32x32.mat", {"X": images, "y": labels})
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    loaded = datasets.read("svhn", tmp_path, 32)
    assert np.array_equal(loaded.train_images, images.transpose(3, 2, 0, 1))
    assert set(loaded.train_labels.tolist()) == set(range(10))
    assert loaded.class_names == tuple("0123456789")


def test_equal_data_have_equal_fingerprints(tmp_path):
    for name in ("a", "b", "c"):
        write_mnist(tmp_path / name)
    path = tmp_path / "c/MNIST/raw/train-images-idx3-ubyte"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    a, b, c = (datasets.read("mnist", tmp_path / n, 32).fingerprint for n in ("a", "b", "c"))
    assert a == b != c


def test_no_network_and_no_files_is_one_line(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match=r"mnist is not in .* and cannot be downloaded") as error:
        datasets.read("mnist", tmp_path / "nowhere", 32)
    assert "\n" not in error.value.message


class Downloaded:
    """A data set of torchvision's kind: one file, whose content is checked."""

    filename = "archive.tar.gz"

    def __init__(self, root, download):
        path = Path(root) / "set/images"
        if download:
            path.parent.mkdir(exist_ok=True)
            path.write_text("torchvision's")
        if not path.is_file() or path.read_text() != "torchvision's":
            raise RuntimeError("Dataset not found or corrupted")


def test_a_download_replaces_no_file(tmp_path):
    datasets._download(Downloaded, tmp_path / "new", {})
    Downloaded(tmp_path / "new", download=False)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"set", ".download.lock"}
    mine = tmp_path / "mine/set/images"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(UserError, match=r"set/images is not torchvision's .* move it away"):
        datasets._download(Downloaded, tmp_path / "mine", {})
    assert mine.read_text() == "precious"
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"set", ".download.lock"}


def test_damaged_files_are_named(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"mnist in .* cannot be read"):
        datasets.read("mnist", tmp_path, 32)


def test_splits_are_disjoint_stratified_and_whole():
    images = datasets.split_data(arrays(), limit_train=None)
    assert (len(images.train), len(images.validation), len(images.test)) == (90, 10, 40)
    rows = torch.cat([images.train.rows, images.validation.rows])
    assert sorted(rows.tolist()) == list(range(100))
    assert torch.bincount(images.validation.labels).max() <= 3
    for split in (images.train, images.validation, images.test):
        assert torch.equal(split.images(slice(None))[:, 0, 0, 0].long(), split.labels)


def test_validation_does_not_depend_on_the_run():
    whole = datasets.split_data(arrays(), limit_train=None)
    torch.manual_seed(123)
    np.random.seed(123)
    limited = datasets.split_data(arrays(), limit_train=20)
    assert torch.equal(whole.validation.rows, limited.validation.rows)
    assert torch.equal(whole.train.rows[:20], limited.train.rows)
    assert torch.bincount(limited.train.labels).sub(5).abs().max() <= 1


def test_without_a_test_part_a_stratified_one_is_held_out():
    images = datasets.split_data(arrays(with_test=False), limit_train=None)
    assert (len(images.train), len(images.validation), len(images.test)) == (72, 8, 20)
    rows = torch.cat([split.rows for split in (images.train, images.validation, images.test)])
    assert sorted(rows.tolist()) == list(range(100))
    assert torch.bincount(images.test.labels).tolist() == [5, 5, 5, 5]


def test_few_labels_are_the_same_number_of_each_class_and_nested():
    def kept(count, seed=0):
        images = datasets.split_data(arrays(), labels_per_class=count, seed=seed)
        whole = datasets.split_data(arrays())
        assert torch.equal(images.pretrain.rows, whole.train.rows)
        assert torch.equal(images.validation.rows, whole.validation.rows)
        assert (images.mean, images.std) == (whole.mean, whole.std)
        assert torch.bincount(images.train.labels).tolist() == [count] * 4
        assert set(images.train.rows.tolist()) <= set(whole.train.rows.tolist())
        labels = images.train.images(slice(None))[:, 0, 0, 0].long()
        assert torch.equal(labels, images.train.labels)
        return set(images.train.rows.tolist())

    assert kept(2) < kept(5) < kept(15)
    assert kept(5) == kept(5) != kept(5, seed=1)
    assert kept(2, seed=1) < kept(5, seed=1)
    both = datasets.split_data(arrays(), limit_train=40, labels_per_class=3)
    assert (len(both.pretrain), len(both.train)) == (40, 12)
    with pytest.raises(
        UserError, match=r"--labels_per_class 50: class class . has \d+ training images"
    ):
        datasets.split_data(arrays(), labels_per_class=50)


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="too few"):
        datasets.split_data(arrays(count=3, with_test=False), limit_train=None)


def test_every_prefix_of_the_order_is_stratified():
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    order = datasets.stratified_order(labels, seed=0)
    assert sorted(order) == list(range(100))
    for count in (10, 20, 50):
        shares = np.bincount(labels[order[:count]], minlength=3) / count
        assert np.abs(shares - [0.6, 0.3, 0.1]).max() <= 1.5 / count
    assert not np.array_equal(order, datasets.stratified_order(labels, seed=1))


def test_channel_statistics_are_numpys():
    images = np.random.RandomState(0).randint(0, 256, (5000, 3, 4, 4)).astype(np.uint8)
    rows = np.arange(0, 5000, 2)
    mean, std = datasets.channel_statistics(images, rows)
    chosen = images[rows] / 255
    assert mean == pytest.approx(chosen.mean(axis=(0, 2, 3)))
    assert std == pytest.approx(chosen.std(axis=(0, 2, 3)))
    assert datasets.channel_statistics(np.zeros((4, 1, 2, 2), np.uint8), np.arange(4))[1] == (1.0,)


def test_a_sample_is_stratified_and_always_the_same():
    images = datasets.split_data(arrays(), limit_train=None)
    part = images.test.sample(8)
    assert torch.bincount(part.labels).tolist() == [2, 2, 2, 2]
    assert torch.equal(part.rows, images.test.sample(8).rows)
    assert torch.equal(part.images(slice(None))[:, 0, 0, 0].long(), part.labels)
    assert len(images.test.sample(1000)) == 40


def test_images_are_moved_once_and_shared_by_the_splits():
    images = datasets.split_data(arrays(with_test=False), limit_train=None).to(torch.device("cpu"))
    assert images.train.source is images.validation.source is images.test.source
    assert images.train.images(torch.tensor([3, 1])).shape == (2, 1, 8, 8)


def test_batches_follow_the_order_whether_the_images_fit_on_the_device_or_are_fetched_ahead():
    source = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 8, 8).contiguous()
    rows, labels = torch.arange(12).flip(0)[:10], torch.arange(10) % 2
    order = torch.randperm(10).view(5, 2)
    here = list(datasets.Split(source, rows, labels).batches(order))
    assert torch.equal(torch.stack([positions for positions, _ in here]), order)
    for positions, images in here:
        assert torch.equal(images[:, 0, 0, 0], 11 - positions)

    asked = []

    class Source:
        device = source.device

        def __getitem__(self, rows):
            asked.append(rows)
            return source[rows]

    elsewhere = datasets.Split(Source(), rows, labels.to("meta")).batches(order)
    for number, (positions, images) in enumerate(elsewhere):
        assert positions.device.type == images.device.type == "meta"
        assert images.shape == (2, 1, 8, 8)
        assert len(asked) <= number + 1 + fetching.AHEAD
    assert torch.equal(11 - torch.stack(asked), order)
    next(datasets.Split(Source(), rows, labels.to("meta")).batches(order))  # and stopped there


@pytest.mark.parametrize(("side", "small"), [(28, 28), (64, 48)])
def test_thumbnails_are_small_and_in_the_order_of_the_positions(side, small):
    shades = torch.arange(0, 250, 10, dtype=torch.uint8)
    source = shades[:, None, None, None].expand(-1, 3, side, side)
    split = datasets.Split(source, torch.arange(25), torch.zeros(25).long())
    positions = torch.tensor([7, 3, 20, 3])
    found = split.thumbnails(positions, 48)
    assert found.shape == (4, 3, small, small) and found.dtype == np.uint8
    assert (found[:, 0, 0, 0] == shades[positions].numpy()).all()
