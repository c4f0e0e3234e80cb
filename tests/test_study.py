import json
import shlex

import numpy as np
import pytest
from PIL import Image
from tiny import coarse_pictures, rows_of

import compare
import study
from common.config import parse
from common.data import layout
from common.errors import UserError
from common.evaluation import geometry, probes
from common.files import lock, read_json, write_json
from common.run.runtime import usable_cores

TINY = (
    *("--encoder=cnn", "--width=4", "--image_size=16", "--limit_train=96", "--batch_size=32"),
    *("--seeds=1", "--tracking=disabled", "--labels_per_class", "2", "all"),
)


@pytest.fixture(autouse=True)
def quick_measuring(monkeypatch):
    """Of so few images, classifiers and maps take longer than the training."""
    monkeypatch.setattr(probes, "FEWEST_STEPS", 20)
    monkeypatch.setattr(geometry, "tsne", lambda latents, seed: latents[:, :2].numpy())


@pytest.fixture
def no_comparison(monkeypatch):
    """A list of what compare.py was asked to compare, in place of the comparison."""
    asked = []

    def remember(config, recommend):
        asked.append(config)
        lines = recommend({folder: np.full(5, 0.5) for folder in config.runs})
        return {"recommendation": lines}

    monkeypatch.setattr(compare, "main", remember)
    return asked


def run(out, *words: str) -> dict:
    with coarse_pictures():
        return study.main(parse(study.Config, [*TINY, *words, f"--out={out}"]))


def test_a_study_from_end_to_end(tmp_path, no_comparison, capsys):
    found = run(tmp_path / "study", "--epochs=1")
    names = [
        f"{method}-{labels}-seed0"
        for labels in ("2", "all")
        for method in ("ae", "joint", "supcon", "simclr")
    ]
    assert sorted(p.name for p in (tmp_path / "study/runs").iterdir()) == sorted(names)
    for name in names:
        config = json.loads((tmp_path / "study/runs" / name / "config.json").read_text())
        settings, facts = config["settings"], config["facts"]
        assert facts["train_images"] == (20 if "-2-" in name else 96)
        assert ("trained_by" in facts) == (name in ("ae-2-seed0", "simclr-2-seed0"))
        for key, value in {"encoder": "cnn", "width": 4, "augment": "contrastive"}.items():
            assert settings[key] == value
        assert settings["group"] == "study study"
        assert settings.get("supervised", True) == ("simclr" not in name)
        learns_from_all = name.startswith(("ae", "simclr")) or "-all-" in name
        assert settings["batch_size"] == (32 if learns_from_all else 20)
    asked = no_comparison[0]
    folders = [str(tmp_path / "study/runs" / name) for name in names if "-all-" in name]
    assert list(asked.runs) == folders

    lines = found["recommendation"]
    titles = [line.split(":")[0] for line in lines]
    assert titles == [
        "highest accuracy with all labels",
        "highest accuracy with 2 labels per class",
        "retrieval of similar images",
        "robust to noise and shift",
        "reconstruction",
        "cheapest within 1 point of the best accuracy",
        "one seed",
    ]
    report = tmp_path / "study/report"
    text = (report / "study.md").read_text()
    assert text.startswith("# Recommendation\n\n") and all(f"- {line}\n" in text for line in lines)
    assert "| linear probe |" in text and "**2 labels per class**" in text
    assert text.count("| seconds of training |") == 2
    for line in [line for line in text.splitlines() if line.startswith("| linear probe |")]:
        *_, pixels = [cell.strip() for cell in line.strip("|").split("|")]
        assert 20 < float(pixels.rstrip("%")) < 100  # of digits, from 2 labels per class up
    for name in ("accuracy_by_labels", "accuracy_by_seconds"):
        assert (report / "figures" / f"{name}.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert all(f"- {line}" in shown for line in lines)

    # again: nothing is trained anew, the same is found
    before = {name: rows_of(tmp_path / "study/runs" / name) for name in names}
    assert run(tmp_path / "study", "--epochs=1") == found
    assert {name: rows_of(tmp_path / "study/runs" / name) for name in names} == before
    with pytest.raises(UserError, match=r"holds a study with --epochs 1; take these, or another"):
        run(tmp_path / "study", "--epochs=2")
    path = tmp_path / "study/study.json"
    write_json(path, read_json(path) | {"fingerprint": "that of other images"})
    with pytest.raises(UserError, match=r"are not those that the study in .* began with; restore"):
        run(tmp_path / "study", "--epochs=1")


def test_the_time_is_turned_into_epochs_that_are_written_down(tmp_path, no_comparison, monkeypatch):
    def speeds(config, kinds, available):
        assert kinds == [("ae", 32), ("joint", 20), ("joint", 32)] and available == 96
        return {("joint", 32): 96.0, ("joint", 20): 48.0, ("ae", 32): 48.0}  # images per second

    monkeypatch.setattr(study, "speeds", speeds)
    words = ("--methods", "ae", "joint", "--minutes", str(7.5 / 60))
    run(tmp_path / "study", *words)  # 2.5 s for each of three trainings
    stored = json.loads((tmp_path / "study/study.json").read_text())
    epochs = {
        name: int(shlex.split(command)[shlex.split(command).index("--epochs") + 1])
        for name, command in stored["commands"].items()
    }
    assert epochs == {
        "ae-2-seed0": 1,  # 96 images in 2 s; those of ae-all-seed0
        "joint-2-seed0": 6,  # 20 images in 0.42 s
        "ae-all-seed0": 1,
        "joint-all-seed0": 2,
    }
    assert stored["commands"]["ae-2-seed0"].startswith("python train_ae.py --dataset digits ")
    with pytest.raises(
        UserError, match=r"one epoch of ae-2-seed0 takes 2\.0 s; take at least 0\.1"
    ):
        run(tmp_path / "short", "--methods", "ae", "joint", "--minutes", str(4 / 60))
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize(("jobs", "epochs"), [(1, 5), (2, 10), (3, 10), (4, 20), (8, 20)])
def test_the_time_is_that_of_the_wall_clock(tmp_path, monkeypatch, jobs, epochs):
    monkeypatch.setattr(study, "speeds", lambda config, kinds, _: dict.fromkeys(kinds, 96.0))
    words = (*TINY, "--seeds=2", "--methods", "ae", "joint", "--labels_per_class", "all")
    config = parse(study.Config, [*words, "--minutes", str(20 / 60), f"--jobs={jobs}"])
    members = [study.Member(f"{m}{n}", m, "all", n) for m in ("ae", "joint") for n in (0, 1)]
    for flags in study.plan(config, tmp_path / "study", members).values():
        assert flags[flags.index("--epochs") + 1] == str(epochs)  # of one second each


def test_a_trial_measures_the_speed_of_training():
    config = parse(study.Config, [*TINY, "--epochs=1", "--methods", "joint"])
    few, many = study.speeds(config, [("joint", 20), ("joint", 32)], 96).values()
    assert 10 < few < 1e6 and 10 < many < 1e6 and few != many


@pytest.mark.parametrize(("jobs", "methods"), [(1, ("ae", "simclr")), (2, ("simclr",))])
def test_what_learns_without_labels_is_trained_once(tmp_path, no_comparison, jobs, methods):
    words = ("--epochs=2", "--methods", *methods, methods[0], f"--jobs={jobs}")
    assert run(tmp_path / "study", *words)["failed"] == {}
    runs = tmp_path / "study/runs"
    for method in methods:
        folders = [runs / f"{method}-{labels}-seed0" for labels in ("2", "all")]
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        assert [c["facts"].get("trained_by") for c in configs] == [f"{method}-all-seed0", None]
        assert [c["settings"]["labels_per_class"] for c in configs] == [2, None]
        assert len({c["facts"]["wandb_id"] for c in configs}) == 2
        assert all(json.loads((f / "encoder.json").read_text()) for f in folders)
        weights = [(folder / "encoder.safetensors").read_bytes() for folder in folders]
        assert weights[0] == weights[1]
        # the classifiers are their own
        weights = [(folder / "classifier.safetensors").read_bytes() for folder in folders]
        assert weights[0] != weights[1]
        # one pass of the training: the same rows, and the same time
        losses = [[r["train/loss"] for r in rows_of(f) if "train/loss" in r] for f in folders]
        assert losses[0] == losses[1] and len(losses[0]) > 0
        # but neighbors with labels of one's own, measured at the end alone
        measured = [sum("val/knn_accuracy" in row for row in rows_of(f)) for f in folders]
        assert measured == [1, 2]
        assert [len(c.get("resumed", [])) for c in configs] == [0, 0]
    if jobs > 1:  # the threads of the run below are others
        return
    # alone, with the command in study.json, it finds the same
    stored = json.loads((tmp_path / "study/study.json").read_text())
    command = shlex.split(stored["commands"]["ae-2-seed0"])[2:]
    config = parse(study.train_ae.Config, [*command, f"--run_dir={tmp_path / 'alone'}"])
    with coarse_pictures():
        alone = study.train_ae.main(config)
    shared = json.loads((runs / "ae-2-seed0/summary.json").read_text())
    assert {k: v for k, v in alone.items() if k.startswith(("test/", "latent/"))} == {
        k: v for k, v in shared.items() if k.startswith(("test/", "latent/"))
    }


def test_where_the_trainer_has_failed_each_trains_itself(tmp_path, no_comparison, monkeypatch):
    main = study.train_ae.main

    def failing(config):
        if not config.labels_per_class:
            raise UserError("the disk is on fire")
        return main(config)

    monkeypatch.setattr(study.train_ae, "main", failing)
    found = run(tmp_path / "study", "--epochs=1", "--methods", "ae", "joint")
    assert found["failed"] == {"ae-all-seed0": "the disk is on fire"}
    config = json.loads((tmp_path / "study/runs/ae-2-seed0/config.json").read_text())
    assert "trained_by" not in config["facts"] and config["facts"]["train_images"] == 20


def test_several_runs_at_a_time(tmp_path, no_comparison, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = ("--epochs=1", "--methods", "joint", "supcon", "--labels_per_class", "all")
    found = run(tmp_path / "study", *words, "--jobs=2", "--learning_rate=1e-3")
    assert found["failed"] == {}
    for name in ("joint-all-seed0", "supcon-all-seed0"):
        facts = json.loads((tmp_path / "study/runs" / name / "config.json").read_text())["facts"]
        assert facts["threads"] == max(1, usable_cores() // 2)
        assert "epoch 1/" in (tmp_path / "study/logs" / f"{name}.log").read_text()
    # one at a time finds them finished; the number of jobs is no setting of the study
    assert run(tmp_path / "study", *words, "--learning_rate=1e-3") == found


def test_a_run_that_fails_is_named_and_the_others_compared(tmp_path, no_comparison, monkeypatch):
    main = study.train_joint.main

    def failing(config):
        if config.labels_per_class:
            raise UserError("the disk is on fire")
        return main(config)

    monkeypatch.setattr(study.train_joint, "main", failing)
    found = run(tmp_path / "study", "--epochs=1", "--methods", "joint", "supcon")
    assert found["failed"] == {"joint-2-seed0": "the disk is on fire"}
    assert "failed, left out: joint-2-seed0 (the disk is on fire)" in found["recommendation"]
    monkeypatch.setattr(study.train_joint, "main", main)  # the same command trains what is missing
    assert run(tmp_path / "study", "--epochs=1", "--methods", "joint", "supcon")["failed"] == {}


def test_a_run_whose_latents_are_lost_is_left_out(tmp_path, no_comparison):
    words = ("--epochs=1", "--methods", "joint", "supcon", "--labels_per_class", "all")
    assert run(tmp_path / "study", *words)["failed"] == {}
    path = tmp_path / "study/runs/joint-all-seed0/latents.npz"
    for damage in (lambda: path.write_bytes(path.read_bytes()[:99]), path.unlink):
        damage()
        found = run(tmp_path / "study", *words)
        assert list(found["failed"]) == ["joint-all-seed0"]
        assert f"{path} is missing or damaged" in found["failed"]["joint-all-seed0"]
        assert found["recommendation"][-1].startswith("failed, left out: joint-all-seed0")


def test_a_study_that_is_running_is_not_joined(tmp_path):
    words = ("--epochs=1", "--methods", "joint", "--labels_per_class", "all")
    (tmp_path / "study").mkdir()
    with lock(tmp_path / "study" / study.LOCK), pytest.raises(UserError, match="in use by another"):
        run(tmp_path / "study", *words)
    assert [path.name for path in (tmp_path / "study").iterdir()] == [study.LOCK]


def test_an_error_of_any_kind_leaves_the_others(tmp_path, no_comparison, monkeypatch, capsys):
    monkeypatch.setattr(study.train_ae, "main", lambda config: 1 / 0)
    words = ["--epochs=1", "--methods", "ae", "joint", "--labels_per_class", "all"]
    assert run(tmp_path / "study", *words)["failed"] == {"ae-all-seed0": "division by zero"}
    assert "ZeroDivisionError" in capsys.readouterr().err  # with its trace


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say how long to train"),
        (("--minutes=1", "--epochs=1"), "say how long to train"),
        (("--epochs=1", "--labels_per_class", "ten"), "--labels_per_class ten: give numbers"),
        (("--epochs=1", "--labels_per_class", "0"), "--labels_per_class 0: give numbers"),
        (("--epochs=1", "--labels_per_class", "99"), "--labels_per_class 99: class"),
        (("--epochs=1", "--methods"), "--methods and --labels_per_class need"),
    ],
)
def test_what_makes_no_study_is_one_line_and_leaves_nothing(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "study", *words)
    assert not (tmp_path / "study").exists()


def test_a_folder_of_something_else_stays_as_it_is(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    with pytest.raises(UserError, match="exists and holds no study"):
        run(folder, "--epochs=1")
    assert [path.name for path in folder.iterdir()] == ["a.png"]


def test_what_all_runs_would_say_of_the_images_is_said_once(capsys):
    with layout.said_once():
        layout.say(["classes are unbalanced", "2 images left out"])
        layout.say(["classes are unbalanced", "1 image left out"])
    layout.say(["classes are unbalanced"])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        *("classes are unbalanced", "2 images left out", "1 image left out"),
        "classes are unbalanced",
    ]
