import pickle
import threading

import pytest
import torch

from common.errors import UserError
from common.run import checkpoints


def make_state(value: float) -> dict:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.full((1, 3), value)).sum().backward()
    optimizer.step()
    return {
        "network": layer.state_dict(),
        "optimizer": optimizer.state_dict(),  # its keys are integers, its values nested
        "scaler": None,
        "epoch": 3,
        "best": {"val/mse": float("inf"), "epochs": (1, 2)},
        "half": torch.tensor([value]).bfloat16(),
        "count": torch.tensor(7),
        "processes": 1,
    }


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = make_state(0.1)
    checkpoints.save(tmp_path / "a.safetensors", state)
    loaded = checkpoints.load(tmp_path / "a.safetensors")
    assert_equal(state, loaded)
    torch.optim.AdamW(torch.nn.Linear(3, 2).parameters()).load_state_dict(loaded["optimizer"])


def test_nothing_saved_yet_is_none(tmp_path):
    assert checkpoints.load_last(tmp_path, {}) is None


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage, capsys):
    first, second = make_state(0.1), make_state(0.2)
    checkpoints.save_last(tmp_path, first)
    checkpoints.save_last(tmp_path, second)
    assert_equal(checkpoints.load_last(tmp_path, {}), second)

    path = tmp_path / checkpoints.LAST
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[-3] ^= 1
    path.write_bytes({"cut": data[:-5], "bit": data, "empty": b""}[damage])
    assert_equal(checkpoints.load_last(tmp_path, {}), first)
    assert "last.safetensors is damaged" in capsys.readouterr().out

    (tmp_path / checkpoints.PREVIOUS).write_bytes(b"torn, too")
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        checkpoints.load_last(tmp_path, {})


def test_a_changed_header_is_noticed(tmp_path):
    checkpoints.save(tmp_path / "a.safetensors", {"epoch": 3})
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data.replace(b"3]]", b"4]]"))
    with pytest.raises(UserError, match="checksum"):
        checkpoints.load(tmp_path / "a.safetensors")


class Malicious:
    def __reduce__(self):
        return print, ("code was run",)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, capsys):
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Malicious()))
    torch.save(Malicious(), tmp_path / "evil.pt")
    for name in ("evil.safetensors", "evil.pt"):
        with pytest.raises(UserError, match="damaged"):
            checkpoints.load(tmp_path / name)
    assert "code was run" not in capsys.readouterr().out
    with pytest.raises(TypeError, match="tensors and JSON"):
        checkpoints.save(tmp_path / "b.safetensors", {"function": print})


def test_other_images_are_refused(tmp_path):
    checkpoints.save_last(tmp_path, make_state(0.1) | {"fingerprint": "ab"})
    assert checkpoints.load_last(tmp_path, {"fingerprint": "ab", "epoch": 3}) is not None
    with pytest.raises(UserError, match="its fingerprint was ab, now it is cd"):
        checkpoints.load_last(tmp_path, {"epoch": 3, "fingerprint": "cd"})


def test_a_snapshot_stays_what_it_was():
    state = make_state(0.1)
    copy = checkpoints.snapshot(state)
    assert_equal(copy, state)
    with torch.no_grad():
        state["network"]["weight"].zero_()
        state["optimizer"]["state"][0]["exp_avg"].zero_()
    assert copy["network"]["weight"].abs().sum() > 0
    assert copy["optimizer"]["state"][0]["exp_avg"].abs().sum() > 0


def test_tied_weights_come_back(tmp_path):
    weights = torch.arange(6.0).view(2, 3)
    checkpoints.save(tmp_path / "a.safetensors", {"a": weights, "b": weights, "c": weights[1]})
    loaded = checkpoints.load(tmp_path / "a.safetensors")
    assert_equal(loaded, {"a": weights, "b": weights, "c": weights[1]})


def test_a_writer_writes_while_the_training_goes_on_and_in_order():
    may_end, written = threading.Event(), []

    def write(name: str) -> None:
        assert may_end.wait(20)
        written.append(name)

    with checkpoints.Writer() as writer:
        writer.wait()  # nothing so far
        writer.start(write, "first")
        assert not written
        may_end.set()
        writer.start(write, "second")
        assert "first" in written
        writer.wait()
        assert written == ["first", "second"]
        writer.start(write, "third")
    assert written[-1] == "third"


def test_what_a_writer_could_not_write_is_raised_once():
    def full():
        raise UserError("no room")

    with checkpoints.Writer() as writer:
        for then in (writer.wait, lambda: writer.start(print)):
            writer.start(full)
            with pytest.raises(UserError, match="no room"):
                then()
            writer.wait()
    with pytest.raises(UserError, match="no room"), checkpoints.Writer() as writer:
        writer.start(full)
