"""Finished runs side by side, in process and small, and the bad input that people will give."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import coarse_pictures

import compare
import train_ae
import train_joint
import train_supcon
from common.config import parse
from common.data import corruptions, datasets
from common.errors import UserError
from common.evaluation import comparison, probes
from common.files import read_json, write_json
from common.run import runs, tracking

ROOT = Path(__file__).parent.parent
TINY = ("--limit_train=256", "--epochs=2", "--batch_size=32", "--width=8", "--tsne_images=40")
QUICK = ("--tracking=disabled", "--map_images=60", "--robust_images=60", "--label_draws=2")
SCRIPTS = {
    "ae": (train_ae, ("--classifier_epochs=2", "--classifier_views=2")),
    "joint-0": (train_joint, ("--learning_rate=0.05",)),
    "joint-1": (train_joint, ("--learning_rate=0.05", "--seed=1")),
    "supcon": (train_supcon, ("--encoder=cnn", "--learning_rate=0.05")),
}


def fresh() -> None:
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


def run(*folders: Path, out: Path, args=()) -> dict:
    fresh()
    names = [str(folder) for folder in folders]
    return compare.main(parse(compare.Config, [*names, f"--out={out}", *QUICK, *args]))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with one tiny run of each method, joint with two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (script, own) in SCRIPTS.items():
        args = [*TINY, *own, "--tracking=disabled", f"--run_dir={folder / name}"]
        with coarse_pictures():
            script.main(parse(script.Config, args))
        fresh()
    config = read_json(folder / "joint-1/config.json")
    write_json(folder / "joint-1/config.json", config | {"resumed": [{"rows": 3, "commit": "abc"}]})
    return folder


@pytest.fixture(scope="module")
def compared(made, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("out") / "comparison"
    return out, run(*(made / name for name in SCRIPTS), out=out)


@pytest.fixture
def damaged(made, tmp_path) -> Path:
    """A copy of the autoencoder's run, to be damaged by the test."""
    return Path(shutil.copytree(made / "ae", tmp_path / "damaged"))


def test_the_folder_holds_all_that_was_found(compared):
    out, found = compared
    names = {path.name for path in out.iterdir() if path.name[0] != "."}
    assert names == {
        *("comparison.json", "table.md", "table.csv", "sheet.png", "index.html", "figures"),
        *("config.json", "metrics.jsonl", "summary.json"),
    }
    assert {path.stem for path in (out / "figures").iterdir()} == {
        *("maps", "classes", "mistakes", "lines", "sheet")
    }
    assert read_json(out / "comparison.json") == json.loads(json.dumps(found))
    assert set(found["spaces"]) == {"ae", "joint", "supcon", "supcon projection", "pixels"}
    assert (out / "index.html").stat().st_size < 10 * 2**20
    assert found["warnings"] == []
    assert any("PCA-128 is left out" in note for note in found["notes"])
    resumed = [note for note in found["notes"] if "was stopped and resumed" in note]
    assert len(resumed) == 1 and resumed[0].endswith(
        "joint-1 was stopped and resumed (at commit abc)"
    )
    assert [run["resumed"] for run in found["runs"]["joint"]] == [
        [],
        [{"rows": 3, "commit": "abc"}],
    ]


def test_every_space_has_the_same_metrics(compared):
    _, found = compared
    of_all = {
        *("linear_accuracy", "knn_accuracy", "knn_1", "knn_20", "knn_100", "labels_10"),
        *("silhouette", "class_separation", "alignment", "uniformity", "effective_rank"),
        *("trustworthiness", "dimensions", "robust_clean", "noise_0.1", "shift_2"),
    }
    for space in found["spaces"].values():
        assert set(space["mean"]) >= of_all
        assert len(space["class_accuracy"]) == 10
    for name in ("ae", "joint", "supcon"):
        cost = {"parameters", "training_seconds", "images_per_second", "peak_gib", "accuracy"}
        assert set(found["spaces"][name]["mean"]) >= cost
    assert {"mse", "mae"} <= set(found["spaces"]["ae"]["mean"])


def test_the_figures_are_those_that_the_runs_report(made, compared):
    _, found = compared
    for name in ("ae", "supcon"):
        summary, mean = read_json(made / name / "summary.json"), found["spaces"][name]["mean"]
        assert mean["accuracy"] == pytest.approx(summary["test/accuracy"], abs=0.003)
        for key in ("knn_accuracy", "linear_accuracy"):
            assert mean[key] == pytest.approx(summary[f"test/{key}"], abs=0.01)
        for key in ("silhouette", "class_separation", "effective_rank"):
            assert mean[key] == pytest.approx(summary[f"latent/{key}"], rel=0.01)
    projection = found["spaces"]["supcon projection"]["mean"]
    assert projection["silhouette"] == pytest.approx(
        read_json(made / "supcon/summary.json")["projection/silhouette"], rel=0.01
    )
    image = found["spaces"]["pixels"]["mean"]["silhouette"]
    assert image == pytest.approx(read_json(made / "ae/summary.json")["image/silhouette"], rel=0.01)


def test_seeds_of_one_method_are_one_column(made, compared):
    out, found = compared
    joint = found["spaces"]["joint"]
    both = [read_json(made / f"joint-{seed}/summary.json")["test/accuracy"] for seed in (0, 1)]
    assert joint["n"] == 2
    assert joint["mean"]["accuracy"] == pytest.approx(np.mean(both), abs=0.003)
    assert joint["std"]["accuracy"] == pytest.approx(np.std(both, ddof=1), abs=0.005)
    header = (out / "table.md").read_text().splitlines()[0]
    assert "| joint (n=2) |" in header
    with open(out / "table.csv", encoding="utf-8") as file:
        rows = {(row["space"], row["metric"]): row for row in csv.DictReader(file)}
    row = rows["joint", "accuracy"]
    assert (float(row["mean"]), row["n"]) == (joint["mean"]["accuracy"], "2")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "summary.json").unlink(), "is not finished"),
        (lambda f: (f / "config.json").unlink(), "is no run folder: it holds no config.json"),
        (lambda f: shutil.rmtree(f), "is no folder"),
        (lambda f: (f / "encoder.safetensors").unlink(), "it lacks encoder.safetensors"),
        (lambda f: (f / "encoder.safetensors").write_bytes(b"x" * 50), "cannot be loaded"),
        (lambda f: (f / "latents.npz").write_bytes(b"PK"), "latents.npz"),
        (lambda f: (f / "config.json").write_text("{}"), "is not a run of these scripts"),
        (lambda f: (f / "summary.json").write_text("{"), "summary.json is damaged"),
        (lambda f: change(f, "facts", fingerprint="f" * 64), "learned from other images"),
        (lambda f: change(f, "facts", train_images=255), "has another split: it trained on 255"),
        (lambda f: (f / "summary.json").write_text("{}"), "left the test images unseen"),
    ],
)
def test_a_bad_run_is_named_and_the_rest_compared(
    made, damaged, tmp_path, monkeypatch, capsys, damage, reason
):
    damage(damaged)
    monkeypatch.setattr(comparison, "measure", stop)  # what comes then is tested above
    with pytest.raises(Measured):
        run(made / "joint-0", damaged, out=tmp_path / "out")
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == 1
    assert str(damaged) in lines[0] and reason in lines[0]
    # and alone it is refused
    with pytest.raises(UserError) as error:
        run(damaged, out=tmp_path / "out")
    assert reason.replace("learned from other images", "are not those of") in error.value.message
    assert "\n" not in error.value.message
    assert not (tmp_path / "out").exists()


class Measured(Exception):
    pass


def stop(*args):
    raise Measured


def change(folder: Path, part: str, **values) -> None:
    config = read_json(folder / "config.json")
    config[part] |= values
    write_json(folder / "config.json", config)


def test_runs_of_two_data_sets_are_not_mixed(made, damaged, tmp_path, monkeypatch, capsys):
    change(damaged, "facts", fingerprint="f" * 64)
    change(damaged, "settings", dataset="mnist")
    kept, left_out = runs.choose_runs([str(damaged), str(made / "joint-0"), str(made / "supcon")])
    assert [run.folder.name for run in kept] == ["joint-0", "supcon"]
    assert "dataset=mnist, the others dataset=digits" in left_out[str(damaged)]
    # of equally many, those of the first
    kept, left_out = runs.choose_runs([str(damaged), str(made / "joint-0")])
    assert [run.folder for run in kept] == [damaged]


def test_a_run_counts_once(made, tmp_path):
    copy = shutil.copytree(made / "ae", tmp_path / "copy")
    kept, left_out = runs.choose_runs([str(made / "ae"), str(made / "ae") + "/", str(copy)])
    assert len(kept) == 1
    assert all("repeats" in reason for reason in left_out.values())
    assert len(left_out) == 2


def test_other_images_in_data_dir_are_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "checksum", lambda *chunks: "0" * 64)
    with pytest.raises(UserError, match=r"are not those of .*ae .fingerprint 00000000, not"):
        run(made / "ae", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_test_images_are_another_split(made, damaged, tmp_path):
    stored = dict(np.load(damaged / "latents.npz"))
    np.savez(damaged / "latents.npz", **stored | {"labels": stored["labels"][::-1]})
    with pytest.raises(UserError, match="it was scored on other test images"):
        run(damaged, out=tmp_path / "out")


def test_an_existing_out_is_refused_and_left_alone(made, compared):
    out, _ = compared
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    with pytest.raises(UserError, match="exists; choose another --out"):
        run(made / "ae", out=out)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    with pytest.raises(UserError, match="name the folders of finished runs"):
        run(out=out)


def test_a_refusal_on_the_command_line_is_one_line(run_command, tmp_path):
    done = run_command(sys.executable, ROOT / "compare.py", "no/such/run")
    assert done.returncode == 1
    assert done.stderr == "error: no run is left to compare: no/such/run is no folder\n"


def test_wandb_gets_tables_with_one_column_per_number(made, tmp_path, monkeypatch):
    """Offline: what is sent lies in the folder of W&B's run."""
    run(made / "ae", made / "supcon", out=tmp_path / "out", args=["--tracking=offline"])
    media = tmp_path / "out/wandb"
    tables = {path.name: read_json(path) for path in media.rglob("media/table/**/*.json")}
    wide = {name: t for name, t in tables.items() if len(t["columns"]) > 100}
    assert {name.split("_")[0] for name in wide} >= {"ae", "supcon"}
    for name, table in wide.items():
        assert table["columns"][:3] == ["image", "label", "prediction"], name
        assert 1 < len(table["data"]) <= 1000
    shown = {path.name.split("_")[0] for path in media.rglob("media/images/figures/*.png")}
    assert shown == {"maps", "classes", "mistakes", "lines", "sheet"}


def test_tables_are_named_after_the_folders_however_these_are_called(made, tmp_path, monkeypatch):
    for source, name in (("joint-0", "my projection"), ("joint-1", "a/wide"), ("ae", "b/wide")):
        shutil.copytree(made / source, tmp_path / name)
    config = read_json(tmp_path / "a/wide/config.json")
    config["settings"]["learning_rate"] = 0.04  # another kind, so columns are named by the folder
    write_json(tmp_path / "a/wide/config.json", config)
    named = []
    keep = tracking.Tracker.table
    monkeypatch.setattr(
        tracking.Tracker, "table", lambda self, *words, **more: named.append(words[0]) or keep(
            self, *words, **more
        ),
    )  # fmt: skip
    folders = [tmp_path / name for name in ("my projection", "a/wide", "b/wide")]
    run(*folders, made / "supcon", out=tmp_path / "out")
    assert named == ["tables/comparison"] + [
        f"tables/embeddings/{name}"
        for name in ("my_projection", "wide", "wide-2", "supcon", "supcon_projection")
    ]


def test_runs_with_few_labels_are_probed_with_the_labels_that_they_had(tmp_path):
    few = (*TINY, "--tracking=disabled", "--labels_per_class=5", "--batch_size=16")
    # the last one draws its labels from fewer images
    words = {"joint": (), "again": ("--seed=1",), "ae": ("--limit_train=200", *SCRIPTS["ae"][1])}
    for name, more in words.items():
        script = train_ae if name == "ae" else train_joint
        with coarse_pictures():
            script.main(parse(script.Config, [*few, *more, f"--run_dir={tmp_path / name}"]))
        fresh()
    found = run(*(tmp_path / name for name in words), out=tmp_path / "out")
    assert any("50 training images, those that have a label" in line for line in found["notes"])
    for name, (first, *others) in {"joint": ("joint", "again"), "ae": ("ae",)}.items():
        for folder, metrics in zip((first, *others), found["spaces"][name]["runs"], strict=True):
            own = read_json(tmp_path / folder / "summary.json")
            assert metrics["knn_accuracy"] == pytest.approx(own["test/knn_accuracy"])
            assert metrics["linear_accuracy"] == pytest.approx(own["test/linear_accuracy"])
            assert {"knn_1", "knn_20", "labels_5"} & set(metrics) == {"knn_1", "knn_20"}
            assert "knn_100" not in metrics  # of 50 references
    # PCA and the autoencoder have learned from all 200 images of the smallest limit
    assert found["spaces"]["ae"]["mean"]["train_images"] == 200
    assert found["spaces"]["joint"]["mean"]["train_images"] == 50
    pca = read_json(tmp_path / "ae/summary.json").get("pca/mse")
    shown = found["spaces"].get("PCA-128", {"mean": {}})["mean"].get("mse")
    assert shown == (None if pca is None else pytest.approx(pca))


def test_a_run_whose_files_do_not_reach_its_figures_is_called_out(made, damaged, tmp_path):
    shutil.copy(made / "joint-0/encoder.safetensors", damaged)  # fits, but is another one
    found = run(damaged, out=tmp_path / "out")
    assert len(found["warnings"]) == 1
    assert "its files reach" in found["warnings"][0]


def test_shifts_and_noise_are_the_same_for_everyone_and_of_the_size_they_say():
    images = torch.arange(2 * 64, dtype=torch.uint8).view(2, 1, 8, 8)
    split = datasets.Split(images, torch.arange(2), torch.tensor([0, 1]))
    for kind in corruptions.CORRUPTIONS:
        one, two = (corruptions.corrupted(split, kind, 2).images(slice(0, 2)) for _ in range(2))
        assert torch.equal(one, two)
        assert one.min() >= 0 and one.max() <= 1
        same = corruptions.corrupted(split, kind, 0).images(slice(0, 2))
        assert torch.equal(same, images / 255)
    plain = images[:1].expand(40, -1, -1, -1) / 255
    moved = corruptions.shifted(plain, 3, torch.Generator().manual_seed(0))[:, 0]
    one = plain[0, 0]
    candidates = (
        torch.cat([one[3:], one[-1:].expand(3, -1)]),
        torch.cat([one[:1].expand(3, -1), one[:-3]]),
        torch.cat([one[:, 3:], one[:, -1:].expand(-1, 3)], dim=1),
        torch.cat([one[:, :1].expand(-1, 3), one[:, :-3]], dim=1),
    )
    found = [[torch.equal(image, candidate) for candidate in candidates] for image in moved]
    assert all(sum(row) == 1 for row in found)  # one of the four directions
    assert all(any(column) for column in zip(*found, strict=True))  # and each of them comes
    gray = torch.full((100, 1, 32, 32), 0.5)
    noisy = corruptions.noisy(gray, 0.1, torch.Generator().manual_seed(0))
    assert noisy.std().item() == pytest.approx(0.1, rel=0.02)


def test_classes_and_confusions_of_a_hand_made_case():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    guesses = ([0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 1, 1, 0, 2])
    spaces = [
        comparison.Space("x", {}, torch.tensor(guess), *torch.zeros(2, 1), np.zeros((1, 2)))
        for guess in guesses
    ]
    found = comparison.class_accuracies(spaces, labels, 4)
    assert found[:3].tolist() == [5 / 8, 3 / 4, 1]
    assert np.isnan(found[3])
    assert comparison.confusions(spaces, labels, 4, 5) == [(0, 1, 3 / 8), (1, 0, 1 / 4)]


def test_as_many_labels_as_there_are_and_no_more():
    latents = probes.Latents(*(torch.zeros(20, 2), torch.arange(20) % 2) * 3)
    assert probes.label_efficiency(latents, 2, comparison.LABELS_PER_CLASS, 1).keys() == {10}


def test_pca_of_very_many_dimensions_is_left_out(monkeypatch):
    monkeypatch.setattr(compare.report, "fit_pca", lambda split, dimensions: ("fitted", ""))
    assert compare.fit_pca(None, 512) == ("fitted", "")
    assert compare.fit_pca(None, 513) == (None, "measuring more than 512 dimensions takes minutes")
