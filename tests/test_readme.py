"""The documentation tells the truth: commands parse, paths exist, the example runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import compare
import embed
import train_ae
import train_joint
import train_supcon
from common import models
from common.config import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), flags=re.DOTALL)
]
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
SCRIPTS = {f"{s.__name__}.py": s.Config for s in (train_ae, train_joint, train_supcon)}


@pytest.mark.parametrize("line", sorted({line for line in COMMANDS if "train_" in line}))
def test_every_training_command_parses(line):
    words = shlex.split(line, comments=True)
    script = next(word for word in words if word in SCRIPTS)
    flags = words[words.index(script) + 1 :]
    if "--help" not in flags:
        parse(SCRIPTS[script], flags)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "embed.py" in line])
def test_every_embedding_command_parses(line):
    words = shlex.split(line, comments=True)
    config = parse(embed.Config, words[words.index("embed.py") + 1 :])
    assert config.export or config.images


@pytest.mark.parametrize("line", [line for line in COMMANDS if "compare.py" in line])
def test_every_comparing_command_parses(line):
    words = shlex.split(line, comments=True)
    assert parse(compare.Config, words[words.index("compare.py") + 1 :]).runs


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = [shlex.split(line)[1] for line in COMMANDS if line.startswith("make ")]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_and_sweep_exists(page):
    text = page.read_text()
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"sweeps/\w+\.yaml", text):
        assert (ROOT / name).exists(), name


def test_the_pages_of_the_scripts_have_the_same_headings():
    for page in PAGES:
        if page.stem in ("ae", "joint", "supcon"):
            headings = re.findall(r"^## (.*)", page.read_text(), flags=re.MULTILINE)
            names = ["Overview", "Usage", "Metrics", "Implementation details", "Results"]
            assert headings == names


def test_every_link_and_file_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    files = re.findall(r"\b(?:common|tests)/\w+\.py\b|\b(?:train_\w+|requirements\S*)\.\w+", README)
    assert links
    assert files
    for name in {*links, *files}:
        assert (ROOT / name).exists(), name
    tree = next(text for kind, text in BLOCKS if kind == "text" and "common/config.py" in text)
    for path in (ROOT / "common").glob("[a-z]*.py"):
        assert path.name in tree, path.name


def test_the_encoder_loads_as_the_example_says(tmp_path, monkeypatch):
    example = next(text for kind, text in BLOCKS if kind == "python")
    sizes = {"channels": 1, "image_size": 32, "width": 4, "blocks": 0, "latent_dim": 128}
    encoder = models.build_encoder("cnn", **sizes)
    folder = tmp_path / re.search(r'load_encoder\("(.*)"\)', example).group(1)
    folder.mkdir(parents=True)
    description = {"encoder": "cnn", **sizes, "mean": [0.5], "std": [0.5]}
    models.save_encoder(folder, encoder, description)
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.zeros(3, 1, 32, 32, dtype=torch.uint8)}
    exec(example, names)
    assert names["latents"].shape == (3, 128)
