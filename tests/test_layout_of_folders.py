"""Folders as people keep them: names of parts, Unicode, thumbnails and masks, no train/."""

import json
import os
import shutil
import unicodedata

import numpy as np
import pytest
import tiny
from PIL import Image

from common.data import datasets
from common.data.folder import load_folder
from common.errors import UserError

COUNT = 12  # images of a class in a part


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("RANK", raising=False)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, 8, 8, 3)).save(path)
    return path


def fill(folder, seed=0, names=("ant", "bee"), count=COUNT):
    for k, name in enumerate(names):
        for n in range(count):
            save(folder / name / f"{n:02}.png", 1000 * seed + 100 * k + n)
    return folder


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val", "VALIDATION", "dev"])
def test_validation_images_of_their_own_take_the_place_of_the_held_out_ones(tmp_path, capsys, name):
    fill(tmp_path / "train", 0)
    fill(tmp_path / name, 1)
    fill(tmp_path / "test", 2)
    arrays = load_folder(tmp_path, 8)
    assert f"{name}/ holds the validation images\n" in capsys.readouterr().err
    data = datasets.split_data(arrays)
    sizes = [len(split) for split in (data.train, data.validation, data.test)]
    assert sizes == [2 * COUNT] * 3
    first = noise(1000, 8, 8, 3).transpose(2, 0, 1)
    np.testing.assert_array_equal(data.validation.images(slice(0, 1))[0], first)
    assert data.validation.labels.tolist() == [0] * COUNT + [1] * COUNT
    shutil.rmtree(tmp_path / "test")
    data = datasets.split_data(load_folder(tmp_path, 8))
    assert len(data.train) + len(data.test) == len(data.validation) == 2 * COUNT


@pytest.mark.parametrize(
    "train, test", [("Train", "Test"), ("TRAIN", "TEST"), ("training", "Testing")]
)
def test_names_of_parts_in_other_letters(tmp_path, capsys, train, test):
    fill(tmp_path / train, 0)
    fill(tmp_path / test, 1)
    arrays = load_folder(tmp_path, 8)
    assert len(arrays.train_images) == len(arrays.test_images) == 2 * COUNT
    said = capsys.readouterr().err
    assert f"{train}/ holds the train images" in said and f"{test}/ holds the test images" in said


@pytest.mark.parametrize("pair", [("val", "valid"), ("test", "Test"), ("train", "TRAIN")])
def test_two_folders_for_one_part_are_refused(tmp_path, pair):
    for name in {"train", *pair}:
        fill(tmp_path / name)
    with pytest.raises(UserError, match=r"several folders of \w+ images: .*; keep one"):
        load_folder(tmp_path, 8)


def test_other_folders_beside_train_are_named(tmp_path, capsys):
    fill(tmp_path / "train")
    fill(tmp_path / "holdout")
    save(tmp_path / "train/loose.png")
    save(tmp_path / "stray.jpg")
    (tmp_path / "train/readme.txt").touch()
    load_folder(tmp_path, 8)
    assert capsys.readouterr().err.splitlines() == [
        "left out beside train/: holdout/",
        "left out 2 images (outside class folders): stray.jpg, train/loose.png",
    ]


def test_class_folders_without_train(tmp_path, capsys):
    fill(tmp_path / "a/train")
    whole = load_folder(tmp_path / "a", 8)
    assert capsys.readouterr().err == ""
    arrays = load_folder(tmp_path / "a/train", 8)
    assert "so its folders are the classes: ant, bee" in capsys.readouterr().err
    assert arrays.fingerprint == whole.fingerprint and arrays.class_names == whole.class_names
    np.testing.assert_array_equal(arrays.train_images, whole.train_images)
    fill(tmp_path / "a/test", 1)
    load_folder(tmp_path / "a/train", 8)
    assert (
        f"not used: test/ beside train/; --data_dir {tmp_path}/a takes" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "names", [("seg_train", "seg_test"), ("training_set", "test_set"), ("images-Train", "val 2017")]
)
def test_parts_under_longer_names_are_no_classes(tmp_path, names):
    for name in names:
        fill(tmp_path / name / name)
    with pytest.raises(UserError, match=f"lacks train/; .*{names[0]} as train/") as error:
        load_folder(tmp_path, 8)
    assert f"{names[1]} as " in error.value.message


def test_one_class_may_be_called_like_a_part(tmp_path):
    fill(tmp_path, names=("bus", "train station"))
    assert load_folder(tmp_path, 8).class_names == ("bus", "train station")


def test_files_of_systems_are_no_images_and_a_linked_folder_is_named(tmp_path):
    fill(tmp_path / "train")
    for name in ("ehthumbs.db", "Icon\r", "00.png:Zone.Identifier", "Desktop.ini"):
        (tmp_path / "train/ant" / name).write_text("no image")
    assert len(load_folder(tmp_path, 8).train_images) == 2 * COUNT
    os.symlink(tmp_path / "train/bee", tmp_path / "train/ant/more")
    with pytest.raises(UserError, match=r"train/ant/more \(a link to a folder\)"):
        load_folder(tmp_path, 8)


def test_the_fingerprint_of_a_known_layout_stays(tmp_path):
    """The value that the version without other layouts gave."""
    fill(tmp_path / "train", 0, count=2)
    fill(tmp_path / "test", 1, count=1)
    expected = "024f98db2cf14212928dc4758f2d53799e59ebaf14531d346def85ec0a24268f"
    assert load_folder(tmp_path, 8).fingerprint == expected


def test_one_class_name_in_two_unicode_forms(tmp_path, capsys):
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    fill(tmp_path / "train", 0, (nfd, "tea"))
    fill(tmp_path / "test", 1, (nfc, "tea"))
    arrays = load_folder(tmp_path, 8)
    assert arrays.class_names == (nfc, "tea")
    assert arrays.test_labels.tolist() == [0] * COUNT + [1] * COUNT
    assert capsys.readouterr().err == ""
    fill(tmp_path / "train", 3, (nfc,))
    arrays = load_folder(tmp_path, 8)
    assert np.bincount(arrays.train_labels).tolist() == [2 * COUNT, COUNT]
    assert "one class each, in two Unicode forms of its name: café" in capsys.readouterr().err


def test_class_names_that_are_no_text(tmp_path, capsys):
    for part in ("train", "test"):
        fill(tmp_path / part, 0, ("latin", "line", "tea"))
        folder = os.fsencode(tmp_path / part)
        os.rename(folder + b"/latin", folder + b"/caf\xe9")
        os.rename(folder + b"/line", folder + b"/two\nlines\x1b")
    arrays = load_folder(tmp_path, 8)
    assert arrays.class_names == ("caf\\xe9", "tea", "two\\nlines\\x1b")
    for name in arrays.class_names:
        assert json.loads(json.dumps(name).encode()) == name and name.encode().isascii()
    assert r"shown with escapes: caf\xe9, two\nlines\x1b" in capsys.readouterr().err
    fill(tmp_path / "train", 1, ("caf\\xe9",))
    with pytest.raises(UserError, match=r"two classes that are shown as caf\\xe9; rename one"):
        load_folder(tmp_path, 8)


def test_thumbnails_masks_and_previews_are_left_out_and_counted(tmp_path, capsys):
    fill(tmp_path / "train", count=2)
    plain = load_folder(tmp_path, 8).fingerprint
    capsys.readouterr()
    names = [
        "__MACOSX/train/ant/00.png",
        "train/@eaDir/x.png",
        "train/__MACOSX/ant/._00.png",
        "train/.thumbnails/00.png",
        "train/ant/@eaDir/00.png/SYNOPHOTO_THUMB_S.png",
        "train/ant/.thumbnails/00.png",
        "train/ant/masks/00.png",
        "train/ant/00_mask.png",
        "train/ant/00-thumb.jpg",
        "train/ant/00_mask_1.png",
        "train/ant/thumb_00.jpg",
    ]
    for name in names:
        save(tmp_path / name)
    (tmp_path / "train/bee/00.CR2").write_text("a RAW file beside its picture")
    (tmp_path / "train/bee/@eaDir").mkdir()
    (tmp_path / "train/bee/@eaDir/index.db").touch()
    arrays = load_folder(tmp_path, 8)
    assert len(arrays.train_images) == 4 and arrays.fingerprint == plain
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"left out {len(names) + 1} images (thumb" in said


def test_names_that_only_look_like_masks_stay(tmp_path, capsys):
    fill(tmp_path / "train", count=2, names=("mask", "no mask"))
    save(tmp_path / "train/mask/face_mask.png")  # no face.png
    save(tmp_path / "train/mask/mask_1.png")
    assert len(load_folder(tmp_path, 8).train_images) == 6
    assert capsys.readouterr().err == ""


def test_the_preview_in_a_raw_file_is_no_image(tmp_path):
    fill(tmp_path / "train")
    path = save(tmp_path / "train/ant/a.tif")
    path.rename(path.with_suffix(".NEF"))
    with pytest.raises(UserError, match=r"a.NEF \(a RAW file, .*: convert it\)"):
        load_folder(tmp_path, 8)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("ae", ()),
        ("joint", ()),
        ("supcon", ()),
        ("supcon", ("--supervised=False",)),
        ("supcon", ("--supervised=False", "--encoder=airbench", "--optimizer=muon")),
    ],
)
def test_every_method_trains_beside_unlabelled_images(tmp_path, method, words):
    fill(tmp_path / "pets/train", 0)
    fill(tmp_path / "pets/test", 1)
    fill(tmp_path / "pets/unlabelled", 2, names=(".",), count=3 * COUNT)
    data = ("--dataset=folder", f"--data_dir={tmp_path / 'pets'}", "--image_size=8", "--width=4")
    tiny.run(method, tmp_path / "run", *data, "--batch_size=8", "--log_every=1", *words)
    steps = [row for row in tiny.rows_of(tmp_path / "run") if "train/loss" in row]
    without_labels = method == "ae" or "--supervised=False" in words
    labeled = 2 * COUNT - 2  # two of them are held out
    images = labeled + (3 * COUNT if without_labels else 0)
    assert len(steps) == 2 * (images // 8)  # of two epochs


@pytest.mark.parametrize("name", ["unlabelled", "Unlabeled"])
def test_images_without_labels_join_pretrain_alone(tmp_path, capsys, name):
    fill(tmp_path / "train", 0)
    fill(tmp_path / "test", 1)
    plain = datasets.split_data(load_folder(tmp_path, 8))
    save(tmp_path / name / "x.png", 7)
    save(tmp_path / name / "deep/down/y.png", 8)
    capsys.readouterr()
    arrays = load_folder(tmp_path, 8)
    assert capsys.readouterr().err == f"{name}/ holds the unlabelled images\n"
    data = datasets.split_data(arrays)
    for part in ("train", "validation", "test"):
        old, new = getattr(plain, part), getattr(data, part)
        assert old.rows.equal(new.rows) and old.labels.equal(new.labels)
    more = data.pretrain.rows[len(data.train) :]
    assert data.pretrain.rows[: len(data.train)].equal(data.train.rows)
    assert sorted(more.tolist()) == [2 * COUNT, 2 * COUNT + 1]
    assert data.pretrain.labels[len(data.train) :].tolist() == [-1, -1]
    pictures = {bytes(data.pretrain.source[row].numpy()) for row in more}
    assert pictures == {noise(n, 8, 8, 3).transpose(2, 0, 1).tobytes() for n in (7, 8)}
    assert arrays.class_names == ("ant", "bee")
    limited = datasets.split_data(arrays, limit_train=len(data.train) + 1, labels_per_class=3)
    assert len(limited.train) == 6 and (limited.pretrain.labels < 0).sum() == 1
    shutil.rmtree(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="has no images; fill it or remove it"):
        load_folder(tmp_path, 8)
