"""The scripts from end to end, in process and small: they learn, repeat themselves and go on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import two_processes
from safetensors.torch import load_file
from tiny import SCRIPTS, TINY, assert_same_bits, resume, rows_of, run

import train_supcon
from common import models
from common.data import datasets
from common.errors import UserError
from common.evaluation import report
from common.files import read_json
from common.run import checkpoints, runtime
from common.run.session import Session
from common.run.signals import Signals

ROOT = Path(__file__).parent.parent


def test_the_run_folder_is_whole_without_wandb(straight):
    method, folder, metrics = straight
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("config.json", "metrics.jsonl", "summary.json", "latents.npz"),
        *("encoder.safetensors", "encoder.json", "classifier.safetensors"),
        *("figures", "checkpoints"),
    }
    figures = {"confusion_matrix", "curves", "tsne", "tsne_latent", "tsne_image"}
    figures |= {"reconstructions", "interpolation"} if method == "ae" else set()
    assert {path.stem for path in (folder / "figures").iterdir()} == figures
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == pytest.approx(metrics)
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["epochs"] == 2
    assert len(config["facts"]["fingerprint"]) == 64
    assert config["facts"]["train_images"] == 256


def test_no_fact_hides_a_flag(straight):
    """W&B's configuration holds both, and in a sweep it is compared with the flags."""
    config = json.loads((straight[1] / "config.json").read_text())
    assert not set(config["settings"]) & set(config["facts"])


def test_the_contract_of_metric_names(straight):
    method, _, metrics = straight
    shape = ("silhouette", "class_separation", "alignment", "uniformity", "effective_rank")
    stage_two = ("train/classifier_loss", "val/classifier_loss")
    own = {
        "ae": {*stage_two, "val/mse", "val/mae", "test/mse", "test/mae", "best/val/mse"},
        "joint": {
            *("train/cross_entropy", "train/probability_mae", "best/val/accuracy"),
            *("train/cross_entropy_gradient_norm", "train/probability_mae_gradient_norm"),
        },
        "supcon": {
            *stage_two,
            *(f"projection/{name}" for name in ("knn_accuracy", "linear_accuracy", *shape)),
            *("train/loss_floor", "train/loss_collapse", "best/val/knn_cosine_accuracy"),
        },
    }
    assert set(metrics) >= own[method] | {
        *("train/loss", "train/learning_rate", "train/gradient_norm", "train/accuracy"),
        *("val/knn_accuracy", "val/knn_cosine_accuracy", "val/accuracy", "best/epoch"),
        *("test/accuracy", "test/knn_accuracy", "test/linear_accuracy"),
        *(f"latent/{name}" for name in shape),
        *(f"image/{name}" for name in shape),
        *("time/images_per_second", "time/epoch_seconds", "memory/peak_gib"),
    }


def test_every_metric_is_explained(straight):
    method, _, metrics = straight
    text = "".join((ROOT / "docs" / name).read_text() for name in (f"{method}.md", "metrics.md"))
    for name in metrics:
        group, _, rest = name.partition("/")
        names = [name]
        if group in ("image", "pca"):  # the same metrics elsewhere
            names += [f"latent/{rest}", f"test/{rest}"]
        elif rest.startswith("val/"):
            names += ["best/val/…"]
        assert any(f"`{known}`" in text for known in names), name


def test_it_learns(straight):
    _, folder, metrics = straight
    rows = rows_of(folder)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert metrics["test/knn_accuracy"] > 0.5
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    # a sweep optimises what comes once per epoch
    assert sum("val/knn_accuracy" in row for row in rows) == 2


def test_latents_belong_to_the_saved_encoder_and_the_test_images(straight):
    _, folder, metrics = straight
    stored = np.load(folder / "latents.npz")
    assert stored["latents"].dtype == np.float32
    assert stored["labels"].dtype == stored["predictions"].dtype == np.int64
    test = datasets.split_data(datasets.read("digits", "data", 32)).test
    assert np.array_equal(stored["labels"], test.labels.numpy())
    latents = report.encode(models.load_encoder(folder), torch.nn.Identity(), test)
    assert np.allclose(stored["latents"], latents.numpy(), atol=1e-4)
    accuracy = (stored["labels"] == stored["predictions"]).mean()
    assert accuracy == pytest.approx(metrics["test/accuracy"])


def test_another_seed_gives_other_weights(straight, tmp_path):
    method, folder, _ = straight
    run(method, tmp_path / "other", "--seed=1")
    first, other = (load_file(f / "encoder.safetensors") for f in (folder, tmp_path / "other"))
    assert any(not torch.equal(first[name], other[name]) for name in first)


# an epoch asks after each of its 8 steps
@pytest.mark.parametrize("stop_after", [5, 13])
def test_stopped_and_resumed_gives_the_same_bits(straight, tmp_path, monkeypatch, stop_after):
    method, folder, _ = straight
    asked = 0

    def agreed(self, accelerator):
        nonlocal asked
        asked += 1
        return signal.SIGTERM if asked == stop_after else 0

    with monkeypatch.context() as patch:
        patch.setattr(Signals, "agreed", agreed)
        with pytest.raises(SystemExit) as stop:
            run(method, tmp_path / "run")
    assert stop.value.code == 143
    assert not (tmp_path / "run/summary.json").exists()
    resume(method, tmp_path / "run")
    assert_same_bits(folder, tmp_path / "run")


def test_a_finished_run_says_so(straight, capsys):
    method, folder, metrics = straight
    again = resume(method, folder)
    assert "is finished already" in capsys.readouterr().out
    assert again == pytest.approx(metrics)


def test_resume_of_a_new_folder_starts_there_and_the_same_seed_gives_the_same_bits(
    straight, tmp_path
):
    method, folder, _ = straight
    resume(method, tmp_path / "new", *TINY, *SCRIPTS[method][1])
    assert_same_bits(folder, tmp_path / "new")


def test_other_images_are_not_continued_with(straight, tmp_path, monkeypatch):
    method, _, _ = straight

    def agreed(self, accelerator):
        return signal.SIGTERM

    with monkeypatch.context() as patch:
        patch.setattr(Signals, "agreed", agreed)
        with pytest.raises(SystemExit):
            run(method, tmp_path / "run")
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    monkeypatch.setattr(datasets, "checksum", lambda *chunks: "other")
    with pytest.raises(UserError, match=r"its fingerprint was .* now it is other"):
        resume(method, tmp_path / "run")


def test_an_existing_folder_without_resume_is_refused(straight):
    method, folder, _ = straight
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    with pytest.raises(UserError, match="exists; continue it with --resume"):
        run(method, folder)
    assert before == sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_size=5000"], "--batch_size 5000 is more than the 256 training images"),
        (["--dataset=folder", "--data_dir=no/such/place"], "no/such/place"),
        (["--encoder=resnet34", "--blocks=1"], "--blocks applies to --encoder cnn"),
        (["--precision=fp16"], "--precision fp16 needs a GPU"),
    ],
)
@pytest.mark.parametrize("method", SCRIPTS)
def test_bad_input_is_one_line_and_leaves_no_folder(tmp_path, monkeypatch, method, words, message):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match=message) as error:
        run(method, tmp_path / "run", *words)
    assert "\n" not in error.value.message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", SCRIPTS)
def test_without_test_the_test_images_stay_unseen(tmp_path, monkeypatch, method):
    def seen(self, positions):
        split = datasets.split_data(datasets.read("digits", "data", 32), 256)
        if len(self.source) == len(split.test.source):  # not a shifted copy of training images
            assert not set(split.test.rows.tolist()) & set(self.rows[positions].tolist())
        return original(self, positions)

    original = datasets.Split.images
    monkeypatch.setattr(datasets.Split, "images", seen)
    metrics = run(method, tmp_path / "run", "--test=False")
    unseen = ("test/", "latent/", "image/", "pca/", "projection/knn", "projection/linear")
    assert not any(name.startswith(unseen) for name in metrics)
    assert (tmp_path / "run/figures/tsne_latent.png").exists()
    assert not (tmp_path / "run/latents.npz").exists()


def test_the_classifier_stage_leaves_the_encoder_as_it_was(straight):
    """Batch norm would drift in train mode, even without gradients."""
    _, folder, _ = straight
    saved = load_file(folder / "encoder.safetensors")
    trained = checkpoints.load(folder / "checkpoints/best.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, trained[f"encoder.{name}"]), name


def test_every_script_holds_out_the_same_images(straight, monkeypatch, tmp_path):
    """The fingerprint of what is scored on validation does not depend on script or seed."""
    method, _, _ = straight
    seen = []

    class Stop(Exception):
        pass

    def look(images, *limits):
        seen.append(original(images, *limits).validation.rows)
        raise Stop

    original = datasets.split_data
    monkeypatch.setattr(datasets, "split_data", look)
    for seed in (0, 1):
        with pytest.raises(Stop):
            run(method, tmp_path / "run", f"--seed={seed}")
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    expected = original(datasets.read("digits", "data", 32), None).validation.rows
    assert all(torch.equal(rows, expected) for rows in seen)


def test_the_parts_of_the_joint_loss_are_as_large_as_the_theory_says(straight):
    method, folder, _ = straight
    if method != "joint":
        return
    first = rows_of(folder)[0]
    ratio = (
        first["train/probability_mae_gradient_norm"] / first["train/cross_entropy_gradient_norm"]
    )
    assert 0.01 < ratio < 0.04  # 2 % at uniform output and 10 classes


def test_epochs_of_a_step_share_their_checkpoints(tmp_path, monkeypatch):
    saved, save_last = [], checkpoints.save_last

    def save(folder, state):
        saved.append(state["step"])
        save_last(folder, state)

    monkeypatch.setattr(checkpoints, "save_last", save)
    words = ["--limit_train=32", "--epochs=45", "--evaluate_every=30", "--test=False"]
    run("joint", tmp_path / "run", *words, "--log_every=1000")
    assert saved == [0, 20, 30, 40, 45]  # every 20 steps, and where it is evaluated
    rows = [row["step"] for row in rows_of(tmp_path / "run") if "train/loss" in row]
    assert rows == [20, 30, 40, 45]


def test_with_few_labels_only_autoencoder_and_simclr_learn_from_the_others(straight, tmp_path):
    method, _, _ = straight
    words = ["--labels_per_class=2", "--epochs=1", "--batch_size=16", "--test=False"]
    for unsupervised in (False, True) if method == "supcon" else (False,):
        place = tmp_path / str(unsupervised)
        run(
            method,
            place,
            *words,
            f"--supervised={not unsupervised}" if unsupervised else "--seed=0",
        )
        facts = json.loads((place / "config.json").read_text())["facts"]
        assert facts["train_images"] == 20
        steps = max(row["step"] for row in rows_of(place) if "train/learning_rate" in row)
        assert steps == (256 // 16 if method == "ae" or unsupervised else 20 // 16)
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


def test_supcon_warns_when_the_loss_sits_at_collapse(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_supcon, "supcon_collapse", lambda *words: 1.0)  # any loss is above
    words = ["--epochs=3", "--test=False", "--evaluate_every=2"]
    run("supcon", tmp_path / "run", *words)
    text = capsys.readouterr().out
    assert text.count("warning: all embeddings are nearly equal") == 1
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    monkeypatch.setattr(Session, "_passes_quickly", property(lambda self: self.epoch < 1))
    run("supcon", tmp_path / "short", *words)  # no row of the first epoch
    text = capsys.readouterr().out
    assert text.count("warning: all embeddings are nearly equal") == 1


def test_supcon_without_labels_learns_and_refuses_a_single_view(tmp_path):
    words = ["--supervised=False", "--epochs=2"]
    metrics = run("supcon", tmp_path / "run", *words)
    assert metrics["train/loss"] < metrics["train/loss_collapse"]
    # labels choose no epoch: it is the last
    assert [name for name in metrics if name.startswith("best/")] == ["best/epoch"]
    assert metrics["best/epoch"] == 2
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    with pytest.raises(UserError, match="--cross_entropy_weight needs labels"):
        run("supcon", tmp_path / "one", *words, "--cross_entropy_weight=1")
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    with pytest.raises(UserError, match="--views 1 leaves no positives"):
        run("supcon", tmp_path / "one", *words, "--views=1")
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    with pytest.raises(UserError, match=r"--temperature 0\.001 is too low"):
        run("supcon", tmp_path / "one", "--temperature=0.001")


def test_supcon_without_a_head_has_one_space(tmp_path):
    metrics = run("supcon", tmp_path / "run", "--epochs=1", "--head=none", "--views=1")
    assert not any(name.startswith("projection/") for name in metrics)
    assert not (tmp_path / "run/head.safetensors").exists()
    with np.load(tmp_path / "run/latents.npz") as arrays:
        assert "projections" not in arrays


def test_supcon_with_cross_entropy_logs_both_parts_of_its_loss(tmp_path):
    run("supcon", tmp_path / "run", "--epochs=1", "--cross_entropy_weight=0.5")
    row = next(row for row in rows_of(tmp_path / "run") if "train/loss" in row)
    parts = row["train/contrastive"] + 0.5 * row["train/cross_entropy"]
    assert row["train/loss"] == pytest.approx(parts)
    assert "train/loss_floor" not in row  # of the contrastive part alone


@pytest.mark.parametrize("method", ["joint", "supcon"])
def test_one_class_is_nothing_to_learn_from(tmp_path, method):
    from PIL import Image

    folder = tmp_path / "pets/train/cats"
    folder.mkdir(parents=True)
    for n in range(60):
        Image.new("L", (32, 32), n).save(folder / f"{n}.png")
    with pytest.raises(UserError, match="all images are of one class"):
        run(method, tmp_path / "run", "--dataset=folder", f"--data_dir={tmp_path / 'pets'}")
    assert not (tmp_path / "run").exists()


def test_folders_of_images_go_through_with_the_pca_line(tmp_path):
    from PIL import Image

    random = np.random.RandomState(0)
    for part, count in (("train", 60), ("test", 20)):
        for name in ("cats", "dogs"):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            for n in range(count):
                shape = (40, 36 + n % 9, 3)
                base = 60 if name == "cats" else 160
                pixels = (base + random.randint(0, 90, shape)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    metrics = run(
        "ae",
        tmp_path / "run",
        "--dataset=folder",
        f"--data_dir={tmp_path / 'pets'}",
        "--limit_train=90",
        "--batch_size=16",
        "--latent_dim=4",
        "--epochs=8",
        "--classifier_epochs=30",
    )
    assert metrics["test/accuracy"] > 0.9
    assert 0 < metrics["pca/mse"] < 0.1
    assert metrics["pca/accuracy"] > 0.9
    assert metrics["val/pca_mse"] > 0


@pytest.mark.parametrize("method", ["ae", "joint"])
def test_the_linear_code_stands_beside_the_latents_and_not_in_their_place(method, tmp_path):
    metrics = run(method, tmp_path / "run", "--latent_dim=6", "--epochs=1")
    assert metrics["pca/linear_accuracy"] > 0.5
    latents = np.load(tmp_path / "run/latents.npz")
    assert latents["latents"].shape == (len(latents["labels"]), 6)


def test_training_and_measuring_may_be_on_two_devices(straight, tmp_path, monkeypatch):
    """As on Apple's GPU, which nobody had here: what is measured is moved, and moved back."""
    method, folder, _ = straight
    moves = []

    def on_another(device):
        return torch.device(device.type, 0)  # the same memory, by another name

    def move(module, *words, **options):
        moves.append((type(module).__name__, words[0] if words else None))
        return to(module, *words, **options)

    to = torch.nn.Module.to
    monkeypatch.setattr(runtime, "measuring_device", on_another)
    monkeypatch.setattr(torch.nn.Module, "to", move)
    run(method, tmp_path / "run")
    there = [name for name, device in moves if device == torch.device("cpu", 0)]
    back = [name for name, device in moves if device == torch.device("cpu")]
    network = {"ae": "Autoencoder", "joint": "JointClassifier", "supcon": "SupConNet"}[method]
    for name in (network, "Preprocess"):
        assert there.count(name) == 3  # after two epochs and at the end
        assert back.count(name) >= 2  # at the start, and before the second epoch
    assert_same_bits(folder, tmp_path / "run")


def test_an_autoencoder_that_begins_as_pca_is_never_far_above_it(tmp_path):
    words = ("--linear_path=True", "--latent_dim=8", "--learning_rate=0.0001")
    found = run("ae", tmp_path / "run", *words)
    assert found["test/mse"] < 1.02 * found["pca/mse"]
    beside = models.load_encoder(tmp_path / "run")[1]
    assert isinstance(beside, models.BesideLinear) and beside.linear.weight.shape == (8, 32 * 32)
    with pytest.raises(UserError, match="begins as PCA, but the images have at most 128 degrees"):
        run("ae", tmp_path / "exact", "--linear_path=True")
    assert not (tmp_path / "exact").exists()


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    """The folder with a run of each case of two_processes.py, all of them from one launch."""
    folder = tmp_path_factory.mktemp("two")
    program = (ROOT / "tests/two_processes.py", folder)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    done = subprocess.run(
        [str(word) for word in (*launcher, *program)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", two_processes.CASES)
def test_two_processes_train_like_one(tmp_path, monkeypatch, in_two_processes, case):
    """One run folder, one stream of rows; without batch norm the same weights to rounding."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    one, two = tmp_path / case, in_two_processes / case
    two_processes.train(case, one)

    first, second = (load_file(folder / "encoder.safetensors") for folder in (one, two))
    for name in first:
        assert torch.allclose(first[name], second[name], atol=2e-5), name
    rows, others = rows_of(one), rows_of(two)
    assert [set(row) for row in rows] == [set(row) for row in others]
    for name in set().union(*rows):
        if name.startswith("train/") and "accuracy" not in name:
            first, second = (next(r[name] for r in part if name in r) for part in (rows, others))
            assert first == pytest.approx(second, rel=1e-3), name
    counts = [read_json(folder / "config.json")["facts"]["processes"] for folder in (one, two)]
    assert counts == [1, 2]


def test_processes_that_do_not_know_of_each_other_stop_with_one_line(tmp_path, run_command):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    words = [ROOT / "train_ae.py", *TINY, "--run_dir=run"]
    done = run_command(*launcher, *words)
    if done.returncode == 0:  # up to Accelerate 1.10 they do know
        assert read_json(tmp_path / "run/config.json")["facts"]["processes"] == 2
        return
    assert done.stderr.count("put ACCELERATE_USE_CPU=true before torchrun") == 1
    assert not (tmp_path / "run").exists()
