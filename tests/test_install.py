"""`pip install .`: the package under its own name, from any folder, with the requirements."""

import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from test_embed import make_run

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta; build_meta.build_wheel('.')"  # as pip does


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel made of a copy of the repository, since a build leaves files beside the sources."""
    import subprocess

    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "common", source / "common", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, source)
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return next(source.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder that holds the package as it is installed."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_package_is_all_of_common(site):
    files = [path for path in (ROOT / "common").rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT / "common") for path in files if path.suffix != ".pyc"}
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {
        "latent_spaces"
    }
    found = {path for path in (site / "latent_spaces").rglob("*") if path.is_file()}
    assert {path.relative_to(site / "latent_spaces") for path in found} == wanted


def test_requirements_come_from_requirements_txt(site):
    text = next(site.glob("*.dist-info/METADATA")).read_text()
    found = [line.split(": ")[1] for line in text.splitlines() if line.startswith("Requires-Dist")]
    wanted = []
    for name, extra in (("requirements.txt", ""), ("requirements-export.txt", "export")):
        for line in (ROOT / name).read_text().splitlines():
            if words := line.partition("#")[0].strip():
                wanted.append(words + (f'; extra == "{extra}"' if extra else ""))
    assert [str(Requirement(line)) for line in found] == [str(Requirement(w)) for w in wanted]
    assert "License-Expression: MIT" in text
    assert (
        next(site.glob("*.dist-info/licenses/LICENSE")).read_text()
        == (ROOT / "LICENSE").read_text()
    )


USER = """
import importlib, pkgutil, sys
import numpy, torch
import latent_spaces
from latent_spaces.models import load_classifier, load_encoder
encoder, classifier = load_encoder("run"), load_classifier("run")
images = torch.from_numpy(numpy.load("images.npy"))
with torch.inference_mode():
    latents = encoder(images)
    numpy.savez("found.npz", latents=latents, logits=classifier(latents))
for module in pkgutil.walk_packages(latent_spaces.__path__, "latent_spaces."):
    importlib.import_module(module.name)
assert "common" not in sys.modules
try:
    load_encoder("nothing")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_an_encoder_is_loaded_from_any_folder_beside_another_package_called_common(
    site, tmp_path, run_command
):
    encoder = make_run(tmp_path / "run", channels=3)
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "common.py").write_text("raise RuntimeError('somebody else')")
    done = run_command(sys.executable, "-c", USER, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "UserError cannot read nothing/encoder.json: No such file or directory\n"
    found = np.load(tmp_path / "found.npz")
    with torch.no_grad():
        assert np.array_equal(found["latents"], encoder(torch.from_numpy(images)))
    assert found["logits"].shape == (5, 3)
