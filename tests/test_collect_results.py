"""The tables of RESULTS.md come from run folders, and say what they say."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_ae
import train_joint
from common.config import parse
from common.errors import UserError
from common.run.sampling import with_epochs

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import collect_results

ROOT = Path(__file__).parents[1]
PAGES = {"RESULTS.md": ("tables", "recipes", "tries"), "README.md": ("tables",)}


@pytest.fixture(autouse=True)
def a_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(collect_results, "ROOT", tmp_path)
    monkeypatch.setattr(collect_results, "KEPT", tmp_path / "results.jsonl")


def make_run(folder: Path, summary: dict, **settings) -> Path:
    folder.mkdir()
    settings = {"dataset": "mnist", "epochs": 4, "evaluate_every": 1, **settings}
    settings = dataclasses.asdict(train_ae.Config(**settings))
    facts = {"method": "ae", "fingerprint": "0" * 64, "device": "a CPU, 2 cores", "threads": 2}
    facts |= {"processes": 1, "python": "3", "torch": "2", "commit": "abc", "mixed_precision": "no"}
    facts |= {"parameters": 1, "train_images": 1, "class_names": ["a", "b"]}
    (folder / "config.json").write_text(json.dumps({"settings": settings, "facts": facts}))
    (folder / "summary.json").write_text(json.dumps({"test/accuracy": 0.5} | summary))
    for name in ("encoder.json", "encoder.safetensors", "classifier.safetensors"):
        (folder / name).touch()
    # every second epoch was looked at: 45 s on average, 4 epochs
    cost = {"time/images_per_second": 1.0, "memory/peak_gib": 1.0}
    rows = [
        {"step": epoch, "epoch": epoch, "time/epoch_seconds": seconds, **cost}
        for epoch, seconds in ((2, 30.0), (4, 60.0))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def cells(text: str) -> list[list[str]]:
    """The rows of the first table in a text."""
    lines = text[text.index("|") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named(text: str) -> list[dict[str, str]]:
    """The rows of a data set's table, by the names of the columns."""
    return [dict(zip(collect_results.COLUMNS, row, strict=True)) for row in cells(text)]


def test_seeds_of_one_setting_are_one_row(tmp_path):
    reached = [0.97, 0.99, 0.98]
    runs = [
        make_run(tmp_path / f"run{n}", {"test/accuracy": value, "test/mse": 0.1}, seed=n)
        for n, value in enumerate(reached)
    ]
    other = make_run(tmp_path / "other", {"test/accuracy": 0.5}, latent_dim=8, test=True)
    text = collect_results.main([*runs, other], keep=False)
    assert "### MNIST" in text
    wide, narrow = named(text)
    assert (wide["row"], narrow["row"]) == ("1", "2")
    assert wide["classifier %"] == "98.00 ± 1.00"
    assert (wide["n"], wide["encoder training"], wide["report %"]) == ("3", "3 min", "98.18")
    assert wide["MSE (PCA)"] == "0.10000 ± 0.00000"
    assert (wide["linear %"], wide["MAE (PCA)"]) == ("–", "–")
    assert (narrow["classifier %"], narrow["latents"], wide["latents"]) == ("50.00", "8", "128")
    assert "\n# row 2\npython train_ae.py --dataset mnist --epochs 4 --latent_dim 8\n" in text
    assert (wide["classifier on PCA %"], wide["peer %"]) == ("–", "96")
    assert "Seeds 0, 1, 2; a CPU, 2 cores; threads 2" in text


def test_joint_and_contrastive_rows_with_the_same_training_are_paired_by_seed(tmp_path):
    shared = {"dataset": "mnist", "encoder": "airbench", "epochs": 4, "batch_size": 50}
    shared |= {"learning_rate": 0.2, "schedule": "linear", "augment": "affine", "optimizer": "muon"}
    reached = {"joint": [0.92, 0.95, 0.94], "supcon": [0.90, 0.92, 0.93]}
    folders = []
    for method, values in reached.items():
        script = collect_results.SCRIPTS[method]
        for seed, value in enumerate(values):
            folder = make_run(tmp_path / f"{method}{seed}", {"test/accuracy": value})
            config = json.loads((folder / "config.json").read_text())
            config["settings"] = dataclasses.asdict(script.Config(**shared, seed=seed))
            config["facts"]["method"] = method
            (folder / "config.json").write_text(json.dumps(config))
            folders.append(folder)
    text = collect_results.main(folders, keep=False)
    # 2, 3 and 1 points: 1 / √3 times the quantile of two degrees of freedom, 4.303
    assert "Row 1 minus row 2, with the same network, epochs, batches and optimizer: " in text
    assert "optimizer: 2.00 ± 2.48 points (95 %, paired over seeds 0, 1, 2).\n" in text
    assert "minus row" not in collect_results.main(folders[:4], keep=False)  # one common seed
    config["settings"]["epochs"] = 5
    for folder in folders[3:]:
        config["settings"]["seed"] = int(folder.name[-1])
        (folder / "config.json").write_text(json.dumps(config))
    assert "minus row" not in collect_results.main(folders, keep=False)


def test_seeds_on_other_hardware_stay_in_their_row_which_says_so(tmp_path):
    runs = [make_run(tmp_path / f"run{seed}", {}, seed=seed) for seed in range(2)]
    config = json.loads((runs[1] / "config.json").read_text())
    other = {"device": "b CPU, 2 cores", "threads": "1 or 2", "mixed_precision": "bf16"}
    config["facts"] |= other
    (runs[1] / "config.json").write_text(json.dumps(config))
    text = collect_results.main(runs, keep=False)
    (row,) = named(text)
    assert row["precision"] == "bf16, float32"
    assert "a CPU, 2 cores or b CPU, 2 cores; threads 1 or 2" in text


def test_resumed_runs_are_named(tmp_path):
    runs = [make_run(tmp_path / f"run{seed}", {}, seed=seed) for seed in range(2)]
    assert "Resumed runs: none.\n" in collect_results.main(runs, keep=False)
    config = json.loads((runs[1] / "config.json").read_text())
    config["resumed"] = [{"rows": 2, "commit": "abc"}, {"rows": 3, "commit": "def"}]
    (runs[1] / "config.json").write_text(json.dumps(config))
    text = collect_results.main(runs, keep=False)
    assert "Resumed runs: row 1, seed 1 (at commit abc, def).\n" in text


def test_what_was_kept_outlives_the_folders_and_is_replaced_by_the_same_run(tmp_path):
    first = make_run(tmp_path / "run", {"test/accuracy": 0.7}, seed=0, data_dir="/home/me/mnist")
    kept = collect_results.KEPT
    for page, names in PAGES.items():
        marks = "".join("".join(collect_results.marks(name)) for name in names)
        (tmp_path / page).write_text(marks)
    collect_results.main([first], keep=True)
    shutil.rmtree(first)
    assert named(collect_results.main([], keep=False))[0]["classifier %"] == "70.00"
    assert "/home/me" not in kept.read_text()

    second = make_run(tmp_path / "second", {"test/accuracy": 0.9}, seed=1)
    text = collect_results.main([second], keep=False)
    assert named(text)[0]["classifier %"] == "80.00 ± 14.14"
    assert len(kept.read_text().splitlines()) == 1  # shown, not kept
    again = make_run(tmp_path / "again", {"test/accuracy": 0.8}, seed=0)
    collect_results.main([again, second], keep=True)
    assert named(collect_results.main([], keep=False))[0]["classifier %"] == "85.00 ± 7.07"
    assert len(kept.read_text().splitlines()) == 2


def test_an_older_runs_augmentation_has_its_new_name():
    settings = {"augment": "light", "epochs": 7, "dataset": "mnist", "flip": None}
    flags = collect_results.flags_of({"method": "joint", "settings": settings})
    assert (flags["augment"], flags["epochs"], flags["flip"]) == ("crop_flip", 7, None)


def test_cross_entropy_alone_is_a_baseline_and_not_the_joint_method(tmp_path):
    copy = next(iter(collect_results.FOLDERS))
    for weight, reached in ((1.0, 0.8), (0.0, 0.9)):
        summary = {"val/accuracy": reached, "test/accuracy": reached}
        folder = make_run(tmp_path / str(weight), summary, dataset="folder")
        settings = train_joint.Config(dataset="folder", mae_weight=weight, epochs=4)
        settings = dataclasses.asdict(settings)
        config = json.loads((folder / "config.json").read_text())
        config["facts"] |= {"method": "joint", "fingerprint": copy}
        (folder / "config.json").write_text(json.dumps(config | {"settings": settings}))
    text = collect_results.main([tmp_path / "1.0", tmp_path / "0.0"], keep=False)
    assert {row["method"]: row["classifier %"] for row in named(text)} == {
        "joint": "80.00",
        "cross-entropy": "90.00",
    }
    short = cells(text[text.index("| test accuracy, % |") :])
    assert short[1][:2] == ["joint", "**80.00** (cnn; n = 1)"]
    assert not any("90.00" in cell for row in short for cell in row)


def test_the_latents_of_a_contrastive_row_are_all_that_its_classifier_reads():
    network = {"image_size": 32, "width": 16, "blocks": 0}
    assert collect_results.latents_of({"settings": {"encoder": "resnet18", **network}}) == 8 * 16
    assert collect_results.latents_of({"settings": {"encoder": "cnn", **network}}) == 64 * 4 * 4


def test_a_run_from_before_a_flag_existed_had_its_default(tmp_path):
    old, new = (make_run(tmp_path / name, {}, seed=n) for n, name in enumerate(("old", "new")))
    config = json.loads((old / "config.json").read_text())
    del config["settings"]["flip"]
    (old / "config.json").write_text(json.dumps(config))
    assert len(cells(collect_results.main([old, new], keep=False))) == 1


def test_the_command_of_a_row_gives_its_settings_again(tmp_path):
    folder = make_run(tmp_path / "run", {}, epochs=3, flip=True, learning_rate=0.5)
    args = collect_results.command(collect_results.read_run(folder)).split()
    config = with_epochs(parse(train_ae.Config, args[2:]), steps_per_epoch=100)
    stored = json.loads((folder / "config.json").read_text())["settings"]
    assert dataclasses.asdict(config) == stored


def test_the_command_of_a_folder_names_it(tmp_path):
    folder = make_run(tmp_path / "run", {}, dataset="folder", data_dir="/home/me/my pets")
    line = collect_results.command(collect_results.read_run(folder))
    config = parse(train_ae.Config, shlex.split(line)[2:])
    assert (config.dataset, str(config.data_dir)) == ("folder", "my pets")


def test_what_is_no_finished_run_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished run"):
        collect_results.main([tmp_path / "empty"], keep=False)
    assert f"left out: {tmp_path / 'empty'} is no run folder" in capsys.readouterr().err


def test_what_saw_no_test_images_is_no_row(tmp_path, capsys):
    tested = make_run(tmp_path / "run", {"test/accuracy": 0.8, "val/accuracy": 0.8})
    swept = make_run(tmp_path / "swept", {"val/accuracy": 0.9}, width=8, test=False)
    summary = json.loads((swept / "summary.json").read_text())
    del summary["test/accuracy"]
    (swept / "summary.json").write_text(json.dumps(summary))
    compared = tmp_path / "comparison"
    compared.mkdir()
    for name in ("config.json", "summary.json"):
        (compared / name).write_text("{}")
    text = collect_results.main([tested, swept, compared], keep=False)
    assert len(cells(text)) == 1 and "**80.00** (cnn; n = 1)" in text
    output = capsys.readouterr().err
    assert f"left out: {swept} left the test images unseen" in output
    assert f"left out: {compared} is not a run of these scripts" in output


def test_only_the_part_between_the_marks_is_written(tmp_path):
    begin, end = collect_results.marks("tables")
    recipes, tries = collect_results.marks("recipes"), collect_results.marks("tries")
    other = f"between\n{recipes[0]}{recipes[1]}{tries[0]}{tries[1]}below\n"
    (tmp_path / "RESULTS.md").write_text(f"before\n{begin}old\n{end}{other}")
    (tmp_path / "README.md").write_text(f"above\n{begin}old\n{end}after\n")
    run = make_run(tmp_path / "run", {"test/accuracy": 0.5})
    collect_results.main([run], keep=True)
    for name, first, last in (("README.md", "above", "after"), ("RESULTS.md", "before", "below")):
        text = (tmp_path / name).read_text()
        assert text.startswith(f"{first}\n{begin}")
        assert f"{end}{'between' if name == 'RESULTS.md' else 'after'}\n" in text
        assert text.endswith(f"{last}\n")
        assert "50.00" in text and "old" not in text
    block = text.split(recipes[0])[1].split(recipes[1])[0]
    assert (
        "# MNIST, autoencoder + classifier: 50.00 %, n = 1; encoder 3 min\npython train_ae.py"
        in block
    )


def test_the_headline_is_chosen_on_validation(tmp_path):
    reached = {1: (0.9, 0.7), 2: (0.8, 0.95)}  # epochs: accuracy on validation, on test
    for epochs, (validation, test) in reached.items():
        summary = {"val/accuracy": validation, "test/accuracy": test}
        make_run(tmp_path / str(epochs), summary, epochs=epochs, blocks=epochs)
    text = collect_results.main([tmp_path / "1", tmp_path / "2"], keep=False)
    table = text[text.index("| test accuracy, % |") :]
    assert cells(table) == [
        ["autoencoder + classifier", "**70.00** (cnn, blocks 1; n = 1)", "96"],
        ["joint", "–", "99"],
        ["contrastive + linear", "–", "–"],
    ]


def test_what_trained_on_a_gpu_has_a_row_and_a_column_of_its_own(tmp_path):
    for name, reached in (("cpu", 0.8), ("gpu", 0.9)):
        folder = make_run(tmp_path / name, {"val/accuracy": reached, "test/accuracy": reached})
        config = json.loads((folder / "config.json").read_text())
        if name == "gpu":
            config["facts"] |= {"cuda": "13.0", "device": "NVIDIA H100"}
        (folder / "config.json").write_text(json.dumps(config))
    text = collect_results.main([tmp_path / "cpu", tmp_path / "gpu"], keep=False)
    times = {row["classifier %"]: row["encoder training"] for row in named(text)}
    assert times == {"80.00": "3 min", "90.00": "3 min on one NVIDIA H100"}
    short = text[text.index("| test accuracy, % |") :]
    assert short.startswith("| test accuracy, % | MNIST | MNIST, on a GPU | peer |\n")
    ae, joint, _ = cells(short)
    assert ae[1:3] == ["**80.00** (cnn; n = 1)", "**90.00** (cnn; n = 1)"]
    assert joint[1:3] == ["–", "not run"]


def test_the_tables_in_the_pages_are_those_of_the_kept_runs():
    """No number in them was typed or changed by hand."""
    program = [sys.executable, str(ROOT / "benchmarks" / "collect_results.py")]
    output = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    for page, name in collect_results.PARTS:
        begin, end = collect_results.marks(name)
        between = (ROOT / page).read_text().split(begin)[1].split(end)[0]
        assert between.count("\n") > 5 and between in output


def test_a_recipe_is_as_quick_or_as_accurate_as_no_other():
    def setting(seconds: float, accuracy: float) -> list[dict]:
        return [{"seconds": seconds, "summary": {"val/accuracy": accuracy}}]

    slow, quick, beaten = setting(90, 0.9), setting(10, 0.8), setting(20, 0.7)
    assert collect_results.unbeaten([slow, beaten, quick]) == [quick, slow]
