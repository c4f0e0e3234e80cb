"""How does a run stop and go on?   knows states, not models

A state is a nest of dicts, lists, tensors and JSON scalars, such as `state_dict()` returns. It
becomes one safetensors file: tensors as they are, the rest as JSON in the header. Nothing in it
is code, so reading a checkpoint cannot run any.

The training copies its state (`snapshot`) and goes on while a thread writes it (`Writer`).
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..console import say
from ..errors import UserError
from ..files import checksum, read_json, read_rows, write, write_json, write_rows

LAST, PREVIOUS = "last.safetensors", "previous.safetensors"
BEST = "best.safetensors"


def states(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What `state_dict()` of each part returns, under the same names; None for a part of None."""
    return {name: None if part is None else part.state_dict() for name, part in parts.items()}


def snapshot(state: Any) -> Any:
    """A copy of a state, its tensors on the CPU, which no later step changes."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True).contiguous()
    if isinstance(state, dict):
        return {key: snapshot(item) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(snapshot, state))
    return state


class Writer:
    """Writes files in a thread, one at a time and in order.

    What fails there is raised by the next call of `start` or `wait`, at the latest at the end of
    the `with` block.
    """

    def __enter__(self) -> "Writer":
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future | None = None
        return self

    def start(self, write: Callable[..., None], *words: Any) -> None:
        """Call `write(*words)` in the thread once what it is writing is done."""
        self.wait()
        self._writing = self._thread.submit(write, *words)

    def wait(self) -> None:
        """Return when all is written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            finally:
                del writing  # it holds the error, which holds this frame and so the run's lock

    def __exit__(self, *error: Any) -> None:
        self._thread.shutdown()
        self.wait()


def restore(parts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Give each part its state back. `UserError` where another version wrote the checkpoint."""
    for name, part in parts.items():
        if part is not None:
            if state.get(name) is None:
                raise UserError(
                    f"the checkpoint was written by another version (it has no {name}); "
                    "start a new run, or resume it with that version"
                )
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                _match_layouts(part)


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give every state tensor of a parameter's shape that parameter's strides.

    A checkpoint holds plain layouts and `Optimizer.load_state_dict` keeps them. Where weights are
    channels-last, a fused kernel on a CPU would then pair each moment with another weight (it walks
    memory in order), and on a GPU refuse to run.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def save_last(folder: Path, state: dict[str, Any]) -> None:
    """Write FOLDER/last.safetensors and keep the one before it as previous.safetensors.

    At every moment at least one of the two is whole, however the process ends.
    """
    write(folder / "next.safetensors", _pack(state))
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    os.replace(folder / "next.safetensors", folder / LAST)


def load_last(folder: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """The newest whole state in FOLDER, on the CPU; None where no checkpoint was written yet.

    A damaged one is named and the one before it used.

    Raises:
        UserError: there are checkpoints, and all of them are damaged; or the run was trained by
            something else than `expected`, such as {"fingerprint": …}, entries of the state.
    """
    damaged = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = load(path)
        except UserError as error:
            damaged.append(error.message)
            continue
        for message in damaged:
            say(f"warning: {message}; resuming from {name}")
        for name, value in expected.items():
            if state.get(name) != value:
                raise UserError(
                    f"{folder.parent} cannot be resumed: its {name} was {state.get(name)}, now it "
                    f"is {value}; bring the former back, or start a new run"
                )
        return state
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; no whole checkpoint is left, start a new run")
    return None


def branch(
    source: Path, target: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Make `target` a run that stands at the end of the training of `source`, a finished run.

    `settings` and `facts` (a new "wandb_id" among them) replace those of its config.json; none may
    be a part of the training. Resuming `target` does what follows it. Nothing happens if it exists.
    Its rows lack the accuracy of neighbors, which `source` measured with labels of its own.
    """
    if target.exists():
        return
    made = target.with_name(f".{target.name}")  # under its name only when it is whole
    shutil.rmtree(made, ignore_errors=True)
    (made / "checkpoints").mkdir(parents=True)
    files = [f"checkpoints/{name}" for name in (LAST, BEST)]
    for name in files:
        shutil.copyfile(source / name, made / name)
    rows = [
        {name: value for name, value in row.items() if not name.startswith("val/knn")}
        for row in read_rows(source / "metrics.jsonl")
    ]
    write_rows(made / "metrics.jsonl", rows)
    config = read_json(source / "config.json")
    config["settings"].update(settings)
    config["facts"].update(facts)
    write_json(made / "config.json", {**config, "is_new": True})
    made.rename(target)


def save_best(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write FOLDER/best.safetensors, atomically."""
    save(folder / BEST, weights)


def load_best(folder: Path, best: dict[str, float], otherwise: tuple[Any, Any]) -> tuple[Any, Any]:
    """The weights in FOLDER/best.safetensors and `best`, what is known of that epoch.

    A file that is damaged or gone is named, and `otherwise` is returned: the same two of the last
    epoch, so that its training is not lost.
    """
    try:
        return load(folder / BEST), best
    except UserError as error:
        say(f"warning: {error.message}; the weights of the last epoch are used instead")
        return otherwise


def save(path: Path, state: Any) -> None:
    """Write a state to one file, atomically."""
    write(path, _pack(state))


def load(path: Path) -> Any:
    """Read a state, tensors on the CPU. `UserError` where a bit of it has changed."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("checksum") != _digest(metadata["state"], tensors):
            raise ValueError("its checksum differs")
        return _unpack(json.loads(metadata["state"]), tensors)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error})") from None


def _pack(state: Any) -> bytes:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_flatten(state, tensors))
    return to_bytes(tensors, metadata={"state": text, "checksum": _digest(text, tensors)})


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    chunks = [text.encode()]
    for name in sorted(tensors):
        tensor = tensors[name]
        chunks.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        chunks.append(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return checksum(*chunks)


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON of `value`, each tensor replaced by its number; keys that are no text survive."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensor = value.detach().cpu().contiguous()
        # a copy of tied weights: tensors that share memory may not stand in one file
        places = {other.untyped_storage().data_ptr() for other in tensors.values()}
        shares = tensor.untyped_storage().data_ptr() in places
        tensors[name] = tensor.clone() if shares else tensor
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors and JSON, not {type(value)}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
