"""What goes wrong in real runs: numbers that are none, images that are none, flags beyond sense."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import tempfile
import types
import typing
from pathlib import Path

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import coarse_pictures
from torch import nn

import compare
import embed
import train_ae
import train_joint
import train_supcon
from common import models
from common.config import parse
from common.data import datasets
from common.errors import UserError
from common.evaluation import probes, report
from common.run import checkpoints, monitor, runtime, signals, tracking

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
import bad_images

NAN, INF = float("nan"), float("inf")
# root may write anywhere, but Linux makes no folder there
CANNOT_WRITE = "cannot make the folder /proc/no/such" if os.geteuid() == 0 else "cannot write to"
TINY = (
    *("--limit_train=64", "--batch_size=16", "--epochs=2", "--warmup_epochs=0.5", "--width=4"),
    *("--log_every=3", "--knn_images=20", "--tsne_images=12", "--tracking=disabled"),
    *("--precision=no", "--test=False"),
)
OWN = {
    "ae": ("--hidden_dim=8", "--classifier_epochs=2", "--classifier_views=2"),
    "joint": ("--learning_rate=0.05",),
    "supcon": ("--encoder=cnn", "--learning_rate=0.05"),
}
SCRIPTS = {"ae": train_ae, "joint": train_joint, "supcon": train_supcon}
LOSSES = {"ae": "reconstruction_loss", "joint": "probability_mae", "supcon": "supcon_loss"}


@coarse_pictures()
def run(method: str, folder: Path, *words: str) -> dict[str, float]:
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    script = SCRIPTS[method]
    names = {word.split("=")[0] for word in words}
    words = [*(w for w in (*TINY, *OWN[method]) if w.split("=")[0] not in names), *words]
    return script.main(parse(script.Config, [*words, f"--run_dir={folder}"]))


@coarse_pictures()
def resume(method: str, folder: Path) -> dict[str, float]:
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    script = SCRIPTS[method]
    return script.main(parse(script.Config, [f"--resume={folder}"]))


# Numbers that go wrong


def spoil_gradient(monkeypatch, at: int, value: float) -> None:
    """In the step `at`, counted from 1, one gradient becomes `value`; the loss stays what it is."""
    backward, steps = accelerate.Accelerator.backward, []

    def spoiled(self, loss):
        backward(self, loss)
        steps.append(loss)
        if len(steps) == at:
            weights = self._models[0].encoder.to_latent
            parameter = next(iter(weights.parameters()), None)
            parameter = next(self._models[0].parameters()) if parameter is None else parameter
            parameter.grad.view(-1)[0] = value

    monkeypatch.setattr(accelerate.Accelerator, "backward", spoiled)


def spoil_loss(monkeypatch, method: str, at: int) -> None:
    original, steps = getattr(SCRIPTS[method], LOSSES[method]), []

    def spoiled(*words):
        loss = original(*words)
        steps.append(loss)
        return loss * NAN if len(steps) == at else loss

    monkeypatch.setattr(SCRIPTS[method], LOSSES[method], spoiled)


def all_finite(state) -> bool:
    if isinstance(state, dict):
        return all(map(all_finite, state.values()))
    return not isinstance(state, torch.Tensor) or bool(state.isfinite().all())


@pytest.fixture(scope="module", params=SCRIPTS)
def whole(tmp_path_factory, request):
    """A run of each script that nothing happens to: 2 epochs of 4 steps, rows at 3, 4, 6, 8."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    run(request.param, folder)
    return request.param, folder


def test_a_gradient_that_is_none_stops_the_run_and_the_good_state_goes_on(
    whole, tmp_path, monkeypatch
):
    method, straight = whole
    with monkeypatch.context() as patch:
        spoil_gradient(patch, at=5, value=INF)
        with pytest.raises(UserError) as error:
            run(method, tmp_path / "run")
    message = error.value.message
    assert message.startswith("not finite any more: ") and "gradient norm, weights" in message
    assert "at step 6 or shortly before it (precision no)" in message  # the next row
    assert "start a new run with a lower --learning_rate" in message
    assert f"{tmp_path / 'run'} is kept as of step 4" in message
    state = checkpoints.load_last(tmp_path / "run/checkpoints", {})
    assert state["step"] == 4
    assert all_finite(state)
    # what spoiled the gradient is gone, so the run ends as if it had never been
    resume(method, tmp_path / "run")
    for name in ("encoder.safetensors", "classifier.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "step", "kept"),
    [("ae", 2, 0), ("joint", 4, 0), ("supcon", 8, 4)],  # 4 and 8: the last step of an epoch
)
def test_a_loss_that_is_no_number_is_named(tmp_path, monkeypatch, method, step, kept):
    spoil_loss(monkeypatch, method, at=step)
    with pytest.raises(UserError) as error:
        run(method, tmp_path / "run")
    assert "not finite any more: loss" in error.value.message
    assert f"is kept as of step {kept}" in error.value.message
    for path in (tmp_path / "run/checkpoints").glob("*.safetensors"):
        assert all_finite(checkpoints.load(path)), path
    assert checkpoints.load_last(tmp_path / "run/checkpoints", {})["step"] == kept
    assert not (tmp_path / "run/summary.json").exists()


def test_stopped_by_a_signal_after_a_wrong_step_it_keeps_what_was_good(
    tmp_path, monkeypatch, capsys
):
    spoil_gradient(monkeypatch, at=5, value=NAN)
    asked = []

    def agreed(self, accelerator):  # between two rows, where nothing was read yet
        asked.append(accelerator)
        return 15 if len(asked) == 5 else 0

    monkeypatch.setattr(signals.Signals, "agreed", agreed)
    with pytest.raises(SystemExit) as end:
        run("joint", tmp_path / "run")
    assert end.value.code == 143
    del end  # it holds the frame, which holds the lock
    assert "not finite any more: gradient norm" in capsys.readouterr().out
    state = checkpoints.load_last(tmp_path / "run/checkpoints", {})
    assert state["step"] == 4
    assert all_finite(state)


class OnMeta:
    """An accelerator on torch's meta device, where reading a value is an error."""

    device, mixed_precision, scaler = torch.device("meta"), "no", None

    def reduce(self, tensor, reduction):
        return tensor


def test_no_step_waits_for_the_device():
    watch = monitor.Monitor(OnMeta(), nn.Linear(3, 2, device="meta"))
    for _ in range(3):
        watch.add(loss=torch.empty((), device="meta"), accuracy=torch.empty((), device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # reading fails there
        watch.means()


class Scaled:
    """An accelerator with fp16's loss scaler, as far as `Monitor` knows it."""

    device, mixed_precision = torch.device("cpu"), "fp16"
    process_index, num_processes = 0, 1

    def __init__(self):
        self.scaler = types.SimpleNamespace(get_scale=lambda: self.scale)
        self.scale = 2.0**16

    def reduce(self, tensor, reduction):
        return tensor

    def gather(self, tensor):
        return tensor


def one_step(watch: monitor.Monitor, gradient_norm: float) -> None:
    watch.add(loss=torch.tensor(2.0), gradient_norm=torch.tensor(gradient_norm))


def test_each_process_resumes_with_its_own_sums():
    network, both = nn.Linear(3, 2), []
    for rank in range(2):
        accelerator = Scaled()
        accelerator.process_index, accelerator.num_processes = rank, 2
        accelerator.gather = lambda own: torch.cat([watch._sums["loss"][None] for watch in both])
        both.append(monitor.Monitor(accelerator, network))
        both[-1].add(loss=torch.tensor(1.0 + 2 * rank), gradient_norm=torch.tensor(1.0))
    state = both[0].state_dict()  # the first one saves
    for watch, loss in zip(both, (1.0, 3.0), strict=True):
        watch.load_state_dict(state)
        assert watch.means()["train/loss"] == loss
    alone = monitor.Monitor(Scaled(), network)
    alone.load_state_dict(state)
    assert alone.means()["train/loss"] == 2.0  # the mean of both


def test_skipped_steps_of_fp16_are_counted_and_are_no_problem():
    accelerator, network = Scaled(), nn.Linear(3, 2)
    watch = monitor.Monitor(accelerator, network)
    for gradient_norm in (INF, NAN, 1.0):
        one_step(watch, gradient_norm)
    assert watch.problem() == ""
    again = monitor.Monitor(accelerator, network)
    again.load_state_dict(watch.state_dict())
    for found in (watch, again):
        row = found.means()
        assert row["train/skipped_steps"] == 2
        assert row["train/loss"] == 2.0
    assert row.keys() == {"train/loss", "train/gradient_norm", "train/skipped_steps"}

    accelerator.scale = 2.0**-15  # it halves the scale at each step and finds no end
    assert "the gradients overflow at every scale" in watch.problem()
    assert "2 steps skipped" in watch.problem()
    accelerator.scaler = None  # nothing holds this back
    one_step(watch, INF)
    assert watch.problem() == "not finite any more: gradient norm"


def test_skipped_steps_reach_the_rows(tmp_path, monkeypatch):
    """A real scaler, on the CPU, whose first scale is so large that three steps overflow."""
    started = runtime.start

    def start(precision, seed, resume):
        accelerator = started("no", seed)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        return accelerator

    def unscale(self, optimizer=None):
        self.scaler.unscale_(self._optimizers[0])

    monkeypatch.setattr(runtime, "start", start)
    monkeypatch.setattr(accelerate.Accelerator, "unscale_gradients", unscale)
    run("joint", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    counts = [row["train/skipped_steps"] for row in rows if "train/skipped_steps" in row]
    assert counts[0] > 0
    assert counts == sorted(counts)
    state = checkpoints.load_last(tmp_path / "run/checkpoints", {})
    assert state["monitor"]["skipped"] == counts[-1]


def test_weights_that_overflow_are_noticed_though_loss_and_gradients_are_sound():
    accelerator, network = Scaled(), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    watch = monitor.Monitor(accelerator, network)
    one_step(watch, 1.0)
    assert watch.problem() == ""
    network[1].running_var[0] = INF
    assert watch.problem() == "not finite any more: weights"


def test_bf16_learns_at_a_low_temperature(tmp_path):
    words = ("--precision=bf16", "--temperature=0.01", "--epochs=8", "--limit_train=128")
    run("supcon", tmp_path / "run", *words)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.7 * losses[0]


def make_latents(value: float) -> probes.Latents:
    latents = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    latents[11, 2] = value
    labels = torch.arange(40) % 4
    return probes.Latents(latents, labels, latents[:8], labels[:8])


@pytest.mark.parametrize("value", [NAN, INF])
def test_the_classifier_says_that_latents_are_of_no_use(value):
    kwargs = {"epochs": 2, "batch_size": 20, "learning_rate": 1e-2, "weight_decay": 0.0, "seed": 0}
    classifier = models.MLPClassifier(6, 8, 4, 0.0)
    wanted = r"classifier .* not finite \(epoch 1, learning rate 0.01\); lower --classifier_learn"
    with pytest.raises(UserError, match=wanted):
        list(probes.train_classifier(classifier, make_latents(value), **kwargs))


@pytest.mark.parametrize("value", [NAN, INF])
def test_the_linear_probe_says_that_latents_are_of_no_use(value):
    with pytest.raises(UserError, match="no linear probe fits these latents"):
        probes.fit_linear(make_latents(value), 4)


# Bad images


def test_each_kind_of_bad_image_is_used_or_named(monkeypatch):
    with tempfile.TemporaryDirectory() as name:  # where other users may look, unlike tmp_path
        monkeypatch.setenv("XDG_CACHE_HOME", f"{name}/cache")
        found = {kind: cells for kind, *cells in bad_images.rows(Path(name))}
    assert found.keys() == bad_images.KINDS.keys()
    reasons = {
        "zero bytes": "empty.png (no image format that Pillow knows)",
        "truncated JPEG": "cut.jpg (image file is truncated",
        "damaged PNG": "damaged.png (broken data stream",
        "text named .png": "text.png (no image format that Pillow knows)",
        "20000×20000": "bomb.png (Image size (400000000 pixels) exceeds limit",
        "broken link": "link.png (broken link)",
        "link to the folder above": "upwards (a link to a folder)",
        "pipe": "pipe.png (no regular file)",
        "unreadable by permission": "forbidden.png (Permission denied)",
    }
    for kind, (trained, encoded, said) in found.items():
        expected = "named; skipped and counted on demand" if kind in reasons else "used"
        assert (trained, encoded) == (expected, expected), kind
        assert ("train/cat/" + reasons[kind] in said) if kind in reasons else not said, kind


# Bad configuration

CONFIGS = {**SCRIPTS, "compare": compare, "embed": embed}
WRONG = {
    "number": (
        "",
        "x",
        "0",
        "-1",
        "0.5",
        "nan",
        "inf",
        "-inf",
        "1e300",
        "9" * 400,
        "None",
        "1e-300",
    ),
    "text": (
        "",
        " ",
        "\n",
        "\x1b[31m",
        "x" * 300,
        "x/" * 3000,
        "/",
        "a/b",
        "a b",
        "猫",
        ",,,",
        "-",
    ),
    "bool": ("", "x", "2", "nan", "None", "true"),
}


def kind_of(hint) -> str:
    options = {str(option) for option in (hint, *typing.get_args(hint))}
    if any("int" in option or "float" in option for option in options):
        return "number"
    return "bool" if any("bool" in option for option in options) else "text"


def cases():
    """(script, field, wrong value) for every field of every Config."""
    for name, script in CONFIGS.items():
        hints = typing.get_type_hints(script.Config)
        for field in dataclasses.fields(script.Config):
            for value in WRONG[kind_of(hints[field.name])]:
                yield name, field.name, value


def words_for(name: str, field: str, value: str) -> list[str]:
    """A command line of that script with this one value; the rest is right."""
    if name == "embed":
        given = {"run": "run", "images": "x.png", "out": "x.npz"} | {field: value}
        places = [given.pop("run"), given.pop("images")]
        flags = [f"--{flag}={given[flag]}" for flag in given]
        return [*flags, "--", *places]
    if name == "compare":
        return ["--", value] if field == "runs" else [f"--{field}={value}", "--", "run"]
    return [f"--{field}={value}"]


def parsed(name: str, words: list[str]):
    """(config, None), or (None, who refused it and in which line); anything else is an error."""
    try:
        return parse(CONFIGS[name].Config, words), None
    except UserError as error:
        assert "\n" not in error.message
        return None, "limits"
    except SystemExit as error:
        assert error.code == 2
        return None, "parser"


def of_each_field_once():
    """`cases`, without those that another script with the same field has tried already."""
    seen = set()
    for name, field, value in cases():
        hint = typing.get_type_hints(CONFIGS[name].Config, include_extras=True)[field]
        if (key := (field, str(hint), value)) not in seen:
            seen.add(key)
            yield name, field, value


class Started(Exception):
    pass


def start(method: str, words: list[str]) -> str:
    """Run a script up to the moment when it makes its run folder, in the current folder."""
    names = {word.split("=")[0] for word in words}
    own = [*TINY, *OWN[method], "--run_dir=run"]
    own = [word for word in own if word.split("=")[0] not in names]
    if "--resume" in names:
        own.remove("--run_dir=run")
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    try:
        SCRIPTS[method].main(parse(SCRIPTS[method].Config, [*own, *words]))
    except UserError as error:
        assert "\n" not in error.message
        return "later"
    except Started:
        return "started"
    raise AssertionError("it ran")


def test_every_field_takes_wrong_values_with_one_line_and_no_run_folder(
    tmp_path, monkeypatch, capsys
):
    def begin(*words, **settings):
        raise Started

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "open_tracker", begin)
    digits = datasets.read("digits", "data", 32)
    read = datasets.read
    monkeypatch.setattr(
        datasets,
        "read",
        lambda name, *at: digits if (name, at[1]) == ("digits", 32) else read(name, *at),
    )
    counts = dict.fromkeys(("parser", "limits", "later", "started", "accepted"), 0)
    for name, field, value in of_each_field_once():
        config, refused = parsed(name, words_for(name, field, value))
        if config is None:
            counts[refused] += 1
        elif name in SCRIPTS:
            more = ["--dataset=folder"] if field == "data_dir" else []
            counts[start(name, [*words_for(name, field, value), *more])] += 1
        else:
            counts["accepted"] += 1
        assert not list(tmp_path.iterdir()), (name, field, value)
    capsys.readouterr()
    with capsys.disabled():
        print(f"\nfields x values: {sum(counts.values())}, of which {counts}")
    assert min(counts.values()) > 0


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(st.data())
def test_no_command_line_is_answered_with_a_trace(draws):
    name = draws.draw(st.sampled_from(sorted(CONFIGS)))
    fields = [field.name for field in dataclasses.fields(CONFIGS[name].Config)]
    values = st.one_of(
        st.text(max_size=20), st.floats().map(str), st.integers().map(str), st.just("None")
    )
    flags = st.tuples(st.sampled_from(fields), values).map(lambda pair: f"--{pair[0]}={pair[1]}")
    words = draws.draw(st.lists(st.one_of(flags, flags, values), max_size=5))
    words = [word for word in words if not word.startswith(("--resume", "--tyro"))]
    if {"-h", "--help"} & set(words):
        return
    with contextlib.redirect_stderr(None):
        config, refused = parsed(name, words)
    assert (config is None) != (refused is None)


ABSURD = [
    ("ae", ["--width=1000000"], "--width, --blocks or --latent_dim"),
    ("ae", ["--width=1000000", "--encoder=resnet50"], "training this network takes at least 8"),
    ("ae", ["--latent_dim=1000000", "--width=64"], "and this machine has 4 GiB: make --width"),
    ("ae", ["--hidden_dim=1000000"], "and this machine has 4 GiB: make --hidden_dim smaller"),
    ("joint", ["--latent_dim=1000000", "--width=64"], "--blocks or --latent_dim smaller"),
    (
        "supcon",
        ["--projection_dim=1000000", "--width=64"],
        "--width, --blocks or --projection_dim smaller",
    ),
    ("supcon", ["--encoder=resnet50", "--width=1000"], "training this network takes at least"),
]


@pytest.mark.parametrize(("method", "words", "message"), ABSURD)
def test_a_network_that_does_not_fit_is_refused_before_it_is_built(
    tmp_path, monkeypatch, method, words, message
):
    monkeypatch.setattr(models, "total_memory", lambda: 4 * 2**30)
    with pytest.raises(UserError) as error:
        run(method, tmp_path / "run", *words)
    assert message in error.value.message
    assert "\n" not in error.value.message
    assert not (tmp_path / "run").exists()


def test_a_network_is_built_with_the_weights_that_it_would_have_without_the_check():
    assert 2**20 < models.total_memory() < 2**50
    torch.manual_seed(0)
    plain = nn.Linear(3, 2)
    torch.manual_seed(0)
    checked = models.build(lambda: nn.Linear(3, 2), "--width")
    assert torch.equal(plain.weight, checked.weight)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError(
            "Storage size calculation overflowed with sizes=[1099511627776, 1099511627776]"
        ),
    ],
)
def test_memory_that_runs_out_is_one_line_with_advice(tmp_path, monkeypatch, error):
    def grow(*words):
        raise error

    monkeypatch.setattr(train_joint, "probability_mae", grow)
    with pytest.raises(UserError, match=r"memory ran out .* make --batch_size, --width or"):
        run("joint", tmp_path / "run")


def test_an_error_about_something_else_stays_what_it_is(tmp_path, monkeypatch):
    def convert(*words):
        raise RuntimeError("value cannot be converted to type uint8_t without overflow")

    monkeypatch.setattr(train_joint, "probability_mae", convert)
    with pytest.raises(RuntimeError, match="without overflow"):
        run("joint", tmp_path / "run")


def test_odd_paths_and_names_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("something")
    Path("broken").symlink_to("nowhere")
    for words, message in (
        (["--run_dir=file"], "file is no folder"),
        (["--run_dir=file/run"], "file is not a folder that we may write to"),
        (["--run_dir=broken"], "broken is a broken link"),
        (["--run_dir=/proc/no/such"], CANNOT_WRITE),
        (["--resume=file"], "file is no folder"),
        (["--dataset=folder", "--data_dir=file"], "there is no folder"),
        (["--project=a/b"], "--project a/b is no name of a project in W&B"),
        ([f"--project={'x' * 129}"], "at most 128 characters"),
        (["--tracking=online"], "W&B does not start online"),
    ):
        with pytest.raises(UserError) as error:
            own = [] if words[0].startswith(("--run_dir", "--resume")) else ["--run_dir=run"]
            sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
            script_words = [w for w in (*TINY, *OWN["joint"]) if "tracking" not in w]
            tracking_off = [] if "--tracking=online" in words else ["--tracking=disabled"]
            train_joint.main(
                parse(train_joint.Config, [*script_words, *tracking_off, *own, *words])
            )
        assert message in error.value.message, words
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file"], words
    assert Path("file").read_text() == "something"


def test_a_damaged_configuration_is_named_when_a_run_shall_go_on(tmp_path):
    for content in ("[]", "{", '{"settings": 3}', '{"settings": {"epochs": "x"}}', ""):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError) as error:
            parse(train_ae.Config, [f"--resume={tmp_path}"])
        assert str(tmp_path) in error.value.message


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            "ae",
            "--dropout=1 --classifier_epochs=1 --classifier_batch_size=1000000 --alpha=0 "
            "--classifier_views=1000000 --tsne_images=1 --knn_images=1 --epochs=1 --tags=,,",
        ),
        ("joint", "--limit_train=2 --batch_size=2 --label_smoothing=1 --max_gradient_norm=1e-300"),
        ("supcon", "--temperature=1e6 --warmup_epochs=1e6 --log_every=1000000 --views=1"),
    ],
)
def test_values_at_the_edge_of_sense_run(tmp_path, method, words):
    metrics = run(method, tmp_path / "run", *words.split(), "--test=True")
    assert 0 <= metrics["test/accuracy"] <= 1


# A training that diverges to numbers that are still finite


def spoil_weights(monkeypatch, factor: float, at: int) -> None:
    """Multiply all weights, after the step `at` (counted from 1)."""
    step, steps = accelerate.optimizer.AcceleratedOptimizer.step, []

    def spoiled(self, *words):
        step(self, *words)
        steps.append(None)
        if len(steps) == at:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(factor)

    monkeypatch.setattr(accelerate.optimizer.AcceleratedOptimizer, "step", spoiled)


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("factor", [1e13, 1e25])
def test_a_training_of_absurd_but_finite_numbers_stops_when_it_happens(
    method, factor, tmp_path, monkeypatch
):
    spoil_weights(monkeypatch, factor, at=2)
    with pytest.raises(UserError, match=r"diverged|not finite") as error:
        run(method, tmp_path / "run")
    assert "start a new run with a lower --learning_rate" in error.value.message
    state = checkpoints.load_last(tmp_path / "run/checkpoints", {})
    assert state["step"] <= 4 and all_finite(state)


@pytest.mark.parametrize("value", [NAN, INF])
def test_validation_that_is_no_number_stops_the_run_at_its_epoch(tmp_path, monkeypatch, value):
    monkeypatch.setattr(SCRIPTS["joint"].probes, "accuracy", lambda *words: value)
    with pytest.raises(UserError, match=r"not finite on validation: val/accuracy, .* at step 4 "):
        run("joint", tmp_path / "run")


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_latents_that_no_metric_can_take_are_named(value):
    class Split:
        def blocks(self):
            yield torch.zeros(3, 2)
            yield torch.full((2, 2), value)

    with pytest.raises(UserError, match=r"has diverged: the encoder's outputs reach"):
        report.encode(torch.nn.Identity(), torch.nn.Identity(), Split())
