"""Labels in a CSV file."""

import numpy as np
import pytest
from PIL import Image

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
    ("path,label\nno.png,a\n00.png,a\n", "names 1 files that are not there: no.png; paths are"),
    ("path,label\n00.png,a\n./00.png,b\n", "names images twice: 00.png"),
    ("path,label,Label\n00.png,a,b\n", "has two columns label; rename one"),
    ("path,label\n00.png,a\0\n\xff", "labels.csv"),
])  # fmt: skip
def test_bad_files_are_refused_in_one_line(pets, text, message):
    file = write(pets, text)
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
