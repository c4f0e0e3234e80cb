"""New images through a finished run: the same numbers as in training, and no surprises."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import embed
import train_ae
import train_joint
import train_supcon
from common import export, models
from common.config import parse
from common.data import datasets, decoding
from common.display import tables
from common.errors import UserError
from common.evaluation import pictures, report

ROOT = Path(__file__).parent.parent
TINY = (
    *("--limit_train=128", "--epochs=1", "--batch_size=32", "--width=8"),
    "--tracking=disabled",
)
SCRIPTS = {
    "ae": (train_ae, ("--hidden_dim=32", "--classifier_epochs=2", "--classifier_views=1")),
    "joint": (train_joint, ()),
    "supcon": (train_supcon, ("--encoder=cnn",)),
}


def run_embed(*args) -> dict[str, float]:
    return embed.main(parse(embed.Config, [str(word) for word in args]))


def save(path: Path, pixels: np.ndarray) -> Path:
    """Write an array (C,H,W) as an image, C = 1 or 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(path)
    return path


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module", params=SCRIPTS)
def trained(tmp_path_factory, request):
    """A finished run of each script, without figures and metrics of the latents."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    script, own = SCRIPTS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "latent_pictures", lambda *args: ())
        for name in ("latent_metrics", "image_metrics"):
            patch.setattr(report, name, lambda *args: {})
        script.main(parse(script.Config, [*TINY, *own, f"--run_dir={folder}"]))
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The test images of the digits as PNG files, those from 10 up to half of them in a folder."""
    place = tmp_path_factory.mktemp("digits")
    images = (
        datasets.split_data(datasets.read("digits", "data", 32)).test.images(slice(None)).numpy()
    )
    half = len(images) // 2
    names = [
        f"folder/deep/{n:03}.png" if 10 <= n < half else f"{n}.png" for n in range(len(images))
    ]
    return [save(place / name, image) for name, image in zip(names, images, strict=True)]


def make_run(
    folder: Path,
    dataset: str = "folder",
    encoder: str = "cnn",
    channels: int = 1,
    image_size: int = 16,
) -> nn.Module:
    """A finished run without a training; its encoder."""
    torch.manual_seed(0)
    sizes = {"channels": channels, "image_size": image_size, "width": 4, "blocks": 0}
    description = {"encoder": encoder, **sizes, "latent_dim": 6}
    encoder = models.build_encoder(**description)
    folder.mkdir(parents=True)
    description |= {"mean": [0.5] * channels, "std": [0.25] * channels}
    description |= {"dataset": dataset, "class_names": ["cat", "dog", "eel"]}
    models.save_encoder(folder, encoder, description)
    models.save_weights(folder / "classifier.safetensors", nn.Linear(6, 3))
    for name in ("config.json", "summary.json"):
        (folder / name).write_text("{}")
    return models.load_encoder(folder)


def test_the_test_images_as_files_give_the_latents_of_the_run(trained, digits, tmp_path, capsys):
    half = len(digits) // 2
    args = [*digits[:10], digits[10].parents[1], *digits[half:], digits[0], "--batch_size=100"]
    figures = run_embed(trained, *args, "--out", tmp_path / "out.npz")
    assert (figures["images"], figures["skipped"]) == (len(digits), 0)
    stored, found = np.load(trained / "latents.npz"), np.load(tmp_path / "out.npz")  # no pickles
    assert found["paths"].tolist() == [str(path) for path in digits]
    assert found["latents"].dtype == np.float32
    assert np.allclose(found["latents"], stored["latents"], rtol=0, atol=1e-4)
    assert found["predictions"].dtype == np.int64
    assert np.array_equal(found["predictions"], stored["predictions"])
    assert np.array_equal(found["predicted_names"], stored["predictions"].astype(str))
    assert np.array_equal(found["class_names"], np.arange(10).astype(str))
    assert np.allclose(found["probabilities"].sum(1), 1, atol=1e-5)
    assert np.array_equal(found["confidences"], found["probabilities"].max(1))
    text = capsys.readouterr().out
    for label, count in zip(*np.unique(stored["predictions"], return_counts=True), strict=True):
        assert f"\n{label} " in text
        assert f" {count} " in text
    assert "images/s" in text


@pytest.mark.parametrize("input_type", ["uint8", "float32"])
def test_the_exported_network_is_the_run_for_any_batch(trained, tmp_path, capsys, input_type):
    import onnxruntime

    path = tmp_path / "encoder.onnx"
    args = ("--export", "onnx", "--onnx_input", input_type)
    assert run_embed(trained, *args, "--out", path)["difference"] < 1e-4
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    encoder, classifier = models.load_encoder(trained), models.load_classifier(trained)
    for count in (1, 7):
        images = torch.from_numpy(noise(count, count, 1, 32, 32))
        images = images if input_type == "uint8" else images / 255
        latents, logits = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            wanted = (encoder(images), classifier(encoder(images)))
        for found, expected in zip((latents, logits), wanted, strict=True):
            # logits of noise reach 300 here, where float32 itself is off by 1e-4
            scale = max(1.0, expected.abs().max().item())
            assert np.allclose(found, expected, rtol=0, atol=1e-4 * scale)
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    assert names == [str(n) for n in range(10)]
    assert str(ROOT).encode() not in path.read_bytes()  # nothing of this machine goes along
    assert "images " + input_type + " (B,1,32,32)" in capsys.readouterr().out


def test_a_resnet_on_colors_is_exported_too(tmp_path):
    make_run(tmp_path / "run", encoder="resnet18", channels=3)
    args = ("--export=onnx", "--out", tmp_path / "encoder.onnx")
    assert run_embed(tmp_path / "run", *args)["difference"] < 1e-4


@pytest.mark.parametrize("encoder", ["cnn", "resnet18", "airbench"])
@pytest.mark.parametrize("input_type", ["uint8", "float32"])
def test_a_program_of_torch_export_is_the_run_for_any_batch(tmp_path, encoder, input_type, capsys):
    network = make_run(tmp_path / "run", encoder=encoder, channels=3)
    classifier, path = models.load_classifier(tmp_path / "run"), tmp_path / "encoder.pt2"
    run_embed(tmp_path / "run", "--export=pt2", f"--export_input={input_type}", "--out", path)
    program = torch.export.load(path).module()
    for count in (1, 2, 7):
        images = torch.from_numpy(noise(count, count, 3, 16, 16))
        images = images if input_type == "uint8" else images / 255
        with torch.no_grad():
            latents, logits = program(images)
            assert torch.allclose(latents, network(images), rtol=0, atol=1e-5)
            assert torch.allclose(logits, classifier(network(images)), rtol=0, atol=1e-5)
    extra = {"class_names.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["class_names.json"]) == ["cat", "dog", "eel"]
    assert str(ROOT).encode() not in path.read_bytes()  # nothing of this machine goes along
    assert f"images {input_type} (B,3,16,16)" in capsys.readouterr().out


TWO_LINES = """
import torch
latents, logits = torch.export.load("encoder.pt2").module()(torch.zeros(3, 1, 16, 16).byte())
import sys
print(tuple(latents.shape), tuple(logits.shape), "common" in sys.modules)
"""


def test_two_lines_of_pytorch_load_it_without_this_code(tmp_path, run_command):
    make_run(tmp_path / "run")
    run_embed(tmp_path / "run", "--export=pt2", "--out", tmp_path / "encoder.pt2")
    done = run_command(sys.executable, "-c", TWO_LINES, PYTHONPATH="")
    assert (done.returncode, done.stdout) == (0, "(3, 6) (3, 3) False\n"), done.stderr


def test_an_exported_network_that_differs_is_not_kept(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    for ending in ("onnx", "pt2"):
        with pytest.raises(UserError, match=r"differs from PyTorch's by .* is not kept"):
            run_embed(tmp_path / "run", f"--export={ending}", "--out", tmp_path / f"out.{ending}")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_parquet_holds_the_same_as_npz(tmp_path):
    import pyarrow.parquet

    make_run(tmp_path / "run", channels=3)
    for n in range(5):
        save(tmp_path / f"images/{n}.png", noise(n, 3, 20, 16))
    os.rename(tmp_path / "images/0.png", os.fsencode(tmp_path / "images") + b"/0\xff.png")
    for ending in (".npz", ".parquet"):
        run_embed(tmp_path / "run", tmp_path / "images", "--out", tmp_path / f"out{ending}")
    arrays = np.load(tmp_path / "out.npz")
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    for name in ("latents", "predictions", "predicted_names", "confidences", "probabilities"):
        column = np.array(table[name].to_pylist(), dtype=arrays[name].dtype)
        assert np.array_equal(column, arrays[name]), name
    assert table["latents"].type == pyarrow.list_(pyarrow.float32(), 6)
    assert os.path.exists(arrays["paths"][0])
    assert table["paths"][0].as_py() == f"{tmp_path}/images/0\\udcff.png"
    assert json.loads(table.schema.metadata[b"class_names"]) == ["cat", "dog", "eel"]


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("image_size", [32, 48])
def test_images_of_torchvision_go_the_way_they_went_in_training(tmp_path, dataset, image_size):
    encoder = make_run(tmp_path / "run", dataset, image_size=image_size)
    images = noise(0, 3, 1, 28, 28)
    for n, image in enumerate(images):
        save(tmp_path / f"images/{n}.png", image)
    save(tmp_path / "images/3.png", np.pad(images[0], ((0, 0), (2, 2), (2, 2))))
    run_embed(tmp_path / "run", tmp_path / "images", "--out", tmp_path / "out.npz")
    latents = np.load(tmp_path / "out.npz")["latents"]
    with torch.no_grad():
        expected = encoder(torch.from_numpy(datasets.resize(images, image_size)))
    assert np.allclose(latents[:3], expected, atol=1e-5)
    assert np.allclose(latents[3], expected[0], atol=1e-5)


def test_a_folder_of_28_pixels_gets_no_border_as_in_training(tmp_path):
    encoder = make_run(tmp_path / "run", "folder", image_size=28)
    image = noise(0, 1, 28, 28)
    save(tmp_path / "images/a.png", image)
    run_embed(tmp_path / "run", tmp_path / "images", "--out", tmp_path / "out.npz")
    with torch.no_grad():
        expected = encoder(torch.from_numpy(image[None]))
    assert np.allclose(np.load(tmp_path / "out.npz")["latents"], expected, atol=1e-5)


def test_what_is_left_out_of_a_folder_is_counted(tmp_path, capsys):
    make_run(tmp_path / "run")
    for name in ("a.png", "masks/a.png", "previews/b.png"):
        save(tmp_path / "images" / name, noise(0, 1, 16, 16))
    found = run_embed(tmp_path / "run", tmp_path / "images", "--out", tmp_path / "out.npz")
    assert (found["images"], found["skipped"]) == (1, 0)
    assert "images: 2 thumbnails, masks, previews" in capsys.readouterr().out


def test_gray_images_are_fine_for_a_run_on_colors_and_gray_ones_stored_as_rgb_for_gray(tmp_path):
    gray = save(tmp_path / "gray.png", noise(0, 1, 16, 16))
    as_rgb = save(tmp_path / "rgb.png", np.repeat(noise(0, 1, 16, 16), 3, axis=0))
    for channels in (1, 3):
        encoder = make_run(tmp_path / f"run{channels}", channels=channels)
        run_embed(tmp_path / f"run{channels}", gray, as_rgb, "--out", tmp_path / f"{channels}.npz")
        latents = np.load(tmp_path / f"{channels}.npz")["latents"]
        images = torch.from_numpy(noise(0, 1, 16, 16)).expand(1, channels, 16, 16)
        assert np.allclose(latents, encoder(images).detach(), atol=1e-5)


def test_unreadable_images_are_named_or_left_out_on_demand(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "run")
    for n in range(5):
        save(tmp_path / f"images/{n}.png", noise(n, 1, 16, 16))
    (tmp_path / "images/1.png").write_text("no image")
    args = (tmp_path / "run", tmp_path / "images", "--out", tmp_path / "out.npz")
    with pytest.raises(
        UserError, match=r"1 files are no readable images: \S*images/1\.png \(no"
    ) as error:
        run_embed(*args)
    assert "--skip_unreadable=True" in error.value.message
    (tmp_path / "images/3.png").write_text("no image")
    with monkeypatch.context() as patch:
        decode = decoding.decode_all  # a file at a time, as if they were many
        patch.setattr(
            decoding,
            "decode_all",
            lambda paths, *words, **options: (
                chunk for path in paths for chunk in decode([path], *words, **options)
            ),
        )
        with pytest.raises(UserError, match=r"2 files .*images/1\.png .*, \S*images/3\.png "):
            run_embed(*args)
    save(tmp_path / "images/3.png", noise(3, 1, 16, 16))
    assert not (tmp_path / "out.npz").exists()
    figures = run_embed(*args, "--skip_unreadable=True", "--batch_size=2")
    assert (figures["images"], figures["skipped"]) == (4, 1)
    assert "skipped 1 of 5 files" in capsys.readouterr().out
    names = [Path(path).name for path in np.load(tmp_path / "out.npz")["paths"]]
    assert names == ["0.png", "2.png", "3.png", "4.png"]
    args = (tmp_path / "run", tmp_path / "images/1.png", "--skip_unreadable=True")
    with pytest.raises(UserError, match="none of the 1 files can be read"):
        run_embed(*args, "--out", tmp_path / "none.npz")


def unfinished(place: Path) -> None:
    (place / "run/summary.json").unlink()


def torn(place: Path) -> None:
    (place / "run/classifier.safetensors").write_bytes(b"torn")


def locked(place: Path) -> None:
    (place / "out.npz").mkdir()


@pytest.mark.parametrize(
    ("args", "message", "spoil"),
    [
        ("nowhere images --out out.npz", "nowhere is no run: there is no nowhere/c", None),
        ("images images --out out.npz", "images is no run", None),
        (
            "run images --out out.npz",
            "run is not finished; resume it first: --resume run",
            unfinished,
        ),
        ("run images --out out.npz", "classifier in run cannot be loaded", torn),
        ("run --out out.npz", "name the images behind the run", None),
        ("run images nothing.png --out out.npz", "there is no file or folder nothing.png", None),
        ("run images empty --out out.npz", "there are no files in empty", None),
        ("run images color.png --out out.npz", "color.png is an RGB image, but run was", None),
        ("run images --out out.csv", r"--out out.csv must end in \.npz or \.parquet", None),
        ("run images --out out.onnx", "it is written by --export onnx", None),
        ("run images --out out.pt2", "it is written by --export pt2", None),
        ("run --export onnx --out out.npz", r"must end in \.onnx", None),
        ("run --export pt2 --out out.pt", r"must end in \.pt2", None),
        ("run images --export onnx --out out.onnx", "--export onnx takes no images", None),
        ("run images --out out.npz", "out.npz exists; choose another --out", locked),
        ("run images --out no/out.npz", "cannot write no/out.npz: .*/no is not a folder", None),
        ("run images --out out.parquet", "files need pyarrow: pip install -r requi", None),
        ("run --export onnx --out out.onnx", "files need onnxscript: pip install -r", None),
        ("run images --out out.npz --batch_size 0", "--batch_size 0 is out of range", None),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, args, message, spoil):
    make_run(tmp_path / "run")
    save(tmp_path / "images/gray.png", noise(0, 1, 16, 16))
    save(tmp_path / "color.png", noise(0, 3, 16, 16))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("pyarrow", "onnxscript"):  # as if they were not installed
        monkeypatch.setitem(sys.modules, name, None)
    if spoil:
        spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        run_embed(*args.split())
    assert "\n" not in error.value.message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(file, **arrays):
        raise OSError(28, "No space left on device")

    make_run(tmp_path / "run")
    image = save(tmp_path / "gray.png", noise(0, 1, 16, 16))
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"cannot write .*out\.npz: No space left on device"):
        run_embed(tmp_path / "run", image, "--out", tmp_path / "out.npz")
    assert not list(tmp_path.glob("*out*"))


def test_batches_are_of_the_size_that_was_asked_for():
    blocks = [noise(n, length, 1, 2, 2) for n, length in enumerate((3, 0, 64, 1, 64, 5))]
    for size in (1, 10, 64, 200):
        found = list(embed.batches(blocks, size))
        assert all(len(batch) == size for batch in found[:-1])
        assert 0 < len(found[-1]) <= size
        assert np.array_equal(np.concatenate(found), np.concatenate(blocks))
    assert list(embed.batches([], 4)) == list(embed.batches([blocks[1]], 4)) == []


def test_many_classes_make_a_short_table():
    names = np.array([f"class {n}" for n in range(50)])
    predictions = np.repeat(np.arange(50), np.arange(50))  # the first one is never seen
    lines = tables.class_counts(predictions, np.full(len(predictions), 0.5), names).splitlines()
    assert len(lines) == 22
    assert lines[1].split() == ["class", "49", "49", "4.0%", "50.0%"]
    assert lines[-1].split() == ["29", "other", "classes", str(sum(range(30)))]


def test_as_a_user_runs_it(tmp_path, run_command):
    make_run(tmp_path / "run")
    save(tmp_path / "images/gray.png", noise(0, 1, 16, 16))
    args = (sys.executable, ROOT / "embed.py", "run", "images", "--out=out.npz")
    done = run_command(*args)
    assert (done.returncode, done.stderr) == (0, "")
    assert "out.npz: 1 images" in done.stdout
    again = run_command(*args)
    assert again.returncode == 1
    assert again.stderr == "error: out.npz exists; choose another --out, or remove it\n"
