"""The documentation tells the truth: commands parse, paths exist, the example runs."""

import os
import pickle
import re
import shlex
import sys
from glob import glob
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_datasets import write_mnist

import common
import compare
import embed
import study
import train_ae
import train_joint
import train_supcon
from common import models
from common.config import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
# the pages whose commands and examples are run, not only parsed
GUIDES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("architecture", "compare", "distributed", "embed", "training")
    ),
]
PAGES = [
    *(ROOT / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.fixture(autouse=True)
def _as_installed(monkeypatch):
    """The examples use the name under which `pip install .` installs `common`."""
    for name, module in (("latent_spaces", common), ("latent_spaces.models", models)):
        monkeypatch.setitem(sys.modules, name, module)


def blocks(kind: str, text: str) -> list[str]:
    """The fenced blocks of one language in a page."""
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines of its bash blocks, continued ones joined, without comments."""
    lines = "\n".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


COMMANDS = [line for page in PAGES for line in commands(page.read_text())]
TRAINERS = {f"{s.__name__}.py": s for s in (train_ae, train_joint, train_supcon)}
SCRIPTS = {name: script.Config for name, script in TRAINERS.items()}

# What is not run here, by how it begins, and why.
NOT_RUN = {
    "make ": "CI runs demo, lint and test by themselves",
    "python3 -m venv": "CI's make does the same",
    ".venv/bin/pip": "CI's make does the same",
    "pip install": "CI's make does the same",
    "accelerate launch --multi_gpu": "needs several GPUs",
    "torchrun": "needs several GPUs",
    "srun": "needs a cluster",
    "ACCELERATE_USE_CPU=true torchrun": "test_scripts and test_faults start two processes",
    "wandb sweep": "needs a server; test_sweeps runs what an agent would start",
    "wandb agent": "needs a server; test_sweeps runs what an agent would start",
}
SMALL = (
    *("--epochs=1", "--width=8", "--limit_train=64", "--batch_size=16", "--image_size=32"),
    *("--tsne_images=20", "--tracking=disabled"),
)
SMALL_STUDY = (
    *("--epochs=1", "--seeds=1", "--methods", "joint", "simclr", "--labels_per_class", "2"),
    *("--encoder=cnn", "--width=4", "--limit_train=64", "--batch_size=16", "--tracking=disabled"),
)
SMALL_AE = ("--hidden_dim=32", "--classifier_epochs=1", "--classifier_views=1")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


def test_every_script_in_a_command_exists():
    for line in COMMANDS:
        for word in shlex.split(line, comments=True):
            if word.endswith((".py", ".yaml")) or word.startswith("requirements"):
                assert (ROOT / word).is_file(), line


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


@pytest.mark.parametrize("line", [line for line in COMMANDS if "study.py" in line])
def test_every_study_parses(line):
    words = shlex.split(line, comments=True)
    study.check(parse(study.Config, words[words.index("study.py") + 1 :]))


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


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_and_sweep_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^):]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"sweeps/\w+\.yaml", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_is_named_exists(page):
    files = (
        r"\b(?:common|tests|benchmarks|faults)/[\w/]*\w\.\w+|\b(?:train_\w+|requirements-\w+)\.\w+"
    )
    for name in re.findall(files, page.read_text()):
        assert (ROOT / name).exists(), name


def test_every_page_can_be_reached_from_the_readme():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in README, page.name


def test_the_pages_of_the_scripts_have_the_same_headings():
    for page in PAGES:
        if page.stem in ("ae", "joint", "supcon"):
            headings = re.findall(r"^## (.*)", page.read_text(), flags=re.MULTILINE)
            names = ["Overview", "Usage", "Options", "Metrics", "Implementation details", "Results"]
            assert headings == names


def test_the_tree_shows_every_file_of_common():
    """Both ways: each file is in the tree, in its folder, and each line of the tree is a file."""
    tree = next(text for text in blocks("text", ARCHITECTURE) if text.startswith("common/\n"))
    folder, found = "common", set()
    for indent, name in re.findall(r"^( +)(\S+)", tree, flags=re.MULTILINE):
        if name.endswith("/"):
            folder = f"common/{name.rstrip('/')}"
        else:
            found.add(f"{folder if len(indent) > 2 else 'common'}/{name}")
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "common").rglob("*.*")
        if path.suffix in (".py", ".html", ".js") and path.name != "__init__.py"
    }
    assert found == files


def test_the_other_tree_shows_every_script_and_folder():
    tree = next(text for text in blocks("text", ARCHITECTURE) if text.startswith("train_ae.py"))
    first = re.findall(r"^(\S.*?)(?:   |$)", tree, flags=re.MULTILINE)
    named = {name for names in first for name in names.split()}
    for name in named:
        assert (ROOT / name).exists(), name
    assert named >= {path.name for path in (*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"))}


def test_the_encoder_loads_as_the_example_says(tmp_path, monkeypatch):
    (example,) = blocks("python", README)
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the commands of the guides find what they name, all of it small."""
    here = tmp_path_factory.mktemp("readme")
    write_mnist(here / "data", train=100, test=40)
    batches = here / "data/cifar-10-batches-py"
    batches.mkdir()
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        planes = random.integers(0, 256, (40, 3072), dtype=np.uint8)
        batch = {"data": planes, "labels": [n % 10 for n in range(40)]}
        (batches / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class {n}" for n in range(10)]}
    (batches / "batches.meta").write_bytes(pickle.dumps(names))
    folders = [
        f"{name}/{part}/{kind}"
        for name in ("pets", "cifar10-images")
        for part in ("train", "test")
        for kind in ("cat", "dog")
    ]
    for folder in (*folders, "scans"):
        (here / folder).mkdir(parents=True)
        shape = (30, 40) if folder == "scans" else (30, 40, 3)
        for n in range(40):
            pixels = random.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(here / folder / f"{n}.png")
    Image.fromarray(random.integers(0, 256, (50, 50), dtype=np.uint8)).save(here / "page.png")

    def train(run: str, script: str, *words: str) -> None:
        run_line(f"python {script} --run_dir runs/{run} {' '.join(words)}")

    with pytest.MonkeyPatch.context() as patch:
        # checksums of the real files cannot match those of small ones
        patch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *words: True)
        patch.chdir(here)
        train("ae-digits-20260101-120000-3fa2", "train_ae.py")
        for method in ("ae", "joint", "supcon"):
            cnn = ("--encoder", "cnn") if method == "supcon" else ()
            train(
                f"{method}-mnist-20260101-120000-3fa2",
                f"train_{method}.py",
                "--dataset mnist",
                *cnn,
            )
        for seed in (0, 1):
            train(f"joint-cifar-seed{seed}", "train_joint.py", f"--dataset cifar10 --seed {seed}")
        train("supcon-cifar", "train_supcon.py", "--dataset cifar10 --encoder cnn")
        yield here


def run_line(line: str) -> None:
    """Run a line of a guide in this process, small: what it names, on little data."""
    words = shlex.split(line, comments=True)
    at = next(n for n, word in enumerate(words) if word.endswith(".py"))
    name, flags = words[at], words[at + 1 :]
    flags = [found for word in flags for found in (sorted(glob(word)) if "*" in word else [word])]
    if name in TRAINERS:
        script = TRAINERS[name]
        flags += [*SMALL, *(SMALL_AE if script is train_ae else ())]
    else:
        script = {"compare.py": compare, "embed.py": embed, "study.py": study}[name]
    if script is study:
        flags += ["--minutes=None", *SMALL_STUDY]
    if script is compare:
        flags += ["--tracking=disabled", "--map_images=20", "--robust_images=20"]
    script.main(parse(script.Config, flags))
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


def test_every_command_that_needs_nothing_else_runs(place, capsys):
    (place / "latents.npz").unlink(missing_ok=True)
    # a line on two pages runs once
    lines = list(dict.fromkeys(line for page in GUIDES for line in commands(page.read_text())))
    skipped = {start for start in NOT_RUN if any(line.startswith(start) for line in lines)}
    assert skipped == set(NOT_RUN), "a reason without a command"
    runnable = [line for line in lines if not line.startswith(tuple(NOT_RUN))]
    assert len(runnable) > 10
    for line in runnable:
        print(f"$ {line}")
        if "--help" in line:
            with pytest.raises(SystemExit) as end:
                run_line(line)
            assert end.value.code == 0
        else:
            run_line(line)
    for name in ("latents.npz", "latents.parquet", "encoder.onnx", "comparison/index.html"):
        assert os.path.getsize(place / name) > 0
    for example in (text for page in GUIDES for text in blocks("python", page.read_text())):
        names = {"images": torch.zeros(3, 1, 32, 32, dtype=torch.uint8)}
        exec(example, names)
        assert len(names["latents"]) in (3, 41)  # those images, or those of scans/ and page.png


@pytest.mark.parametrize("page", ["ae", "joint", "supcon"])
def test_the_options_on_a_methods_page_have_the_defaults_of_its_script(page):
    text = (ROOT / "docs" / f"{page}.md").read_text().partition("## Options")[2]
    rows = re.findall(r"^\| `--(\w+)` \| (\S+) \|", text.partition("## Metrics")[0], re.MULTILINE)
    config = {"ae": train_ae, "joint": train_joint, "supcon": train_supcon}[page].Config()
    assert len(rows) > 3
    assert {name: str(getattr(config, name)) for name, _ in rows} == dict(rows)
