"""What is a run called, and where does it lie?"""

from pathlib import Path

import pytest

import train_supcon
from common.config import parse
from common.errors import UserError
from common.run import runs


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)


def test_new_run_dirs_differ_and_nothing_is_created(monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda form: "20250102-030405")
    found = {runs.choose_run_dir(None, None, "ae", "digits") for _ in range(5)}
    assert len(found) == 5 and not Path("runs").exists()
    assert all(path.parent == Path("runs") for path in found)
    assert {path.name[:26] for path in found} == {"ae-digits-20250102-030405-"}
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert runs.choose_run_dir(None, None, "ae", "digits").name[-4:] == "-abc"


def test_choose_run_dir_refuses_what_would_overwrite_or_fail():
    with pytest.raises(UserError, match="exclude each other"):
        runs.choose_run_dir("a", "b", "ae", "digits")
    Path("used").mkdir()
    assert runs.choose_run_dir("used", None, "ae", "digits") == Path("used")  # empty
    assert runs.choose_run_dir(None, "used", "ae", "digits") == Path("used")
    Path("used", ".lock").touch()
    assert runs.choose_run_dir(None, "used", "ae", "digits") == Path("used")  # killed at once
    Path("used", "photo.png").touch()
    with pytest.raises(UserError, match="used exists; continue it with --resume used, or choose"):
        runs.choose_run_dir("used", None, "ae", "digits")
    with pytest.raises(UserError, match=r"no config.json"):
        runs.choose_run_dir(None, "used", "ae", "digits")
    Path("used", "config.json").touch()
    assert runs.choose_run_dir(None, "used", "ae", "digits") == Path("used")
    assert runs.choose_run_dir(None, "new", "ae", "digits") == Path("new")
    with pytest.raises(UserError, match=r"cannot write to used/photo.png/run"):
        runs.choose_run_dir("used/photo.png/run", None, "ae", "digits")
    with pytest.raises(UserError, match=r"used/photo.png is no folder"):
        runs.choose_run_dir("used/photo.png", None, "ae", "digits")


def labels_of(*words: str) -> dict:
    settings = vars(parse(train_supcon.Config, words))
    return runs.labels("supcon", settings, vars(train_supcon.Config()))


def test_a_name_says_method_data_set_and_what_differs():
    assert labels_of()["name"] == "supcon digits"
    words = ("--dataset=mnist", "--temperature=0.123456", "--encoder=cnn", "--augment=crop_flip")
    labels = labels_of(*words, "--run_dir=there", "--log_every=3", "--tracking=offline")
    assert labels["name"] == "supcon mnist: encoder=cnn temperature=0.123 augment=crop_flip"
    assert (labels["group"], labels["job_type"]) == ("mnist", "supcon")


def test_a_folder_of_images_is_named():
    labels = labels_of("--dataset=folder", "--data_dir=photos/pets/")
    assert labels["name"] == "supcon pets" and labels["group"] == "pets"
    assert labels["tags"] == ["supcon", "pets", "resnet18"]


def test_a_folder_whose_name_is_no_text_is_named_with_escapes():
    labels = labels_of("--dataset=folder", "--data_dir=caf\udce9")
    assert labels["name"] == "supcon caf\\xe9" and "caf\\xe9" in labels["tags"]


def made(folder: str, **settings) -> runs.Run:
    settings = vars(parse(train_supcon.Config, ())) | settings
    return runs.Run(Path(folder), "supcon", settings, {"fingerprint": "0"}, {}, [], [])


def test_repetitions_differ_in_nothing_that_changes_the_result():
    first = made("a")
    assert runs.kind_of(first) == runs.kind_of(made("b", seed=1, labels="/moved/labels.csv"))
    for name in ("evaluate_every", "knn_images", "temperature"):  # the first two choose the epoch
        assert runs.kind_of(first) != runs.kind_of(made("b", **{name: 7}))


def test_no_run_takes_the_name_of_another_space():
    folders = ("PCA-128", "pixels", "a projection", "a", "b/a")
    found = [made(folder, width=k) for k, folder in enumerate(folders)]
    assert list(runs.by_name(found)) == ["PCA-128′", "pixels′", "a projection′", "a", "a′"]


def test_tags_are_those_of_the_run_and_of_the_user_each_once():
    assert labels_of("--tags= a,b, ,digits")["tags"] == ["supcon", "digits", "resnet18", "a", "b"]
    long = labels_of(f"--tags={'x' * 100}")["tags"]
    assert max(map(len, long)) == 64


def test_a_name_is_never_too_long_for_wandb(monkeypatch):
    monkeypatch.setattr(runs, "LONGEST_NAME", 30)
    name = labels_of("--encoder=cnn", "--temperature=0.2")["name"]
    assert name == "supcon digits: encoder=cnn te…"
