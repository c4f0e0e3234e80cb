import threading
import time

import joblib
import numpy as np
import pytest
from PIL import Image

from common.data import decoding
from common.data.decoding import decode_all, decode_chunk

LARGE = 2**30  # bytes, as if the files were worth several threads


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Ten images of 8×8, one of which is none."""
    (tmp_path / "images").mkdir()
    for n in range(10):
        Image.fromarray(noise(n, 8, 8, 3)).save(tmp_path / f"images/{n}.png")
    (tmp_path / "images/2.png").write_text("no image")
    return tmp_path / "images"


def test_paths_are_relative_to_the_root_or_whole(folder, monkeypatch):
    expected = noise(1, 8, 8, 3).transpose(2, 0, 1)
    monkeypatch.chdir(folder.parent)
    for path, root in (("1.png", folder), ("images/1.png", ""), (str(folder / "1.png"), "")):
        pixels, unreadable = decode_chunk([path], 8, root=root)
        np.testing.assert_array_equal(pixels[0], expected)
        assert not unreadable


def test_a_border_is_laid_around_images_that_lack_it(tmp_path):
    for size in (8, 12, 24):
        Image.fromarray(noise(0, size, size)).save(tmp_path / f"{size}.png")
    names = [f"{size}.png" for size in (8, 12, 24)]
    pixels, _ = decode_chunk(names, 12, root=tmp_path, border=2)
    inner = pixels[:, :, 2:-2, 2:-2]
    np.testing.assert_array_equal(inner[0, 0], noise(0, 8, 8))  # to the pixel
    np.testing.assert_array_equal(pixels[1, 0], noise(0, 12, 12))  # has its border already
    reduced, _ = decode_chunk(names[2:], 8, root=tmp_path)
    np.testing.assert_array_equal(inner[2], reduced[0])
    framed = pixels[[0, 2]].copy()
    framed[:, :, 2:-2, 2:-2] = 0
    assert not framed.any()


def test_threads_give_the_same_in_the_same_order(folder, monkeypatch):
    names = [f"{n}.png" for n in range(10)]
    serial = list(decode_all(names, 1, 8, root=folder))
    seen, decode = set(), decoding._decode

    def slow(*args):
        seen.add(threading.get_ident())
        time.sleep(0.01)
        return decode(*args)

    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(decoding, "_decode", slow)
    monkeypatch.setattr(decoding, "AHEAD", 2)
    parallel = list(decode_all(names, LARGE, 8, root=folder))
    assert len(parallel) == 10 and len(seen) == 2
    pixels = [np.concatenate([chunk for chunk, _ in chunks]) for chunks in (serial, parallel)]
    np.testing.assert_array_equal(*pixels)
    assert {path for _, reasons in parallel for path in reasons} == {"2.png"}


def test_decoding_waits_for_a_slow_reader(monkeypatch):
    """Else the images of a large folder fill the memory before the first ones are used."""
    submitted = []

    class Pool:
        def __init__(self, *args): ...
        def shutdown(self, **kwargs): ...
        def submit(self, decode, chunk):
            submitted.append(chunk)
            return self

        def result(self):
            return None

    monkeypatch.setattr(decoding, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    chunks = decode_all([str(n) for n in range(1000)], 1000 * LARGE, 8)
    next(chunks)
    assert len(submitted) == 2 * decoding.AHEAD
    next(chunks)
    assert len(submitted) == 2 * decoding.AHEAD + 1
    assert len(list(chunks)) == 998
    assert submitted == [[str(n)] for n in range(1000)]


def test_who_stops_reading_stops_the_decoding(folder, monkeypatch):
    """Ctrl-C waits for the files at hand, not for all that are decoded in advance."""
    begun, go_on = [], threading.Event()

    def slow(path, *args):
        begun.append(path)
        if len(begun) > 1:
            go_on.wait(10)
        return np.zeros((3, 8, 8), np.uint8), None

    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(decoding, "_decode", slow)
    chunks = decode_all([str(n) for n in range(100)], 100 * LARGE, 8)
    next(chunks)
    threading.Timer(0.2, go_on.set).start()
    chunks.close()
    assert len(begun) <= 4


def deep_grays(top, dtype=np.uint16):
    """All of 64 steps up to `top`, as an image of 8×8."""
    return np.linspace(0, top, 64).reshape(8, 8).astype(dtype)


@pytest.mark.parametrize("top, suffix, dtype, advised", [
    (4095, "png", np.uint16, 4095),
    (2899, "tiff", np.uint16, 4095),
    (1023, "png", np.uint16, 1023),
    (16383, "pgm", np.uint16, 16383),
    (0.01, "tiff", np.float32, 0.01),
])  # fmt: skip
def test_dark_images_of_more_than_8_bits_are_said_and_scaled(tmp_path, top, suffix, dtype, advised):
    Image.fromarray(deep_grays(top, dtype)).save(tmp_path / f"x.{suffix}")
    deep = {}
    pixels, unreadable = decode_chunk([f"x.{suffix}"], 8, root=tmp_path, deep=deep)
    assert not unreadable and pixels.max() <= 64
    (note,) = decoding.notes_on_depth(deep.values(), None)
    assert "1 16-bit images are dark" in note or "1 float images are dark" in note
    assert note.endswith(f"; --white {advised} makes that value white")
    deep = {}
    pixels, _ = decode_chunk([f"x.{suffix}"], 8, root=tmp_path, white=advised, deep=deep)
    expected = np.rint(deep_grays(top, dtype) * (255 / advised))
    np.testing.assert_allclose(pixels[0, 0], expected, atol=1)
    (note,) = decoding.notes_on_depth(deep.values(), advised)
    assert note.endswith(f": the value {advised:,} is white")


def test_images_that_use_their_range_are_not_remarked(tmp_path):
    Image.fromarray(deep_grays(60000)).save(tmp_path / "16.png")
    Image.fromarray(deep_grays(0.9, np.float32)).save(tmp_path / "f.tiff")
    Image.fromarray(deep_grays(9, np.uint8)).save(tmp_path / "8.png")  # dark, and nothing is lost
    deep = {}
    decode_chunk(["16.png", "f.tiff", "8.png"], 8, root=tmp_path, deep=deep)
    assert set(deep) == {"16.png", "f.tiff"}
    assert decoding.notes_on_depth(deep.values(), None) == []


def test_one_bright_image_does_not_hide_dark_ones(tmp_path):
    depths = [decoding.Depth("16-bit", 65535, 65535)] + [decoding.Depth("16-bit", 4000, 65535)] * 3
    (note,) = decoding.notes_on_depth(depths, None)
    assert "half of them reach 4000 of 65535" in note.replace(",", "") and "scale them" in note


def test_16_bits_of_each_color_are_noticed(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    colors = np.random.default_rng(0).integers(0, 4096, (8, 8, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colors)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    deep = {}
    decode_chunk(["x.png"], 8, root=tmp_path, deep=deep)
    (note,) = decoding.notes_on_depth(deep.values(), None)
    assert "1 16-bit color images are dark: they reach 15 of 255" in note and "full range" in note
    bright = [depth._replace(brightest=200) for depth in deep.values()]
    assert decoding.notes_on_depth(bright, None) == []
    (note,) = decoding.notes_on_depth(bright, white=4095)
    assert note.startswith("1 16-bit color images: --white is for gray values")


def test_chunks_hold_few_images_where_these_are_large(monkeypatch):
    lengths = []
    chunk = np.zeros((0, 3, 1024, 1024), np.uint8), {}
    monkeypatch.setattr(
        decoding, "decode_chunk", lambda paths, **options: lengths.append(len(paths)) or chunk
    )
    for side in (32, 1024):
        list(decoding.decode_all([f"{n}" for n in range(64)], 64 * 1000, side))
    assert lengths == [64] + [2] * 32


def test_values_beyond_white_are_refused(tmp_path):
    Image.fromarray(deep_grays(5000)).save(tmp_path / "x.png")
    _, unreadable = decode_chunk(["x.png"], 8, root=tmp_path, white=4095)
    assert unreadable == {"x.png": "gray values outside 0..4095"}
