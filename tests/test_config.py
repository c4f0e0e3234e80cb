import dataclasses
import json
import typing
from typing import Literal

import numpy as np
import pytest
from tyro.conf import Positional

import compare
import embed
import study
import train_ae
import train_joint
import train_supcon
from common import config as command_line
from common.config import Fraction, ImageSize, NonNegativeInt, PositiveFloat, PositiveInt, parse
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: Literal["digits", "mnist"] = "digits"  # which images
    data_dir: str = "data"  # where they lie
    epochs: PositiveInt = 3  # passes
    limit_train: PositiveInt | None = None  # only so many
    image_size: ImageSize = 32  # pixels a side
    learning_rate: PositiveFloat = 0.1  # of the optimizer
    alpha: Fraction = 0.5  # share
    seed: NonNegativeInt = 0  # of everything
    test: bool = True  # look at the test images
    tracking: Literal["auto", "disabled"] = "auto"  # W&B
    run_dir: str | None = None  # where everything goes
    resume: str | None = None  # go on


@dataclasses.dataclass(frozen=True)
class Chosen(Config):
    epochs: PositiveInt | None = None  # None: the script chooses


def make_run(folder, **changes):
    config = Config(run_dir=str(folder), **changes)
    folder.mkdir()
    text = json.dumps({"settings": dataclasses.asdict(config), "facts": {}})
    (folder / "config.json").write_text(text)
    return config


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--learning_rate", "1e-05"], "learning_rate", 1e-05),
        (["--learning-rate", "1"], "learning_rate", 1.0),
        (["--limit_train=None"], "limit_train", None),
        (["--limit_train", "7"], "limit_train", 7),
        (["--test=False"], "test", False),
        (["--test", "True"], "test", True),
        (["--dataset=mnist"], "dataset", "mnist"),
    ],
)
def test_words_as_users_and_sweeps_write_them(words, field, value):
    assert getattr(parse(Config, words), field) == value


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("epochs", value) for value in ("0", "-3", "10000000")],
        *[("learning_rate", value) for value in ("0", "-1", "nan", "inf", "1e300")],
        *[("alpha", value) for value in ("-0.1", "1.5", "nan")],
        *[("image_size", value) for value in ("0", "7", "100000")],
        *[("limit_train", value) for value in ("0", "-1")],
        ("seed", "-1"),
    ],
)
def test_numbers_out_of_range_are_one_line(flag, value):
    with pytest.raises(UserError, match=f"--{flag} .* is out of range: it must be ") as error:
        parse(Config, [f"--{flag}={value}"])
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "words", [["--dataset", "imagenet"], ["--epochs", "x"], ["--epochs", "1.5"], ["--no_such", "1"]]
)
def test_what_the_parser_refuses_ends_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as error:
        parse(Config, words)
    assert error.value.code == 2
    assert words[0].lstrip("-") in capsys.readouterr().err


def test_the_help_shows_each_field_with_its_comment(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in text
    assert "look at the test images" in text


def test_resume_takes_the_configuration_of_the_run(tmp_path):
    make_run(tmp_path / "run", epochs=7, learning_rate=0.3)
    config = parse(Config, ["--resume", str(tmp_path / "run")])
    assert (config.epochs, config.learning_rate) == (7, 0.3)
    assert config.resume == str(tmp_path / "run")
    assert config.run_dir is None


def test_resume_takes_the_flags_of_the_same_command_and_those_that_are_free(tmp_path):
    make_run(tmp_path / "run", epochs=7)
    words = ["--resume", str(tmp_path / "run"), "--epochs=7", "--data_dir=x", "--tracking=disabled"]
    config = parse(Config, words)
    assert (config.data_dir, config.tracking) == ("x", "disabled")


def test_resume_lists_every_flag_that_contradicts_the_run(tmp_path):
    make_run(tmp_path / "run", epochs=7)
    # 3 is the default of the script, but not what the run has
    words = ["--resume", str(tmp_path / "run"), "--epochs=3", "--seed=5", "--alpha=0.5"]
    with pytest.raises(UserError) as error:
        parse(Config, words)
    assert "--epochs 3 (the run has 7)" in error.value.message
    assert "--seed 5 (the run has 0)" in error.value.message
    assert "alpha" not in error.value.message


def test_a_number_that_the_run_chose_by_itself_stays_where_none_is_given(tmp_path):
    make_run(tmp_path / "run", epochs=7, seed=2)
    words = ["--resume", str(tmp_path / "run"), "--epochs"]
    assert parse(Chosen, [*words, "None"]).epochs == 7
    with pytest.raises(UserError, match=r"--epochs 8 \(the run has 7\)"):
        parse(Chosen, [*words, "8"])


def test_resume_of_a_folder_that_does_not_exist_yet_keeps_the_flags(tmp_path):
    config = parse(Config, ["--resume", str(tmp_path / "new"), "--epochs=9"])
    assert (config.resume, config.epochs) == (str(tmp_path / "new"), 9)
    with pytest.raises(UserError, match="leave --run_dir out"):
        parse(Config, ["--resume", str(tmp_path / "new"), "--run_dir", "x"])


@dataclasses.dataclass(frozen=True)
class Reader:
    run: Positional[str]  # which run
    images: Positional[tuple[str, ...]] = ()  # what it shall look at
    batch_size: PositiveInt = 8  # at a time


def test_positional_words_and_scripts_that_continue_nothing():
    for words in (["r", "a", "b", "--batch_size=3"], ["--batch-size", "3", "r", "a", "b"]):
        assert parse(Reader, words) == Reader("r", ("a", "b"), 3)
    assert parse(Reader, ["r"]) == Reader("r")
    with pytest.raises(UserError, match="--batch_size 0 is out of range"):
        parse(Reader, ["r", "--batch_size=0"])


@pytest.mark.parametrize(("name", "value"), [("epochs", "many"), ("alpha", [1])])
def test_resume_of_a_setting_of_another_type_is_one_line(tmp_path, name, value):
    make_run(tmp_path / "run")
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    config["settings"][name] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json holds a setting of another type") as error:
        parse(Config, ["--resume", str(tmp_path / "run")])
    assert "\n" not in error.value.message


def test_resume_of_another_scripts_run_is_refused(tmp_path):
    make_run(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    stored["settings"]["temperature"] = 0.1
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"another script or version \(fields: temperature\)"):
        parse(Config, ["--resume", str(tmp_path / "run")])


PLACES = {
    train_joint: ("data_dir", "run_dir"),
    train_ae: ("data_dir", "resume"),
    train_supcon: ("data_dir", "run_dir"),
    study: ("data_dir", "out"),
    compare: ("data_dir", "out", "runs"),
    embed: ("out", "run", "images"),
}


@pytest.mark.parametrize("script", PLACES, ids=lambda script: script.__name__)
def test_a_tilde_is_the_home_in_every_flag_that_names_a_place(script, monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    flags = [name for name in PLACES[script] if name not in ("run", "runs", "images")]
    positional = ["~/x", "~/x"] if script in (compare, embed) else []
    given = parse(script.Config, [*(f"--{name}=~/x" for name in flags), *positional])
    for name in PLACES[script]:
        assert set(np.atleast_1d(getattr(given, name))) == {"/users/me/x"}, name


def test_every_flag_whose_name_is_a_place_is_one():
    for script in PLACES:
        hints = typing.get_type_hints(script.Config, include_extras=True)
        named = {"data_dir", "run_dir", "resume", "out", "run", "runs", "images"} & set(hints)
        assert set(command_line._places(script.Config)) == named, script.__name__
