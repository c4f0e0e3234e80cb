"""Every sweep names flags that its scripts have, with values that arrive as they were written."""

import math
import random
import re
import sys
from pathlib import Path

import pytest
import yaml
from tiny import coarse_pictures

import train_ae
import train_joint
import train_supcon
from common.config import parse
from common.files import read_rows

FILES = sorted((Path(__file__).parent.parent / "sweeps").glob("*.yaml"))
SCRIPTS = {f"{script.__name__}.py": script for script in (train_ae, train_joint, train_supcon)}
TEXTS = ("dataset", "encoder", "augment")
TINY = {"limit_train": 64, "epochs": 1, "tsne_images": 5, "tracking": "disabled"}
TINY_AE = {"classifier_epochs": 1, "hidden_dim": 16}


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def values_of(parameter: dict) -> list:
    """The values that a sweep may send, the ends of a distribution for those without a list."""
    if "value" in parameter:
        return [parameter["value"]]
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def programs(path: Path) -> list[str]:
    """The program of a sweep, and those that its first lines put in its place."""
    return [read(path)["program"], *re.findall(r"--program (\S+)", path.read_text())]


PAIRS = [
    pytest.param(path, name, id=f"{path.stem}-{name[6:-3]}")
    for path in FILES
    for name in programs(path)
]


def test_there_is_a_sweep_for_every_script():
    assert {read(path)["program"] for path in FILES} == set(SCRIPTS)
    assert set(programs(Path(FILES[0].parent, "architecture.yaml"))) == set(SCRIPTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_has_the_shape_that_wandb_wants(path):
    sweep = read(path)
    known = {"program", "name", "description", "method", "metric", "parameters", "command"}
    assert known <= set(sweep) <= known | {"early_terminate", "run_cap"}
    assert sweep["name"] == path.stem
    assert sweep["method"] in ("bayes", "grid")
    assert sweep["metric"]["goal"] in ("maximize", "minimize")
    assert sweep["metric"]["name"].startswith("val/")
    if sweep["method"] == "bayes":
        assert sweep["run_cap"] > 0
        early = sweep["early_terminate"]
        epochs = "classifier_epochs" if path.stem == "classifier" else "epochs"
        default = getattr(SCRIPTS[sweep["program"]].Config, epochs)
        last = sweep["parameters"].get(epochs, {"value": default})["value"]
        assert early["type"] == "hyperband"
        assert early["min_iter"] * early["eta"] < last  # it can stop a run before its end
    for name, parameter in sweep["parameters"].items():
        if sweep["method"] == "grid":
            assert set(parameter) in ({"value"}, {"values"}), name  # a grid has no distributions
        for value in values_of(parameter):
            # PyYAML reads 1e-5 as text; W&B wants both ends of one type
            assert not isinstance(value, str) or name in TEXTS, (name, value)
        if "min" in parameter:
            assert type(parameter["min"]) is type(parameter["max"]), name
            assert parameter["min"] < parameter["max"], name
            if parameter["distribution"] == "log_uniform_values":
                assert parameter["min"] > 0, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_never_sees_the_test_images(path):
    assert read(path)["parameters"]["test"] == {"value": False}


@pytest.mark.parametrize(("path", "program"), PAIRS)
def test_every_value_goes_through_the_parser_unchanged(path, program):
    for name, parameter in read(path)["parameters"].items():
        for value in values_of(parameter):
            found = getattr(parse(SCRIPTS[program].Config, [f"--{name}={value}"]), name)
            assert type(found) is type(value), (name, value)
            assert found == value or math.isclose(found, value), (name, value)


def sampled(path: Path, program: str) -> tuple[list[str], int]:
    """The flags of a small run of a sweep, and how often it has to log the metric."""
    sweep, draw = read(path), random.Random(program)
    chosen = {name: draw.choice(values_of(p)) for name, p in sweep["parameters"].items()}
    chosen |= TINY | (TINY_AE if program == "train_ae.py" else {})
    stage = "classifier_epochs" if path.stem == "classifier" else "epochs"
    chosen[stage] = 2 if "early_terminate" in sweep else 1  # hyperband counts how often it came
    chosen["batch_size"] = min(chosen.get("batch_size", 32), 64)
    chosen["width"] = 4  # whatever the encoder, one epoch in a moment
    return [f"--{name}={value}" for name, value in chosen.items()], chosen[stage]


@coarse_pictures()
@pytest.mark.parametrize(("path", "program"), PAIRS)
def test_a_sampled_command_trains_and_logs_the_metric(path, program, tmp_path):
    script, metric = SCRIPTS[program], read(path)["metric"]["name"]
    words, times = sampled(path, program)
    metrics = script.main(parse(script.Config, [*words, f"--run_dir={tmp_path / 'run'}"]))
    assert 0 <= metrics[metric] <= 1
    assert sum(metric in row for row in read_rows(tmp_path / "run/metrics.jsonl")) >= times
    assert not [name for name in metrics if name.startswith("test/")]


def test_the_command_of_an_agent_trains(run_command, tmp_path):
    path = FILES[0].with_name("joint.yaml")
    words, _ = sampled(path, "train_joint.py")
    filled = {
        "${env}": ["/usr/bin/env"],
        "accelerate": [Path(sys.executable).with_name("accelerate")],
        "${program}": [path.parents[1] / "train_joint.py"],
        "${args}": [*words, "--run_dir=run"],
    }
    done = run_command(*[w for word in read(path)["command"] for w in filled.get(word, [word])])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_passes_every_argument_behind_the_launcher(path):
    command = read(path)["command"]
    assert command[:3] == ["${env}", "accelerate", "launch"]
    # ${args_no_boolean_flags} would drop test=False
    assert command[-2:] == ["${program}", "${args}"]
    assert "--mixed_precision=no" in command
