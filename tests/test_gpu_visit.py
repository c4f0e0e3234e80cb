"""benchmarks/gpu.py: parts that are missing, broken or done. On a GPU it is run by hand."""

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import gpu_parts


@pytest.fixture
def visit(tmp_path, monkeypatch):
    """Call the program with parts a, b and c; returns the exit code and which of them it did."""
    done, broken = [], set()

    def carry_out(part, seconds, arguments, stopped):
        done.append(part.name)
        if part.name in broken:
            return {"part": part.name, "status": "failed", "seconds": 1.0, "error": "it broke"}
        return {"part": part.name, "status": "ok", "seconds": 1.0, "found": 3}

    monkeypatch.setattr(gpu, "parts", lambda small: [gpu.Part(name, None, 9) for name in "abc"])
    monkeypatch.setattr(gpu, "carry_out", carry_out)

    def call(*words: str, breaks: str = "") -> tuple[int, str]:
        done.clear()
        broken.clear()
        broken.update(breaks)
        out, work = tmp_path / "out/gpu.jsonl", tmp_path / "work"
        own = ["gpu.py", "--small", "--out", str(out), "--work", str(work)]
        monkeypatch.setattr(sys, "argv", [*own, *words])
        return gpu.main(), "".join(done)

    return call


def test_a_broken_part_is_written_down_and_stops_no_other(visit, tmp_path, capsys):
    assert visit(breaks="b") == (1, "abc")
    lines = [json.loads(line) for line in (tmp_path / "out/gpu.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok", "failed", "ok"]
    assert lines[1]["error"] == "it broke"
    assert "not done: b" in capsys.readouterr().out
    assert visit() == (0, "b")  # again: what failed, and nothing else
    assert visit() == (0, "")


def test_what_is_missing_comes_before_what_failed(visit, tmp_path):
    assert visit("--only", "a", breaks="a") == (1, "a")
    with (tmp_path / "out/gpu.jsonl").open("a") as file:
        file.write('{"part": "b", "sta')  # the machine went away here
        file.write("\n")
    assert visit(breaks="") == (0, "bca")


def test_without_time_nothing_is_begun(visit, capsys):
    assert visit("--minutes", "0.1") == (1, "")
    assert "no time is left" in capsys.readouterr().out


def test_an_error_in_a_part_becomes_its_result(tmp_path, capsys):
    arguments = argparse.Namespace(work=tmp_path)
    assert gpu.do(gpu.Part("joint, x", lambda arguments: 1 / 0, 1), arguments) == 1
    found = json.loads((tmp_path / "joint-x.json").read_text())
    assert found == {"error": "ZeroDivisionError: division by zero"}
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_part_runs_in_a_process_of_its_own_and_is_stopped_in_time(tmp_path):
    words = {"out": tmp_path / "x", "data_dir": None, "mnist_dir": tmp_path, "work": tmp_path}
    arguments = argparse.Namespace(small=False, **words)
    (part,) = (part for part in gpu.parts(small=False) if part.name == "training joint, MNIST")
    going = threading.Event()
    line = gpu.carry_out(part, 200, arguments, going)
    assert line["status"] == gpu.LEFT_OUT and "there is no MNIST in" in line["why"], line
    stopped = gpu.carry_out(part, 0.2, arguments, going)
    assert stopped["status"] == "stopped" and "longer than 0 s" in stopped["error"]
    going.set()  # Ctrl-C
    began = time.monotonic()
    assert gpu.carry_out(part, 200, arguments, going)["status"] == "stopped"
    assert time.monotonic() - began < 30
    unknown = gpu.carry_out(gpu.Part("no such part", None, 1), 60, arguments, threading.Event())
    assert unknown["status"] == "failed" and "log" in unknown


def test_what_is_timed_has_the_machine_to_itself(tmp_path, monkeypatch):
    running, seen, lock = set(), {}, threading.Lock()

    def carry_out(part, seconds, arguments, stopped):
        with lock:
            running.add(part.name)
        time.sleep(0.2)
        with lock:
            seen[part.name] = set(running)
            running.remove(part.name)
        return {"part": part.name, "status": "ok", "seconds": 1.0}

    parts = [gpu.Part("timed", None, 9), *(gpu.Part(n, None, 9, is_timed=False) for n in "abc")]
    monkeypatch.setattr(gpu, "parts", lambda small: parts)
    monkeypatch.setattr(gpu, "carry_out", carry_out)
    own = [
        "gpu.py",
        "--small",
        "--jobs",
        "3",
        "--out",
        str(tmp_path / "o"),
        "--work",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", own)
    assert gpu.main() == 0
    assert len((tmp_path / "o").read_text().splitlines()) == 4
    assert seen["timed"] == {"timed"} and list(seen)[-1] == "timed"
    assert max(len(beside) for beside in seen.values()) > 1


def test_two_runs_are_the_same_or_how_far_apart():
    rows = [{"step": 5, "train/loss": 2.0}, {"step": 9, "train/loss": 1.0, "time/epoch": 3.0}]
    later = [rows[0], rows[1] | {"time/epoch": 4.0}]
    expected = {"same": True, "loss_differs_by": 0, "loss": 1.0}
    assert gpu_parts.compared(rows, later) == expected
    other = gpu_parts.compared(rows, [rows[0], rows[1] | {"train/loss": 1.01}])
    assert not other["same"] and other["loss_differs_by"] == pytest.approx(0.01)


def test_operations_of_a_known_network():
    """ResNet-18 on 32×32 pixels: 0.56 G multiplications forward, two operations each, 3 passes."""
    found = gpu_parts.operations("joint", "resnet18", gpu_parts.COLOR, 8)
    assert found == pytest.approx(8 * 0.556e9 * 2 * 3, rel=0.02)
    twice = gpu_parts.operations("supcon", "resnet18", gpu_parts.COLOR, 8)
    assert twice == pytest.approx(2 * found, rel=0.01)


def test_the_peak_is_that_of_the_first_name_that_fits(monkeypatch):
    monkeypatch.setattr(gpu.measure, "IS_CPU", False)
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "Another": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert gpu_parts.peak_of_chip() == peak
