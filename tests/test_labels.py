"""Labels in a CSV file."""

import dataclasses
import re

import numpy as np
import pytest
import tiny
from PIL import Image

import compare
from common.config import parse
from common.data import datasets
from common.data.folder import load_folder
from common.errors import UserError


@pytest.fixture
def pets(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "pets").mkdir()
    for n in range(40):
        Image.fromarray(np.full((8, 8), n, np.uint8)).save(tmp_path / f"pets/{n:02}.png")
    return tmp_path / "pets"


def write(pets, text):
    (pets / "labels.csv").write_text(text, encoding="utf-8")
    return str(pets / "labels.csv")


def table(group=False):
    head = "path,label,group\n" if group else "path,label\n"
    rows = (f"{n:02}.png,{['cat', 'dog'][n % 2]}" for n in range(40))
    return head + "\n".join(f"{row},g{n // 4}" if group else row for n, row in enumerate(rows))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_labels_are_those_of_the_file(pets, mark):
    arrays = load_folder(pets, 8, labels=write(pets, mark + table()))
    assert arrays.class_names == ("cat", "dog")
    pixels = arrays.train_images[:, 0, 0, 0]
    np.testing.assert_array_equal(arrays.train_labels, pixels % 2)
    assert sorted(pixels) == list(range(40)) and arrays.groups is None


@pytest.mark.parametrize("mark", [",", ";", "\t", ", "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_as_spreadsheets_write_them(pets, mark, end):
    text = table(group=True).replace("path,label", "Path,LABEL").replace(",", mark)
    file = pets / "labels.csv"
    file.write_bytes(("\ufeff" + text.replace("\n", end)).encode())
    arrays = load_folder(pets, 8, labels=str(file))
    np.testing.assert_array_equal(arrays.train_labels, arrays.train_images[:, 0, 0, 0] % 2)
    assert len(np.unique(arrays.groups)) == 10


def test_paths_may_be_absolute_and_columns_that_are_not_used_are_named(pets, tmp_path, capsys):
    rows = (f"{n},{pets}/{n:02}.png,{n % 2},test" for n in range(40))
    file = write(pets, "id,path,label,Split\n" + "\n".join(rows))
    arrays = load_folder(tmp_path, 8, labels=file)
    assert arrays.class_names == ("0", "1") and len(arrays.train_images) == 40
    assert f"columns of {file} that are not used: id, split\n" in capsys.readouterr().err


def test_groups_are_never_split(pets):
    arrays = load_folder(pets, 8, labels=write(pets, table(group=True)))
    np.testing.assert_array_equal(
        arrays.groups, np.unique([f"g{n // 4}" for n in arrays.train_images[:, 0, 0, 0]],
                                 return_inverse=True)[1])  # fmt: skip
    data = datasets.split_data(arrays)
    parts = [
        {int(n) // 4 for n in split.images(slice(None))[:, 0, 0, 0]}
        for split in (data.train, data.validation, data.test)
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 10
    assert all(parts) and len(parts[2]) == 2 and len(parts[1]) == 1


def test_groups_decide_the_splits_so_they_are_part_of_the_fingerprint(pets):
    texts = [
        table(),
        table(group=True),
        re.sub(r",g(\d)", r",patient \1", table(group=True)),  # other names, the same groups
        table(group=True).replace(",g9", ",g8"),
    ]
    plain, first, renamed, other = (load_folder(pets, 8, labels=write(pets, t)) for t in texts)
    assert first.fingerprint == renamed.fingerprint
    assert len({plain.fingerprint, first.fingerprint, other.fingerprint}) == 3


@pytest.mark.parametrize("sizes", [[500] + [5] * 100, [300] + [5] * 140, [400, 300, 200, 100]])
def test_a_large_group_does_not_take_over_a_part(sizes):
    for seed in range(10):
        groups = np.repeat(np.arange(len(sizes)), sizes)
        labels = np.random.RandomState(seed).randint(0, 2, len(groups))
        order = datasets.stratified_order(labels, seed)
        count = len(groups) // 5
        held, left = datasets.hold_out(order, count, groups)
        assert not set(groups[held]) & set(groups[left]) and len(held) + len(left) == len(groups)
        assert count / 2 <= len(held) <= 1.5 * count


def test_where_all_groups_are_large_the_smallest_is_held_out():
    held, left = datasets.hold_out(np.arange(100), 5, np.repeat([0, 1, 2], [40, 25, 35]))
    assert (len(held), len(left)) == (25, 75)


@pytest.mark.parametrize("sizes", [[1000, 5, 5, 5, 5], [1000, 700, 4, 4], [3, 900, 3]])
def test_a_group_that_is_nearly_everything_stays_in_training(pets, sizes):
    arrays = load_folder(pets, 8, labels=write(pets, table()))
    count = sum(sizes)
    arrays = dataclasses.replace(
        arrays,
        train_images=np.zeros((count, 1, 8, 8), np.uint8),
        train_labels=np.arange(count) % 2,
        groups=np.repeat(np.arange(len(sizes)), sizes),
    )
    data = datasets.split_data(arrays)
    assert len(data.train) >= max(sizes) and len(data.validation) and len(data.test)


def test_the_sizes_of_parts_made_of_groups_are_said(pets):
    arrays = load_folder(pets, 8, labels=write(pets, table(group=True)))
    notes = datasets.notes_on_splits(arrays, datasets.split_data(arrays))
    assert "groups stay whole: 28 train, 4 validation, 8 test images" in notes


def test_one_label_in_two_unicode_forms_is_one_class(pets):
    forms = ("caf\u00e9", "cafe\u0301", "bar", "bar")
    rows = (f"{n:02}.png,{forms[n % 4]},{forms[n % 2]}" for n in range(40))
    arrays = load_folder(pets, 8, labels=write(pets, "path,label,group\n" + "\n".join(rows)))
    assert arrays.class_names == ("bar", "caf\u00e9")
    assert np.bincount(arrays.train_labels).tolist() == [20, 20]
    assert len(np.unique(arrays.groups)) == 1


def test_images_and_their_table_may_move(pets, tmp_path):
    write(pets, table())
    words = ("--dataset=folder", "--image_size=8", "--limit_train=20", "--batch_size=8")
    places = (f"--data_dir={pets}", f"--labels={pets}/labels.csv")
    tiny.run("joint", tmp_path / "run", *words, *places)
    expected = tiny.rows_of(tmp_path / "run")
    moved = pets.rename(tmp_path / "moved")
    places = (f"--data_dir={moved}", f"--labels={moved}/labels.csv")
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        tiny.resume("joint", tmp_path / "run", places[0])
    tiny.resume("joint", tmp_path / "run", *places)
    assert tiny.rows_of(tmp_path / "run") == expected
    found = compare.main(
        parse(compare.Config, [str(tmp_path / "run"), f"--out={tmp_path}/out", *places,
                               "--tracking=disabled", "--label_draws=1"]))  # fmt: skip
    assert found["warnings"] == []


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_groups_to_hold_some_out(pets, count):
    rows = (f"{n:02}.png,{n % 2},g{n % count}" for n in range(40))
    arrays = load_folder(pets, 8, labels=write(pets, "path,label,group\n" + "\n".join(rows)))
    with pytest.raises(UserError, match=f"40 images in {count} groups are too few to hold"):
        datasets.split_data(arrays)


@pytest.mark.parametrize("text, message", [
    ("", "lacks the column path and label; it is empty"),
    ("path,class\n00.png,a", "lacks the column label; it has path, class"),
    ("path,label\n", "has no rows"),
    ("path,label\n00.png,\n", "row 2 has no label"),
    ("path,label\n00.png,a\n,a\n", "row 3 has no path"),
    ("path,label,group\n00.png,a,\n", "row 2 has no group"),
    ("path,label\n00.png,a,\n01.png,a, big\n", "row 3 has more cells than the 2 columns; put"),
    ("path,label\nno.png,a\n00.png,a\n", "names 1 files that are not there: no.png; paths are"),
    ("path,label\n00.png,a\n./00.png,b\n", "names images twice: 00.png"),
    ("path,label\n00.png,a\n{pets}/00.png,b\n", "names images twice: "),
    ("path,label\n00.png,a\\u2028b\n01.png,a\u2028b\n", "has two labels that are shown as"),
    ("path,label,Label\n00.png,a,b\n", "has two columns label; rename one"),
    ("path,label\n00.png,a\0\n\xff", "labels.csv"),
])  # fmt: skip
def test_bad_files_are_refused_in_one_line(pets, text, message):
    file = write(pets, text.replace("{pets}", str(pets)))
    if "\xff" in text:
        (pets / "labels.csv").write_bytes(b"path,label\n\xff\xfe")
    with pytest.raises(UserError, match=message) as error:
        load_folder(pets, 8, labels=file)
    assert "\n" not in error.value.message


def test_labels_need_a_folder_and_a_file(pets):
    with pytest.raises(UserError, match="cannot be read"):
        load_folder(pets, 8, labels=str(pets / "none.csv"))
    with pytest.raises(UserError, match="are for --dataset folder"):
        datasets.read("digits", "data", 8, labels="x.csv")
