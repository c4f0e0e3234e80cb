import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data import decoding, folder
from common.data.folder import load_folder
from common.errors import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, image, **options):
    """Write an array (H,W,3) or (H,W) or a Pillow image; make the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


def make_data(data_dir, per_class=2, size=8):
    """Two classes of colored noise in train/ and test/, all images different."""
    for number, name in enumerate(("cat", "dog")):
        for i in range(per_class):
            seed = 100 * number + i
            save(data_dir / "train" / name / f"{i}.png", noise(seed, size, size, 3))
        save(data_dir / "test" / name / "0.png", noise(50 + number, size, size, 3))
    return data_dir


def load_one(data_dir, size=8):
    """The only image of `data_dir` as (S,S,C)."""
    images = load_folder(data_dir, size).train_images
    assert len(images) == 1
    return images[0].transpose(1, 2, 0)


def forbid_decoding(monkeypatch):
    def decode(*_, **__):
        raise AssertionError("decoded again")

    monkeypatch.setattr(folder, "decode_all", decode)


def same(first, second):
    np.testing.assert_array_equal(first.train_images, second.train_images)
    np.testing.assert_array_equal(first.test_images, second.test_images)
    np.testing.assert_array_equal(first.train_labels, second.train_labels)
    assert first.fingerprint == second.fingerprint
    return True


# What is loaded


def test_arrays_labels_and_names(data_dir):
    images = load_folder(make_data(data_dir), 8)
    assert images.train_images.shape == (4, 3, 8, 8) and images.test_images.shape == (2, 3, 8, 8)
    assert images.train_images.dtype == np.uint8 and images.train_labels.dtype == np.int64
    assert images.train_labels.tolist() == [0, 0, 1, 1] and images.test_labels.tolist() == [0, 1]
    assert images.class_names == ("cat", "dog")
    for image, seed in zip(images.train_images, (0, 1, 100, 101), strict=True):
        np.testing.assert_array_equal(image, noise(seed, 8, 8, 3).transpose(2, 0, 1))
    np.testing.assert_array_equal(images.test_images[1], noise(51, 8, 8, 3).transpose(2, 0, 1))
    assert isinstance(images.train_images, np.memmap) and not images.train_images.flags.writeable


def test_without_test_folder_and_with_one_class(data_dir):
    save(data_dir / "train/only/x.png", noise(0, 8, 8, 3))
    images = load_folder(data_dir, 8)
    assert images.test_images is None and images.test_labels is None
    assert images.class_names == ("only",)


def test_a_class_may_lack_test_images(data_dir):
    make_data(data_dir)
    (data_dir / "test/cat/0.png").unlink()
    assert load_folder(data_dir, 8).test_labels.tolist() == [1]
    (data_dir / "test/cat").rmdir()
    assert load_folder(data_dir, 8).test_labels.tolist() == [1]


def test_names_depth_order_and_ignored_files(data_dir, monkeypatch):
    for seed, name in enumerate(("a/2.png", "a/sub dir/deep/1.png", "a b/3.png", "猫 ß/ö ä.png")):
        save(data_dir / "train" / name, noise(seed, 8, 8, 3))
    for name in (
        "a/.hidden.png",
        "a/Thumbs.db",
        "a/desktop.ini",
        ".git/x",
        "a/.x/y.png",
        "read.me",
    ):
        path = data_dir / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not an image")
    monkeypatch.chdir(data_dir)  # a relative path leads to the same
    images = load_folder(Path("."), 8)
    assert images.class_names == ("a", "a b", "猫 ß")
    assert images.train_labels.tolist() == [0, 0, 1, 2]
    for image, seed in zip(images.train_images, range(4), strict=True):
        np.testing.assert_array_equal(image, noise(seed, 8, 8, 3).transpose(2, 0, 1))


def test_class_folder_may_be_a_link(data_dir, tmp_path):
    save(tmp_path / "elsewhere/x.png", noise(0, 8, 8, 3))
    (data_dir / "train").mkdir(parents=True)
    (data_dir / "train/cat").symlink_to(tmp_path / "elsewhere")
    np.testing.assert_array_equal(load_one(data_dir), noise(0, 8, 8, 3))


# What an image becomes


def test_wide_image_is_cut_at_its_centre(data_dir):
    thirds = np.zeros((32, 96, 3), np.uint8)
    thirds[:, :32], thirds[:, 32:64], thirds[:, 64:] = RED, GREEN, BLUE
    save(data_dir / "train/c/x.png", thirds)
    assert (load_one(data_dir, 32) == GREEN).all()  # cut only
    for size in (16, 64):  # as if the whole image had been resized first
        resized = Image.fromarray(thirds).resize((3 * size, size), Image.Resampling.BICUBIC)
        image = load_one(data_dir, size)
        np.testing.assert_array_equal(image, np.asarray(resized)[:, size : 2 * size])
        assert (image[:, 4:-4] == GREEN).all()
    save(data_dir / "train/c/x.png", thirds.transpose(1, 0, 2))
    assert (load_one(data_dir, 32) == GREEN).all()
    assert (load_one(data_dir, 16)[4:-4] == GREEN).all()


def test_image_with_right_short_side_keeps_its_pixels(data_dir):
    pixels = noise(0, 11, 8, 3)  # an odd remainder: no half pixels
    save(data_dir / "train/c/x.png", pixels)
    np.testing.assert_array_equal(load_one(data_dir), pixels[1:9])


def test_reduction_is_antialiased(data_dir):
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    save(data_dir / "train/c/x.png", board)
    image = load_one(data_dir, 32)
    assert image.min() >= 126 and image.max() <= 129  # gray, where single pixels are 0 or 255


def test_large_jpeg_equals_its_full_decoding(data_dir):
    smooth = Image.fromarray(noise(0, 12, 16, 3)).resize((1003, 751), Image.Resampling.BICUBIC)
    path = save(data_dir / "train/c/x.jpg", smooth, quality=95)
    with Image.open(path) as full:
        box = (126, 0, 877, 751)
        expected = np.asarray(full.resize((32, 32), Image.Resampling.BICUBIC, box)).astype(int)
    assert np.abs(load_one(data_dir, 32) - expected).mean() < 1


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(data_dir, orientation, suffix):
    stored = noise(0, 8, 8, 3)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    save(data_dir / f"train/c/x.{suffix}", stored, exif=exif, **options)
    np.testing.assert_array_equal(load_one(data_dir), upright[orientation])


def test_damaged_exif_does_not_cost_the_image(data_dir):
    save(data_dir / "train/c/x.png", noise(0, 8, 8, 3), exif=b"Exif\0\0garbage!")
    np.testing.assert_array_equal(load_one(data_dir), noise(0, 8, 8, 3))


def test_transparency_is_laid_on_white(data_dir):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :, 0] = 255
    rgba[:4, :, 3], rgba[4, :, 3] = 255, 51  # opaque, a fifth, nothing of red
    save(data_dir / "train/c/x.png", rgba)
    image = load_one(data_dir)
    assert (image[:4] == RED).all() and (image[4] == (255, 204, 204)).all()
    assert (image[5:] == WHITE).all()

    palette = Image.fromarray(noise(0, 8, 8) // 128)  # indices 0 and 1
    palette.putpalette([*RED, *BLUE])
    save(data_dir / "train/c/x.png", palette, transparency=0)
    expected = np.where((noise(0, 8, 8) // 128 == 0)[..., None], WHITE, BLUE)
    np.testing.assert_array_equal(load_one(data_dir), expected)

    gray_alpha = np.stack([np.zeros((8, 8)), np.eye(8) * 255], -1).astype(np.uint8)
    save(data_dir / "train/c/x.png", Image.fromarray(gray_alpha, "LA"))
    np.testing.assert_array_equal(load_one(data_dir)[..., 0], 255 - np.eye(8) * 255)

    black_is_clear = Image.fromarray((np.eye(8) * 100).astype(np.uint8))
    save(data_dir / "train/c/x.png", black_is_clear, transparency=0)
    np.testing.assert_array_equal(load_one(data_dir)[..., 0], np.where(np.eye(8), 100, 255))


def test_deep_gray_is_scaled_not_clipped(data_dir):
    steps = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040  # 0..65520
    expected = np.rint(steps / 257)
    for suffix in ("png", "tiff", "pgm"):  # I;16, I;16, I
        path = save(data_dir / f"train/c/x.{suffix}", steps)
        np.testing.assert_array_equal(load_one(data_dir)[..., 0], expected)
        path.unlink()
    path = save(data_dir / "train/c/x.tiff", (steps / 65520).astype(np.float32))  # F
    np.testing.assert_array_equal(load_one(data_dir)[..., 0], np.rint(steps / 65520 * 255))
    save(path, steps.astype(np.float32))
    with pytest.raises(UserError, match=r"x.tiff \(gray values outside 0..1\)"):
        load_folder(data_dir, 8)


def test_one_bit_cmyk_palette_animation_and_webp(data_dir):
    bits = noise(0, 8, 8) > 127
    path = save(data_dir / "train/c/x.png", Image.fromarray(bits))  # mode 1
    np.testing.assert_array_equal(load_one(data_dir)[..., 0], bits * 255)
    path.unlink()

    exif = Image.Exif()
    exif[0x0112] = 6
    halves = np.zeros((16, 16, 3), np.uint8)
    halves[:8], halves[8:] = RED, BLUE
    cmyk = Image.fromarray(halves).convert("CMYK")
    path = save(data_dir / "train/c/x.jpg", cmyk, quality=100, subsampling=0, exif=exif)
    image = load_one(data_dir, 16).astype(int)
    assert np.abs(image[:, 8:] - RED).max() < 8 and np.abs(image[:, :8] - BLUE).max() < 8
    path.unlink()

    frames = [Image.new("P", (8, 8), index) for index in (0, 1)]
    for frame in frames:
        frame.putpalette([*RED, *BLUE])
    path = save(data_dir / "train/c/x.gif", frames[0], save_all=True, append_images=frames[1:])
    with Image.open(path) as animation:
        assert animation.n_frames == 2
    assert (load_one(data_dir) == RED).all()
    path.unlink()

    save(data_dir / "train/c/x.webp", noise(0, 8, 8, 3), lossless=True)
    np.testing.assert_array_equal(load_one(data_dir), noise(0, 8, 8, 3))


def test_one_channel_only_if_all_images_are_gray(data_dir):
    gray = noise(0, 8, 8)
    save(data_dir / "train/c/by_mode.png", gray)
    save(data_dir / "train/c/by_pixels.png", np.stack([gray] * 3, -1))
    save(data_dir / "train/c/jpeg.jpg", gray)
    save(data_dir / "test/c/x.png", gray)
    images = load_folder(data_dir, 8)
    assert images.train_images.shape == (3, 1, 8, 8) and images.test_images.shape == (1, 1, 8, 8)
    np.testing.assert_array_equal(images.train_images[1, 0], gray)
    save(data_dir / "test/c/color.png", noise(0, 8, 8, 3))
    images = load_folder(data_dir, 8)
    assert images.train_images.shape == (3, 3, 8, 8) and images.test_images.shape == (2, 3, 8, 8)
    np.testing.assert_array_equal(images.train_images[1], [gray] * 3)


def test_one_colored_image_among_many_is_enough(data_dir):
    for number in range(70):
        save(data_dir / f"train/c/{number:02}.png", noise(number, 4, 4))
    assert load_folder(data_dir, 4).train_images.shape == (70, 1, 4, 4)
    save(data_dir / "train/c/00.png", noise(0, 4, 4, 3))
    assert load_folder(data_dir, 4).train_images.shape == (70, 3, 4, 4)


# The cache


def test_second_time_nothing_is_decoded(data_dir, monkeypatch):
    first = load_folder(make_data(data_dir), 8)
    forbid_decoding(monkeypatch)
    assert same(first, load_folder(data_dir, 8))


def _touch(data_dir):
    os.utime(data_dir / "train/cat/0.png", ns=(1, 1))


def _replace(data_dir):
    save(data_dir / "train/cat/0.png", noise(7, 8, 8, 3))


def _add(data_dir):
    save(data_dir / "train/cat/9.png", noise(9, 8, 8, 3))


def _rename(data_dir):
    (data_dir / "train/cat/0.png").rename(data_dir / "train/cat/5.png")


def _remove(data_dir):
    (data_dir / "test/cat/0.png").unlink()


@pytest.mark.parametrize("change", [_touch, _replace, _add, _rename, _remove])
def test_rebuilt_after_a_change(data_dir, change):
    load_folder(make_data(data_dir), 8)
    load_folder(data_dir, 16)
    before = set((data_dir / ".cache").glob("images-8-*"))
    change(data_dir)
    images = load_folder(data_dir, 8)
    after = set((data_dir / ".cache").glob("images-8-*"))
    assert len(after) == 1 and not before & after  # the old one is gone
    assert len(list((data_dir / ".cache").glob("images-16-*"))) == 1  # another size stays
    shutil.rmtree(data_dir / ".cache")
    assert same(images, load_folder(data_dir, 8))


def test_rebuilt_for_another_decoder(data_dir, monkeypatch):
    load_folder(make_data(data_dir), 8)
    monkeypatch.setattr(folder, "DECODE_VERSION", folder.DECODE_VERSION + 1)
    forbid_decoding(monkeypatch)
    with pytest.raises(AssertionError, match="again"):
        load_folder(data_dir, 8)


@pytest.mark.parametrize("name, content", [
    ("images.npy", lambda data: data[:-1]),
    ("images.npy", lambda data: data[:50]),
    ("images.npy", lambda data: b""),
    ("images.npy", lambda data: data.replace(b"(6, 3", b"(5, 3")),
    ("images.npy", None),
    ("meta.json", lambda data: b""),
    ("meta.json", lambda data: data[:20]),
    ("meta.json", lambda data: b"[]"),
    ("meta.json", lambda data: b"{}"),
    ("meta.json", None),
])  # fmt: skip
def test_damaged_cache_is_rebuilt(data_dir, name, content):
    expected = load_folder(make_data(data_dir), 8)
    images, test_images = np.array(expected.train_images), np.array(expected.test_images)
    (entry,) = (data_dir / ".cache").glob("images-*-*")
    data = (entry / name).read_bytes()
    (entry / name).unlink()
    if content:
        (entry / name).write_bytes(content(data))
        assert content(data) != data
    again = load_folder(data_dir, 8)
    np.testing.assert_array_equal(again.train_images, images)
    np.testing.assert_array_equal(again.test_images, test_images)
    assert again.fingerprint == expected.fingerprint
    assert sorted(path.name for path in entry.iterdir()) == ["images.npy", "meta.json"]


def test_half_built_cache_is_cleared_away(data_dir, monkeypatch):
    make_data(data_dir)
    part = data_dir / f".cache/.images-8-{'0' * 20}.part"  # of a killed process
    part.mkdir(parents=True)
    folder.write_json(part / "meta.json", folder.MADE_BY)
    (part / ".images.123.part.npy").touch()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_folder(data_dir, 8)
    assert [path.name for path in (data_dir / ".cache").iterdir()] == ["images.lock"]
    load_folder(data_dir, 8)


def test_entries_of_the_version_before_are_cleared_away(data_dir):
    old = data_dir / f".cache/images-8-{'0' * 20}"
    old.mkdir(parents=True)
    facts = {"fingerprint": "0" * 64, "is_gray": False, "unreadable": {}}
    folder.write_json(old / "meta.json", facts)
    (old / "images.npy").touch()
    load_folder(make_data(data_dir), 8)
    assert not old.exists()


HEX = "0123456789abcdef0123"


@pytest.mark.parametrize("name", [
    "my-images-8-px/file",
    "images-8-px/file",
    f"images-8-{HEX}/file",  # looks like ours, and holds something else
    f"images-8-{HEX}/images.npy",  # even under the same names, unless it says who made it
    f".images-8-{HEX}.part/images.npy",
    f"images-8-{HEX}/meta.json/file",
    f"images-8-{HEX}",  # a file
    "images.lock/file",
    "images.lock",
])  # fmt: skip
def test_the_cache_leaves_alone_what_others_put_there(data_dir, name):
    path = make_data(data_dir) / ".cache" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    for _ in range(2):
        assert len(load_folder(data_dir, 8).train_images) == 4
        _replace(data_dir)
    assert path.read_text() == "precious"


def test_the_cache_keeps_a_file_that_was_put_into_its_own_entry(data_dir, tmp_path):
    load_folder(make_data(data_dir), 8)
    (entry,) = (data_dir / ".cache").glob("images-8-*")
    (entry / "notes.txt").write_text("precious")
    (entry / "images.npy").write_bytes(b"damaged")
    assert len(load_folder(data_dir, 8).train_images) == 4  # from the user's cache folder
    _replace(data_dir)
    load_folder(data_dir, 8)
    assert (entry / "notes.txt").read_text() == "precious"


def test_the_cache_follows_no_link(data_dir, tmp_path):
    load_folder(make_data(tmp_path / "other"), 8)
    (other,) = (tmp_path / "other/.cache").glob("images-8-*")
    (make_data(data_dir) / ".cache").mkdir()
    (data_dir / ".cache" / f"images-8-{HEX}").symlink_to(other)
    _add(data_dir)
    load_folder(data_dir, 8)
    assert sorted(path.name for path in other.iterdir()) == ["images.npy", "meta.json"]


def test_user_cache_where_the_folder_cannot_be_written(data_dir, tmp_path, monkeypatch):
    make_data(data_dir)
    (data_dir / ".cache").write_text("in the way")  # root, too, may make no folder here
    images = load_folder(data_dir, 8)
    assert len(list((tmp_path / "xdg/three-latent-spaces").glob("*/images-8-*/images.npy"))) == 1
    forbid_decoding(monkeypatch)
    assert same(images, load_folder(data_dir, 8))


def test_full_disk(data_dir, tmp_path, monkeypatch):
    make_data(data_dir)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**19)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"data/.cache: 1 MiB needed, 0 MiB free; .*xdg.*room"):
            load_folder(data_dir, 8)

    write = folder.write_json

    def full(path, value):
        if ".cache" in str(path):
            raise UserError("no space left on device")  # as the real one does
        write(path, value)

    monkeypatch.setattr(folder, "write_json", full)  # it fills up meanwhile: the other place
    load_folder(data_dir, 8)
    assert [path.name for path in (data_dir / ".cache").iterdir()] == ["images.lock"]


def test_two_at_once_decode_once(data_dir, monkeypatch):
    make_data(data_dir)
    decoded, results, decode = [], [], decoding._decode

    def slow(path, *words):
        decoded.append(path)
        time.sleep(0.02)
        return decode(path, *words)

    monkeypatch.setattr(decoding, "_decode", slow)
    threads = [
        threading.Thread(target=lambda: results.append(load_folder(data_dir, 8))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(*results) and len(decoded) == len(set(decoded)) == 6


def test_fingerprint_belongs_to_the_data(data_dir, tmp_path):
    first = load_folder(make_data(data_dir), 8).fingerprint
    assert len(first) == 64
    other = tmp_path / "other place"
    shutil.copytree(data_dir, other, ignore=lambda *_: {".cache"}, copy_function=shutil.copy)
    assert load_folder(other, 8).fingerprint == first
    assert load_folder(other, 16).fingerprint != first

    (other / "train/dog/0.png").rename(other / "train/cat/2.png")  # equal pixels, another label
    moved = load_folder(other, 8)
    assert moved.fingerprint != first
    (other / "train/cat/2.png").rename(other / "train/dog/0.png")
    (other / "train/dog").rename(other / "train/eel")
    (other / "test/dog").rename(other / "test/eel")
    assert load_folder(other, 8).fingerprint != first
    _replace(data_dir)
    assert load_folder(data_dir, 8).fingerprint != first


# What is broken


def test_no_bar_where_stderr_is_no_terminal(data_dir, capfd):
    load_folder(make_data(data_dir), 8)
    assert capfd.readouterr() == ("", "")


def test_layout_errors(data_dir):
    def refuses(text):
        with pytest.raises(UserError, match=text) as error:
            load_folder(data_dir, 8)
        assert "\n" not in str(error.value) and str(data_dir) in str(error.value)

    refuses("there is no folder .*; --data_dir must hold train/CLASS/")
    data_dir.write_text("a file")
    refuses("there is no folder")
    data_dir.unlink()
    data_dir.mkdir()
    refuses(r"lacks train/; wanted: train/CLASS/\* \(test/CLASS/\*\)$")
    save(data_dir / "cat/x.png", noise(0, 8, 8, 3))
    refuses("if cat are classes, move them into train/")
    (data_dir / "dog").mkdir()
    refuses("lacks train/; no images in dog; wanted")
    save(data_dir / "Test/dog/x.png", noise(0, 8, 8, 3))
    refuses("lacks train/, and has Test/; wanted: .*; if cat, dog are classes, move")
    shutil.rmtree(data_dir / "Test")
    save(data_dir / "dog/train/cat/x.png", noise(0, 8, 8, 3))
    refuses("lacks train/; it lies in dog: pass --data_dir .*/dog, or sort")
    save(data_dir / "train/x.png", noise(0, 8, 8, 3))
    refuses("train has no class folders; move the images into train/CLASS/")
    save(data_dir / "train/cat/x.png", noise(0, 8, 8, 3))
    for name in "abcde":
        (data_dir / "train" / name).mkdir()
    refuses("train has classes without images: a, b, c and 2 more; fill or remove")
    for name in "abcde":
        (data_dir / "train" / name).rmdir()
    (data_dir / "test").mkdir()
    refuses("test has no images in class folders")
    save(data_dir / "test/bird/x.png", noise(0, 8, 8, 3))
    refuses("test has classes that train/ lacks: bird")
    shutil.rmtree(data_dir / "test")
    (data_dir / "train/dog").symlink_to(data_dir / "nowhere")
    refuses("cannot list .*train/dog: No such file or directory; fix or remove it")


def break_files(data_dir):
    """Add files that no decoder can read, one of each kind; return their number."""
    cat = data_dir / "train/cat"
    (cat / "a_text.png").write_text("not an image")
    (cat / "b_empty.png").touch()
    whole = save(cat / "c_cut.jpg", noise(0, 64, 64, 3)).read_bytes()
    (cat / "c_cut.jpg").write_bytes(whole[: len(whole) // 2])
    (cat / "d_link.png").symlink_to(data_dir / "nowhere.png")
    (cat / "e_upwards").symlink_to(data_dir)
    os.mkfifo(cat / "f_pipe.png")
    png = bytearray(save(cat / "g_damaged.png", noise(0, 64, 64, 3)).read_bytes())
    png[1000:1400] = bytes(400)
    (cat / "g_damaged.png").write_bytes(png)
    return 7


def test_unreadable_files_are_named(data_dir, capsys, monkeypatch):
    number = break_files(make_data(data_dir))
    with pytest.raises(UserError) as error:
        load_folder(data_dir, 8)
    message = str(error.value)
    assert message.startswith(f"{number} of 13 files in {data_dir} cannot be read as images: ")
    assert "train/cat/a_text.png (no image format that Pillow knows), train/cat/b_empty" in message
    assert "train/cat/c_cut.jpg (image file is truncated" in message
    assert message.endswith(" and 4 more; delete them or pass --skip_unreadable=True")

    for name, reason in {"d_link.png": "broken link", "f_pipe.png": "no regular file"}.items():
        for path in (data_dir / "train/cat").glob("[a-z]_*"):
            if path.name != name:
                path.rename(data_dir / path.name)
        with pytest.raises(UserError, match=rf"1 of 7 .*: train/cat/{name} \({reason}\); delete"):
            load_folder(data_dir, 8)
        for path in data_dir.glob("[a-z]_*"):
            path.rename(data_dir / "train/cat" / path.name)
    assert capsys.readouterr().err == ""


def test_unreadable_files_are_skipped_on_demand(data_dir, capsys, monkeypatch):
    expected = load_folder(make_data(data_dir), 8)
    expected_images = np.array(expected.train_images)
    number = break_files(data_dir)
    for _ in range(2):  # decoded, then from the cache
        images = load_folder(data_dir, 8, skip_unreadable=True)
        np.testing.assert_array_equal(images.train_images, expected_images)
        assert images.train_labels.tolist() == [0, 0, 1, 1] and len(images.test_images) == 2
        assert images.fingerprint == expected.fingerprint
        text = f"skipped {number} of 13 files: no readable images\n"
        assert capsys.readouterr().err == text
        forbid_decoding(monkeypatch)
    with pytest.raises(UserError, match="7 of 13"):  # what was skipped is not forgotten
        load_folder(data_dir, 8)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)  # one process speaks for all
    load_folder(data_dir, 8, skip_unreadable=True)
    assert capsys.readouterr().err == ""


def test_permission_is_named_and_noticed_when_granted(data_dir, monkeypatch):
    make_data(data_dir)
    opened = Image.open

    def guarded(path):
        if path.endswith("dog/1.png"):
            raise PermissionError(13, "Permission denied", path)
        return opened(path)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", guarded)
        with pytest.raises(UserError, match=r"1 of 6 .*train/dog/1.png \(Permission denied\)"):
            load_folder(data_dir, 8)
    assert len(load_folder(data_dir, 8).train_images) == 4  # though size and time are the same


def test_class_of_which_nothing_is_left(data_dir):
    make_data(data_dir, per_class=1)
    (data_dir / "train/dog/0.png").write_text("no image")
    with pytest.raises(UserError, match="classes without a readable image: train/dog"):
        load_folder(data_dir, 8, skip_unreadable=True)
    for path in data_dir.glob("t*/*/0.png"):
        path.write_text("no image")
    with pytest.raises(UserError, match="image: test/cat, test/dog, train/cat and 1 more"):
        load_folder(data_dir, 8, skip_unreadable=True)


def test_huge_images(data_dir, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = save(data_dir / "train/c/x.png", noise(0, 12, 12, 3))  # Pillow warns from here on
    assert load_folder(data_dir, 8).train_images.shape == (1, 3, 8, 8) and not recwarn.list
    save(path, noise(0, 15, 15, 3))  # and refuses
    with pytest.raises(UserError, match=r"train/c/x.png \(Image size \(225 pixels\) exceeds"):
        load_folder(data_dir, 8)


def test_deep_gray_is_said_each_time_and_white_is_part_of_the_cache(data_dir, capsys):
    for number in range(3):
        steps = np.random.default_rng(number).integers(800, 2900, (8, 8)).astype(np.uint16)
        save(data_dir / f"train/c/{number}.png", steps)
    for _ in range(2):  # decoded, then from the cache
        assert len(np.unique(load_folder(data_dir, 8).train_images)) < 12
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "--white 4095 makes that value white" in said
    assert len(np.unique(load_folder(data_dir, 8, white=4095).train_images)) > 80
    assert capsys.readouterr().err == "3 16-bit images: the value 4,095 is white\n"
    save(data_dir / "train/c/f.tiff", np.full((8, 8), 300, np.float32))
    with pytest.raises(UserError, match=r"outside 0..1\); .*--white is the gray value"):
        load_folder(data_dir, 8)
