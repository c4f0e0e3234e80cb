"""What becomes of each kind of odd or broken image file, in training and in embed.py.

Puts one odd file of a kind among sound images, loads them as the training scripts do
(`folder.load_folder`) and as embed.py does, without and with --skip_unreadable, and prints a table
of what happened and of the line that was printed. --files N adds N small files, and the time taken.

    python faults/bad_images.py
    python faults/bad_images.py --files 100000
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import embed
from common.data import decoding, folder
from common.errors import UserError

SIZE, SOUND = 32, 4  # pixels a side; sound images beside the odd one
NOBODY = 65534  # a user to whom no file belongs


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def picture(height: int = 40, width: int = 48) -> Image.Image:
    return Image.fromarray(noise(height, width, 3))


def zero_bytes(folder: Path) -> None:
    (folder / "empty.png").touch()


def truncated(folder: Path) -> None:
    picture().save(path := folder / "cut.jpg")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged(folder: Path) -> None:
    picture().save(path := folder / "damaged.png")
    content = path.read_bytes()
    path.write_bytes(content[:1000] + bytes(400) + content[1400:])


def text(folder: Path) -> None:
    (folder / "text.png").write_text("no image")


def cmyk(folder: Path) -> None:
    picture().convert("CMYK").save(folder / "cmyk.jpg")


def deep(folder: Path) -> None:
    Image.fromarray(noise(40, 40).astype(np.uint16) * 257).save(folder / "deep.png")


def clear_palette(folder: Path) -> None:
    picture().quantize(16).save(folder / "palette.png", transparency=3)


def animated(folder: Path) -> None:
    frames = [picture(), picture().rotate(180)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])


def rotated(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(folder / "rotated.jpg", exif=exif)


def dot(folder: Path) -> None:
    picture(1, 1).save(folder / "dot.png")


def line(folder: Path) -> None:
    picture(1, 5000).save(folder / "line.png")


def bomb(folder: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")


def spaces(folder: Path) -> None:
    picture().save(folder / "a b  c.png")


def not_latin(folder: Path) -> None:
    picture().save(folder / "猫 ß ñ.png")


def not_utf8(folder: Path) -> None:
    picture().save(path := folder / "x.png")
    os.rename(path, os.fsencode(folder) + b"/\xff\xfe.png")


def broken_link(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder / "nowhere.png")


def link_upwards(folder: Path) -> None:
    (folder / "upwards").symlink_to(folder.parent)


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")


def forbidden(folder: Path) -> None:
    picture().save(path := folder / "forbidden.png")
    path.chmod(0)


KINDS: dict[str, Callable[[Path], None]] = {
    "zero bytes": zero_bytes,
    "truncated JPEG": truncated,
    "damaged PNG": damaged,
    "text named .png": text,
    "CMYK": cmyk,
    "16-bit grey": deep,
    "palette with transparency": clear_palette,
    "animated GIF": animated,
    "EXIF-rotated": rotated,
    "1×1": dot,
    "5000×1": line,
    "20000×20000": bomb,
    "name with spaces": spaces,
    "non-Latin name": not_latin,
    "name that is no UTF-8": not_utf8,
    "broken link": broken_link,
    "link to the folder above": link_upwards,
    "pipe": pipe,
    "unreadable by permission": forbidden,
}


def make(root: Path, kind: str, sound: int = SOUND) -> Path:
    """A data_dir below `root` whose train/cat holds sound images and one of that kind."""
    data_dir = root / kind.replace("/", " ")
    for name in ("cat", "dog"):
        (data_dir / "train" / name).mkdir(parents=True)
        for number in range(sound):
            pixels = noise(SIZE, SIZE, 3) ^ number
            Image.fromarray(pixels).save(data_dir / f"train/{name}/{number}.png")
    KINDS[kind](data_dir / "train/cat")
    return data_dir


def train(data_dir: Path, skip: bool) -> tuple[int, str]:
    """Number of images that a training would see, and the line that is printed."""
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        try:
            count = len(folder.load_folder(data_dir, SIZE, skip, False).train_images)
        except UserError as error:
            return 0, f"error: {error}"
    return count, heard.getvalue().strip()


def encode(data_dir: Path, skip: bool) -> tuple[int, str]:
    """The same for embed.py, given the folder."""
    config = embed.Config("run", "out.npz", (str(data_dir),), skip_unreadable=skip)
    paths: list[str] = []
    try:
        files = embed.list_images(config.images)
        chunks = decoding.decode_all(list(files), sum(files.values()), SIZE)
        count = sum(len(pixels) for pixels in embed.readable(chunks, files, 3, config, paths))
    except UserError as error:
        return 0, f"error: {error}"
    skipped = len(files) - len(paths)
    return count, f"skipped {skipped} of {len(files)} files: no readable images" if skipped else ""


def outcome(data_dir: Path, load: Callable[[Path, bool], tuple[int, str]]) -> tuple[str, str]:
    """What happened to the odd file, and the line that was printed for it."""
    count, said = load(data_dir, False)
    if count == 2 * SOUND + 1:
        return "used", said
    skipped, then = load(data_dir, True)
    if count or "\n" in said + then or skipped != 2 * SOUND or not then.startswith("skipped 1 of"):
        return f"LOST: {count} and {skipped} images, {then}", said
    return "named; skipped and counted on demand", said


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom permissions concern; root reads everything."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def many(root: Path, count: int) -> str:
    """How long it takes to load `count` small files, the first time and again."""
    content = io.BytesIO()
    Image.fromarray(noise(SIZE, SIZE, 3)).save(content, "PNG")
    for number in range(count):
        path = root / f"many/train/{number % 10}/{number // 1000}/{number}.png"
        if number < 10 or number % 1000 < 10:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
    times = []
    for _ in range(2):
        started = time.perf_counter()
        seen, said = train(root / "many", False)
        times.append(time.perf_counter() - started)
    return f"{seen:,} of {count:,} files used, {times[0]:.1f} s, again {times[1]:.1f} s {said}"


def rows(root: Path) -> Iterator[tuple[str, str, str, str]]:
    """For each kind: its name, what training and embed.py did, and the line that was printed."""
    root.chmod(0o777)
    Image.init()  # before other users may not import Pillow's plugins any more
    for kind in KINDS:
        with without_privileges():
            data_dir = make(root, kind)
            happened, said = outcome(data_dir, train)
            encoded, _ = outcome(data_dir, encode)
        said = said.replace(str(data_dir), "DATA").encode(errors="backslashreplace").decode()
        yield kind, happened, encoded, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=0, help="also load so many small files")
    count = parser.parse_args().files
    print("| kind | training | embed.py | line printed |", "| --- | --- | --- | --- |", sep="\n")
    lost = 0
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        for cells in rows(Path(name)):
            lost += any("LOST" in cell for cell in cells)
            print(f"| {' | '.join(cells)} |", flush=True)
        if count:
            print(f"\n{many(Path(name), count)}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
