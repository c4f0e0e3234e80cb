"""What is said of the splits: mirrored or not, classes too small, the same image on both sides."""

import dataclasses
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import TrainingConfig
from common.data import datasets
from common.data.folder import load_folder
from common.errors import UserError


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("RANK", raising=False)


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def fill(folder, **counts):
    for k, (name, count) in enumerate(counts.items()):
        for n in range(count):
            save(folder / name / f"{n}.png", [zlib.crc32(folder.name.encode()), k, n])


def notes_on(data_dir):
    arrays = load_folder(data_dir, 8)
    return datasets.notes_on_splits(arrays, datasets.split_data(arrays))


def test_folders_are_not_mirrored_unless_asked_for():
    assert "folder" not in datasets.FLIPPABLE
    for flip in (None, False):
        (note,) = datasets.notes_on_flips("folder", flip)
        assert "not mirrored" in note and "--flip True" in note
    assert datasets.notes_on_flips("folder", True) == [
        "training images are also mirrored (--flip True)"
    ]
    assert datasets.notes_on_flips("cifar10", None) == []
    for dataset in ("folder", "cifar10"):
        (note,) = datasets.notes_on_flips(dataset, True, "none")
        assert note == "the encoder's training images are not mirrored, since --augment is none"
    assert datasets.notes_on_flips("cifar10", None, "none") == []


def test_nothing_is_said_of_ordinary_data(tmp_path):
    fill(tmp_path / "train", ant=20, bee=30)
    fill(tmp_path / "test", ant=5, bee=5)
    assert notes_on(tmp_path) == []


@pytest.mark.parametrize("most", [1, 6])
def test_classes_of_one_image_and_without_any(tmp_path, most):
    fill(tmp_path / "train", ant=most, bee=1, cow=1, dog=1)
    notes = notes_on(tmp_path)
    arrays = load_folder(tmp_path, 8)
    left = torch.bincount(datasets.split_data(arrays).train.labels, minlength=4).tolist()
    for name, count in zip(arrays.class_names, left, strict=True):
        assert any("no training image is left of" in n and name in n for n in notes) == (count == 0)
        assert any("with one training image:" in n and name in n for n in notes) == (count == 1)
    assert 1 in left and (0 in left) == (most == 1)


def test_unbalanced_classes_and_those_without_test_images(tmp_path):
    fill(tmp_path / "train", ant=60, bee=3)
    fill(tmp_path / "test", ant=3)
    unvalidated, untested, unbalanced = notes_on(tmp_path)
    assert unvalidated.startswith("classes without a validation image") and "bee" in unvalidated
    assert "training images of ant" in unbalanced and "of bee; see the accuracy" in unbalanced
    assert "--balance" in unbalanced
    assert untested == "classes without a test image, so of unknown accuracy: bee"


def test_classes_without_a_validation_image_are_named(tmp_path):
    fill(tmp_path / "train", ant=30, bee=30, cow=4)
    fill(tmp_path / "test", ant=5, bee=5, cow=5)
    (note,) = notes_on(tmp_path)
    assert note.startswith("classes without a validation image, ") and note.endswith(": cow")


@pytest.mark.parametrize("with_validation", [False, True])
def test_the_same_image_in_train_and_test_is_counted(tmp_path, with_validation):
    fill(tmp_path / "train", ant=20, bee=20)
    fill(tmp_path / "test", ant=5, bee=5)
    if with_validation:
        fill(tmp_path / "val", ant=5, bee=5)
        save(tmp_path / "train/ant/other.png", 7)
        save(tmp_path / "val/bee/other name.png", 7)  # the label does not matter
    for n in range(30):  # all of them, so that some are in train whatever is held out
        save(tmp_path / f"train/bee/copy{n}.png", 9)
    save(tmp_path / "test/ant/x.png", 9)
    save(tmp_path / "test/bee/y.png", 9)
    for _ in range(2):  # decoded, then from the cache
        notes = notes_on(tmp_path)
        assert any(
            note.startswith("2 of 12 test images are also training images") for note in notes
        )
        if with_validation:
            assert any(note.startswith("1 of 11 validation images are also") for note in notes)


def test_copies_across_a_held_out_part_are_counted(tmp_path):
    for n in range(20):
        for name in ("ant", "bee"):
            save(tmp_path / f"train/{name}/{n}.png", 1)
    notes = notes_on(tmp_path)
    assert any(note.startswith("8 of 8 test images") for note in notes)


def test_a_single_test_image_is_refused_unless_it_stays_unseen(tmp_path):
    fill(tmp_path / "train", ant=20, bee=20)
    fill(tmp_path / "test", ant=1)
    config = TrainingConfig("folder", str(tmp_path), image_size=8)
    with pytest.raises(UserError, match=r"1 test image is too few .*--test=False"):
        datasets.load(config)
    assert len(datasets.load(dataclasses.replace(config, test=False)).test) == 1
