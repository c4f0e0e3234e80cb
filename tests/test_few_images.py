"""Runs on few or unbalanced images: how long they train by default, and --balance."""

import numpy as np
import pytest
from PIL import Image
from tiny import SCRIPTS, TINY, assert_same_bits, resume, rows_of, run

from common.files import read_json
from common.run import sampling, session
from common.run.signals import Signals


@pytest.fixture
def at_least_12_steps(monkeypatch):
    """In place of 1000, and 2 epochs in place of 20."""
    monkeypatch.setattr(sampling, "FEWEST_STEPS", 12)
    monkeypatch.setattr(sampling, "EPOCHS", 2)
    monkeypatch.setattr(session, "EPOCHS", 2)


@pytest.mark.parametrize("method", ["ae", "joint", "supcon"])
def test_the_chosen_number_of_epochs_is_said_and_kept(tmp_path, capsys, at_least_12_steps, method):
    few = ("--limit_train=64", "--test=False", "--epochs=None")  # 2 steps an epoch
    run(method, tmp_path / "run", *few)
    assert "has 2 steps, so the training takes 6 epochs in place of 2" in capsys.readouterr().out
    settings = read_json(tmp_path / "run/config.json")["settings"]
    assert (settings["epochs"], settings["evaluate_every"]) == (6, 3)
    rows = rows_of(tmp_path / "run")
    assert max(row["step"] for row in rows if "train/loss" in row) == 12
    assert [row["epoch"] for row in rows if "val/knn_accuracy" in row][:2] == [3, 6]


def test_it_is_resumed_by_the_same_command(tmp_path, capsys, monkeypatch, at_least_12_steps):
    """Also stopped in an epoch that is not evaluated."""
    words = ("--limit_train=64", "--epochs=None", "--evaluate_every=None", "--test=False")
    run("joint", tmp_path / "straight", *words)
    flags = [word for word in TINY if "epochs=2" not in word and "limit" not in word]
    command = (*flags, *SCRIPTS["joint"][1], *words)
    asked = 0

    def agreed(self, accelerator):
        nonlocal asked
        asked += 1
        return 15 if asked == 9 else 0

    monkeypatch.setattr(Signals, "agreed", agreed)
    with pytest.raises(SystemExit):
        resume("joint", tmp_path / "run", *command)  # begins there
    assert rows_of(tmp_path / "run")[-1]["step"] < 12
    capsys.readouterr()
    resume("joint", tmp_path / "run", *command)
    assert "in place of" not in capsys.readouterr().out  # it was said
    assert_same_bits(tmp_path / "straight", tmp_path / "run")


@pytest.fixture
def unbalanced(tmp_path):
    """A folder of two classes, one dark with 120 images and one bright with 9."""
    random = np.random.default_rng(0)
    for part, counts in (("train", (120, 9)), ("test", (8, 8))):
        for name, count, level in zip(("dark", "light"), counts, (90, 120), strict=True):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = random.normal(level, 40, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{n}.png")
    return ("--dataset=folder", f"--data_dir={tmp_path / 'images'}", "--image_size=16")


@pytest.mark.parametrize("method", ["joint", "supcon"])
def test_balance_draws_the_rare_class_as_often(tmp_path, unbalanced, monkeypatch, method):
    seen = []
    original = session.Session.batches

    def batches(self):
        for step, positions, batch in original(self):
            seen.append(positions)
            yield step, positions, batch

    monkeypatch.setattr(session.Session, "batches", batches)
    for balance in (False, True):
        seen.clear()
        run(method, tmp_path / f"{balance}", *unbalanced, f"--balance={balance}")
        steps = rows_of(tmp_path / f"{balance}")[-1]["step"]
        assert len(seen) == 2 * (116 // 32)  # a tenth is held out; as many steps with balance
        is_beyond = [int((positions >= 116).sum()) for positions in seen]  # copies
        assert (sum(is_beyond) > 0) == balance
        assert steps >= len(seen)


@pytest.mark.parametrize(("method", "words"), [("ae", ()), ("supcon", ("--supervised=False",))])
def test_balance_says_what_it_does_where_labels_are_not_learned_from(
    tmp_path, unbalanced, capsys, method, words
):
    run(method, tmp_path / "plain", *unbalanced, *words)
    assert "see the accuracy of each class, and --balance" in capsys.readouterr().err
    run(method, tmp_path / "run", *unbalanced, *words, "--balance=True")
    said = "--balance weighs the classifier alone: the encoder learns without labels"
    assert said in capsys.readouterr().out
    encoder, classifier = (
        [(tmp_path / name / file).read_bytes() for name in ("plain", "run")]
        for file in ("encoder.safetensors", "classifier.safetensors")
    )
    assert encoder[0] == encoder[1]
    assert classifier[0] != classifier[1]
