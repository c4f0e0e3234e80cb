"""The README tells the truth: its commands parse, its paths exist, its example runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import embed
import train_ae
import train_joint
import train_supcon
from common import models
from common.config import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
SCRIPTS = {f"{s.__name__}.py": s.Config for s in (train_ae, train_joint, train_supcon, embed)}
OURS = [line for line in COMMANDS if any(script in line for script in SCRIPTS)]


@pytest.mark.parametrize("line", OURS)
def test_every_command_of_a_script_parses(line):
    words = shlex.split(line, comments=True)
    script = next(word for word in words if word in SCRIPTS)
    flags = words[words.index(script) + 1 :]
    if "--help" not in flags:
        parse(SCRIPTS[script], flags)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = [shlex.split(line)[1] for line in COMMANDS if line.startswith("make ")]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_link_and_file_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    files = re.findall(
        r"\b(?:common|tests)/\w+\.py\b|\b(?:train_\w+|embed|requirements\S*)\.\w+", README
    )
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
