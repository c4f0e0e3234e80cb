"""What goes wrong in real runs: numbers that are none, images that are none, flags beyond sense."""

import contextlib
import dataclasses
import json
import math
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
from torch import nn

import compare
import embed
import train_ae
import train_joint
import train_supcon
from common import (
    checkpoints,
    data,
    health,
    interruption,
    memory,
    models,
    probes,
    runtime,
    tracking,
)
from common.config import parse
from common.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bad_images

NAN, INF = float("nan"), float("inf")
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


def run(method: str, folder: Path, *words: str) -> dict[str, float]:
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    script = SCRIPTS[method]
    names = {word.split("=")[0] for word in words}
    words = [*(w for w in (*TINY, *OWN[method]) if w.split("=")[0] not in names), *words]
    return script.main(parse(script.Config, [*words, f"--run_dir={folder}"]))


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
    assert "the gradients are not finite at step 5 (learning rate 0.0" in message
    assert "precision no, largest gradients: encoder." in message
    assert "start anew with a lower learning rate" in message
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
    [("ae", 2, 0), ("joint", 4, 3), ("supcon", 8, 6)],  # 4 and 8: the last step of an epoch
)
def test_a_loss_that_is_no_number_is_named(tmp_path, monkeypatch, method, step, kept):
    spoil_loss(monkeypatch, method, at=step)
    with pytest.raises(UserError) as error:
        run(method, tmp_path / "run")
    assert f"the loss is nan at step {step} (learning rate" in error.value.message
    assert f"is kept as of step {kept}" in error.value.message
    for path in (tmp_path / "run/checkpoints").glob("*.safetensors"):
        assert all_finite(checkpoints.load(path)), path
    assert checkpoints.load_last(tmp_path / "run/checkpoints", {})["step"] == kept
    assert not (tmp_path / "run/summary.json").exists()


def test_stopped_by_a_signal_after_a_wrong_step_it_saves_what_was_good(tmp_path, monkeypatch):
    spoil_gradient(monkeypatch, at=5, value=NAN)
    asked = []

    def agreed(self, accelerator):  # between two rows, where nothing was read yet
        asked.append(accelerator)
        return 15 if len(asked) == 6 else 0  # asked after each step and after the first epoch

    monkeypatch.setattr(interruption.Interruption, "agreed", agreed)
    with pytest.raises(UserError, match="the gradients are not finite at step 5"):
        run("joint", tmp_path / "run")
    assert all_finite(checkpoints.load_last(tmp_path / "run/checkpoints", {}))


class OnMeta:
    """An accelerator on torch's meta device, where reading a value is an error."""

    device, mixed_precision, scaler = torch.device("meta"), "no", None
    optimizer_step_was_skipped = False

    def unscale_gradients(self) -> None: ...

    def reduce(self, tensor, reduction):
        return tensor


def test_no_step_waits_for_the_device():
    network = nn.Linear(3, 2, device="meta")
    watch = health.Watch(OnMeta(), network, ("loss", "accuracy"))
    for step in range(1, 4):
        loss = network(torch.empty(5, 3, device="meta")).sum()
        loss.backward()
        watch.clip(1.0)
        watch.add(step, 0.1, loss, loss)
    with pytest.raises(RuntimeError, match="meta"):  # reading does fail there
        watch.means()


class Scaled:
    """An accelerator with fp16's loss scaler, as far as `Watch` knows it."""

    device, mixed_precision, process_index = torch.device("cpu"), "fp16", 0

    def __init__(self):
        self.scaler = types.SimpleNamespace(get_scale=lambda: self.scale)
        self.scale, self.optimizer_step_was_skipped = 2.0**16, False

    def unscale_gradients(self) -> None: ...

    def reduce(self, tensor, reduction):
        return tensor

    def gather(self, tensor):
        return tensor


def one_step(watch: health.Watch, accelerator, network, step: int, gradient: float) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    watch.clip(1.0)
    accelerator.optimizer_step_was_skipped = not math.isfinite(gradient)
    watch.add(step, 0.1, torch.tensor(2.0))


def test_each_process_goes_on_with_its_own_sums():
    network, both = nn.Linear(3, 2), []
    for rank in range(2):
        accelerator = Scaled()
        accelerator.process_index = rank
        accelerator.gather = lambda own: torch.cat([watch._sums[None] for watch in both])
        both.append(health.Watch(accelerator, network, ("loss",)))
        both[-1].add(1, 0.1, torch.tensor(1.0 + 2 * rank))
    state = both[0].state_dict()  # the first one saves
    for watch, loss in zip(both, (1.0, 3.0), strict=True):
        watch.load_state_dict(state)
        assert watch.means()["train/loss"] == loss


def test_skipped_steps_of_fp16_are_counted_and_are_no_problem():
    accelerator, network = Scaled(), nn.Linear(3, 2)
    watch = health.Watch(accelerator, network, ("loss",))
    for step, gradient in enumerate((INF, NAN, 1.0), start=1):
        one_step(watch, accelerator, network, step, gradient)
    assert watch.problem() == ""
    again = health.Watch(accelerator, network, ("loss",))
    again.load_state_dict(watch.state_dict())
    for found in (watch, again):
        row = found.means()
        assert row["train/skipped_steps"] == 2
        assert row["train/loss"] == 2.0
    assert row.keys() == {"train/loss", "train/gradient_norm", "train/skipped_steps"}

    accelerator.scale = 2.0**-15  # it halves the scale at each step and finds no end
    assert "the gradients overflow at every scale at step 3" in watch.problem()
    assert "2 steps skipped" in watch.problem()
    accelerator.optimizer_step_was_skipped = False  # nothing has held these back
    accelerator.scale = 1.0
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, INF)
    watch.clip(1.0)
    watch.add(4, 0.1, torch.tensor(2.0))
    assert "the gradients are not finite at step 4" in watch.problem()
    assert "with --precision no" in watch.problem()


def test_skipped_steps_reach_the_rows(tmp_path, monkeypatch):
    """A real scaler, on the CPU, whose first scale is so large that three steps overflow."""
    started = runtime.start

    def start(precision, seed):
        accelerator = started("no", seed)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        return accelerator

    def unscale(self):
        self.scaler.unscale_(self._optimizers[0])

    monkeypatch.setattr(runtime, "start", start)
    monkeypatch.setattr(accelerate.Accelerator, "unscale_gradients", unscale)
    run("joint", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    counts = [row["train/skipped_steps"] for row in rows if "train/skipped_steps" in row]
    assert counts[0] > 0
    assert counts == sorted(counts)
    assert checkpoints.load_last(tmp_path / "run/checkpoints", {})["watch"]["skipped"] == counts[-1]


def test_weights_that_overflow_are_noticed_though_loss_and_gradients_are_sound():
    accelerator, network = Scaled(), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    watch = health.Watch(accelerator, network, ("loss",))
    one_step(watch, accelerator, network, 7, 1.0)
    assert watch.problem() == ""
    network[1].running_var[0] = INF
    assert "the weights are not finite at step 7" in watch.problem()
    assert "largest: 1.running_var inf" in watch.problem()


def test_the_largest_gradients_are_named_the_last_layer_first():
    named = {"a": 1.0, "b": NAN, "c": 3.0, "d": INF, "e": NAN, "f": INF}
    assert health.most(named) == "f inf, e nan, d inf and 1 more"
    assert health.most({"a": 1.0, "b": 5e6, "c": 3.0, "d": 2.0}) == "b 5e+06, c 3, d 2"


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
    words = {"epochs": 2, "batch_size": 20, "learning_rate": 1e-2, "weight_decay": 0.0, "seed": 0}
    classifier = models.MLPClassifier(6, 8, 4, 0.0)
    with pytest.raises(UserError, match=r"classifier .*at step [12] \(learning rate .*: 8.bias"):
        list(probes.train_classifier(classifier, make_latents(value), **words))


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
        "link to the folder above": "upwards (no regular file)",
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
    digits = data.load("digits", None, 32)
    load = data.load
    monkeypatch.setattr(
        data,
        "load",
        lambda name, *at: digits if (name, at[1]) == ("digits", 32) else load(name, *at),
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
    ("ae", ["--width=1000000"], "training on 16 images at a time needs more than a million GiB"),
    ("ae", ["--width=1000000", "--encoder=resnet50"], "needs more than a million GiB"),
    ("ae", ["--latent_dim=1000000", "--width=64"], "GiB of memory, but 4.0 GiB are free"),
    ("ae", ["--blocks=1000000"], "--blocks 1000000 is too deep"),
    ("ae", ["--hidden_dim=1000000"], "the classifier needs 26,0"),
    ("joint", ["--latent_dim=1000000"], "make --width, --blocks, --latent_dim or --batch_size"),
    ("joint", ["--batch_size=1294", "--limit_train=None", "--width=1000"], "on 1,294 images at a"),
    ("supcon", ["--views=1000000"], "training on 16,000,000 images at a time needs"),
    ("supcon", ["--projection_dim=1000000"], "needs 10.5 GiB of memory, but 4.0 GiB are free"),
    ("supcon", ["--encoder=resnet50", "--width=1000"], "training on 32 images at a time needs"),
]


@pytest.mark.parametrize(("method", "words", "message"), ABSURD)
def test_what_does_not_fit_is_refused_before_training(
    tmp_path, monkeypatch, method, words, message
):
    monkeypatch.setattr(runtime, "available_memory", lambda device: 4 * 2**30)
    with pytest.raises(UserError) as error:
        run(method, tmp_path / "run", *words)
    assert message in error.value.message
    assert "\n" not in error.value.message
    assert not (tmp_path / "run").exists()


def test_memory_is_measured_without_taking_it():
    before = torch.get_rng_state()
    needs = memory.measure(lambda: nn.Sequential(nn.Linear(30, 20), nn.Tanh()), (7, 30), "no")
    assert needs.weights == 4 * (30 * 20 + 20)
    assert needs.activations == 4 * (7 * 30 + 7 * 20)  # what Linear and Tanh remember
    assert needs.largest == 4 * 7 * 30
    assert needs.training(memory.ADAM) == 7 * needs.weights + needs.activations
    assert torch.equal(torch.get_rng_state(), before)  # the weights that follow stay the same ones
    half = memory.measure(lambda: nn.Linear(30, 20), (7, 30), "bf16")
    assert half.activations == 2 * 7 * 30
    build = lambda: nn.Linear(2**40, 2**40)  # noqa: E731
    assert memory.measure(build, (1, 2**40), "no").weights == INF
    assert memory.images_at_once(32) == memory.images_at_once(8) == 512
    assert memory.images_at_once(64) == 128
    assert memory.images_at_once(1024) == 1


@pytest.mark.parametrize("version", [1, 2])
def test_a_jobs_share_of_the_memory_counts(tmp_path, version):
    limit, used, cached = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )[version == 1]
    assert runtime._free_in(tmp_path) is None
    (tmp_path / used).write_text("700\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\n{cached} 50\n")
    (tmp_path / limit).write_text("1000\n")
    assert runtime._free_in(tmp_path) == 350
    (tmp_path / limit).write_text("max\n")
    assert runtime._free_in(tmp_path) is None
    assert 2**20 < runtime.available_memory(torch.device("cpu")) < 2**50
    assert runtime._paths_down("/a/b") == ["a", "a/b"]
    assert runtime._paths_down("/") == []


def test_a_batch_too_large_for_embed_is_refused(monkeypatch):
    network = embed.Network(nn.Conv2d(1, 8, 3, padding=1), nn.Identity())
    memory.check_encoding(network, (1000, 1, 32, 32), torch.device("cpu"))
    monkeypatch.setattr(runtime, "available_memory", lambda device: 2**20)
    with pytest.raises(UserError, match=r"encoding 1,000 images .* make --batch_size smaller"):
        memory.check_encoding(network, (1000, 1, 32, 32), torch.device("cpu"))
    assert network.encoder.weight.device.type == "cpu"


def test_enlarged_images_that_do_not_fit_are_refused(monkeypatch):
    images = torch.zeros(100, 3, 32, 32, dtype=torch.uint8).numpy()
    monkeypatch.setattr(runtime, "available_memory", lambda device: 2**20)
    with pytest.raises(UserError, match=r"enlarging 100 images needs 0\.3 GiB"):
        data.resize(images, 1024)


def test_odd_paths_and_names_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("something")
    Path("broken").symlink_to("nowhere")
    for words, message in (
        (["--run_dir=file"], "file is no folder"),
        (["--run_dir=file/run"], "file is not a folder that we may write to"),
        (["--run_dir=broken"], "broken is a broken link"),
        (["--run_dir=/proc/no/such"], "cannot make the folder /proc/no/such"),
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
