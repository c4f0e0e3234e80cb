import ast
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.files import write_json
from common.run import runtime

ROOT = Path(__file__).parents[1]


def test_fp16_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="needs a GPU"):
        runtime.choose_precision("fp16")
    assert runtime.choose_precision("no") == "no"
    assert runtime.choose_precision("bf16") == "bf16"
    assert runtime.choose_precision("auto") in ("no", "bf16")


@pytest.mark.parametrize(
    ("vendor", "has_avx512_bf16", "has_amx", "expected"),
    [
        ("AuthenticAMD", False, False, "no"),
        ("AuthenticAMD", True, False, "bf16"),
        ("GenuineIntel", True, False, "no"),  # has it, but slower than float32
        ("GenuineIntel", True, True, "bf16"),
    ],
)
def test_auto_takes_bf16_only_where_the_processor_is_fast_at_it(
    monkeypatch, vendor, has_avx512_bf16, has_amx, expected
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(runtime, "_cpu_info", lambda key: vendor)
    assert runtime.choose_precision("auto") == expected


@pytest.fixture
def restored_threads(monkeypatch):
    monkeypatch.setattr(runtime, "own_threads", None)  # an earlier test's would hide a user's wish
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("environment", "changes"),
    [
        ({}, True),  # nobody said anything: all cores
        ({"OMP_NUM_THREADS": "1"}, False),  # the user's wish
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, True),  # the launcher's
        ({"OMP_NUM_THREADS": "2", "ACCELERATE_MIXED_PRECISION": "no"}, False),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, True),  # torchrun's
    ],
)
@pytest.mark.usefixtures("restored_threads")
def test_the_cores_are_shared_unless_the_user_chose(monkeypatch, unset, environment, changes):
    unset("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime, "usable_cores", lambda: 6)
    before = torch.get_num_threads()
    runtime.set_threads()
    expected = 6 // int(environment.get("LOCAL_WORLD_SIZE", "1"))
    assert torch.get_num_threads() == (expected if changes else before)
    if changes:  # for libraries that are loaded later
        assert os.environ["OMP_NUM_THREADS"] == str(expected)


@pytest.mark.parametrize(
    ("recorded", "threads"),
    [
        ({}, 3),
        ({"processes": 2}, 6),  # on which the bits depend as well
        ({"device": "another CPU"}, 6),
    ],
)
@pytest.mark.usefixtures("restored_threads")
def test_a_resumed_run_has_the_threads_that_it_began_with(
    monkeypatch, unset, tmp_path, recorded, threads
):
    unset("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    monkeypatch.setattr(runtime, "usable_cores", lambda: 6)
    facts = {"threads": 3, "processes": 1, "device": runtime.device_name(torch.device("cpu"))}
    write_json(tmp_path / "config.json", {"facts": facts | recorded})
    runtime.set_threads(str(tmp_path))
    assert torch.get_num_threads() == threads
    runtime.set_threads(str(tmp_path / "not there yet"))  # the next run of a study
    assert torch.get_num_threads() == 6
    runtime.set_threads(str(tmp_path))
    assert torch.get_num_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user's wish
    torch.set_num_threads(2)
    runtime.set_threads(str(tmp_path))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("device", "processes"), [("cuda", 2), ("cuda", 1), ("cpu", 2)])
def test_batch_norm_is_shared_by_several_gpus_only(device, processes):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    names = {"device": torch.device(device), "num_processes": processes}
    shared = runtime.share_batch_norm(network, type("Several", (), names)())
    assert isinstance(shared[1], torch.nn.SyncBatchNorm) == (device == "cuda" and processes == 2)
    assert shared.state_dict().keys() == network.state_dict().keys()


def test_processes_that_do_not_know_of_each_other_are_noticed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        runtime, "Accelerator", lambda **words: type("Alone", (), {"num_processes": 1})()
    )
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU=true"):
        runtime.start("no", seed=0)


def test_the_facts_name_versions_hardware_and_processes():
    facts = runtime.facts(runtime.start("no", seed=0))
    assert facts["torch"] == torch.__version__.split("+")[0]
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["processes"] == 1
    assert facts["mixed_precision"] == "no"
    assert "cores" in facts["device"]
    assert runtime.peak_memory_gib(torch.device("cpu")) > 0.05


def test_a_process_starts_again_with_another_precision(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for precision in ("no", "bf16", "no"):
        assert runtime.start(precision, seed=0).mixed_precision == precision


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"), ("ACCELERATE_DYNAMO_BACKEND", "inductor")],
)
def test_settings_of_a_launcher_change_nothing_that_is_trained(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    accelerator = runtime.start("no", seed=0)
    assert f"{name}={value} has no effect" in capsys.readouterr().out
    assert accelerator.gradient_accumulation_steps == 1
    model = accelerator.prepare(torch.nn.Linear(1, 1, bias=False))
    assert type(model) is torch.nn.Linear
    accelerator.backward(model(torch.ones(1, 1)).sum())
    assert model.weight.grad.item() == 1


@pytest.mark.parametrize("name", runtime.OTHER_TRAININGS)
def test_other_ways_of_training_are_refused(monkeypatch, name):
    monkeypatch.setenv(name, "false")
    runtime.start("no", seed=0)
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=f"{name} asks for .* unset it"):
        runtime.start("no", seed=0)


@pytest.mark.parametrize("value", ["", "one", "0", "-2"])
def test_a_number_of_processes_that_is_none_is_named(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    if value == "":
        runtime.start("no", seed=0)
    else:
        with pytest.raises(UserError, match=f"WORLD_SIZE={value} in the environment is no number"):
            runtime.start("no", seed=0)


@pytest.mark.parametrize(
    ("wish", "spins"),
    [
        ({}, "0"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),  # the user's own settings stay
        ({"OMP_WAIT_POLICY": "active"}, "30000000000"),
    ],
)
def test_threads_that_wait_sleep_unless_the_user_chose(wish, spins):
    """torch's OpenMP itself says what it has read when it was loaded after `common`."""
    library = Path(torch.__file__).parent / "lib/libgomp.so.1"
    if not library.exists():
        pytest.skip("torch has another OpenMP here")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", f"import common, ctypes; ctypes.CDLL({str(library)!r})"],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)} | wish,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_every_script_imports_common_before_what_loads_torch(script):
    imports = [
        (alias.name if isinstance(node, ast.Import) else node.module).split(".")[0]
        for node in ast.parse((ROOT / script).read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    loaders = {"torch", "tyro", "safetensors", "einops", "accelerate", "sklearn", "torchvision"}
    others = [imports.index(name) for name in loaders & set(imports)]
    assert all(imports.index("common") < place for place in others)


def test_the_peak_of_memory_is_that_of_one_run():
    """A study trains many runs in one process; each begins anew."""
    with mmap.mmap(-1, 400 * 2**20) as memory:  # which returns to the system at once
        for position in range(0, len(memory), mmap.PAGESIZE):
            memory[position] = 1
    before = runtime.peak_memory_gib(torch.device("cpu"))
    runtime._forget_peak_memory()
    after = runtime.peak_memory_gib(torch.device("cpu"))
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert after < before - 0.2
    else:
        assert after == before


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({}, False),
        ({"WORLD_SIZE": "2"}, False),  # a pod, which started no launcher
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, False),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, True),
    ],
)
def test_what_is_one_process_is_not_started_by_a_launcher(monkeypatch, unset, environment, refused):
    unset("WORLD_SIZE", "LOCAL_RANK")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(UserError, match=r"study\.py is one process; start it with python"):
            runtime.check_alone("study.py")
    else:
        runtime.check_alone("study.py")
