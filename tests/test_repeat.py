"""Commands of RESULTS.md are trained again."""

import json
import sys
from pathlib import Path

import pytest

from common.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import repeat

TEXT = """
# digits
python train_joint.py --width 4 --limit_train 96 --batch_size 32 --epochs 1 --tsne_images 5
python train_joint.py --epochs 0
"""


def test_every_command_is_trained_with_every_seed(tmp_path, capfd):
    assert repeat.main(TEXT, seeds=2, at_a_time=2, out=tmp_path) == 1  # 0 epochs are refused
    said = capfd.readouterr().out
    for seed in (0, 1):
        assert f"3-seed{seed} is finished" in said and f"4-seed{seed} failed" in said
        config = json.loads((tmp_path / f"3-seed{seed}/config.json").read_text())
        assert config["settings"]["seed"] == seed
        assert (tmp_path / f"3-seed{seed}/summary.json").exists()
    before = (tmp_path / "3-seed0/metrics.jsonl").read_bytes()
    repeat.main(TEXT, seeds=1, at_a_time=1, out=tmp_path)  # nothing is trained anew
    assert (tmp_path / "3-seed0/metrics.jsonl").read_bytes() == before


def test_a_text_without_commands_is_refused(tmp_path):
    with pytest.raises(UserError, match="no line begins with `python train_`"):
        repeat.main("# nothing", seeds=1, at_a_time=1, out=tmp_path)


def test_results_have_commands():
    text = (Path(__file__).parents[1] / "RESULTS.md").read_text(encoding="utf-8")
    scripts = {words[0] for words in repeat.commands(text).values()}
    assert scripts == {"train_ae.py", "train_joint.py", "train_supcon.py"}
