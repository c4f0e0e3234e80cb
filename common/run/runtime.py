"""What do we run on?   threads, processes, precision, and what to record about them"""

import contextlib
import ctypes
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from .. import first_parent
from ..console import is_first_process, say
from ..errors import UserError
from ..files import read_json

# Variables that `accelerate launch` exports for its settings.
OTHER_TRAININGS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "several kinds of parallelism",
}
WITHOUT_EFFECT = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "every step is one of the optimizer"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--compile=True compiles"),
}
APPLE_GPU = ", Apple's GPU"  # behind the processor's name
SET_UP = 3  # steps until a GPU has all that it needs for the others
PR_SET_PDEATHSIG = 1  # linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

processes_beside = 1  # trainings that share this machine's cores; more in a process of `jobs.run`
own_threads: str | None = None  # what `set_threads` wrote into OMP_NUM_THREADS, which no user chose


def start(precision: str, seed: int, resume: str | None = None) -> Accelerator:
    """Set threads, device, precision and seed; return Accelerate's view of all processes.

    A process may start several times, each time with another precision. `resume` is the folder of
    a run that goes on, if it is there.

    Raises:
        UserError: a precision that the device cannot train in; processes that do not know of
            each other (torchrun on a CPU without `ACCELERATE_USE_CPU=true`); a way of training
            that a launcher's settings ask for and the scripts do not know.
    """
    set_threads(resume)
    _keep_freed_memory()
    _follow_launcher()
    _check_launcher()
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if os.environ.get(name) == "":  # older Accelerate takes it for a number
            del os.environ[name]
    started = _number("WORLD_SIZE", 1)
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # of the run before this one
        GradientState._reset_state()
    # Accelerate reads ACCELERATE_MIXED_PRECISION=no, which its launcher exports when nothing was
    # said, as a wish. Ours is always explicit.
    accelerator = Accelerator(
        mixed_precision=choose_precision(precision),
        cpu=torch.backends.mps.is_available() and not _is_true("ACCELERATE_USE_MPS_DEVICE"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=10))],  # of a collective
        # given, so that the variables of the environment do not count
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
    )
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started, but each believes it is alone; on a CPU put "
            "ACCELERATE_USE_CPU=true before torchrun (without a launcher: unset WORLD_SIZE)"
        )
    torch.manual_seed(seed)
    _forget_peak_memory()
    # all batches of a training have one shape, so the fastest kernels are looked for once
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    return accelerator


def _check_launcher() -> None:
    """Refuse what a launcher's settings would make of the training, and name what has no effect."""
    for name, what in OTHER_TRAININGS.items():
        if os.environ.get(name, "false").lower() not in ("", "0", "false", "no"):
            raise UserError(f"{name} asks for {what}, which these scripts do not do; unset it")
    for name, (plain, why) in WITHOUT_EFFECT.items():
        if os.environ.get(name, plain).lower() not in ("", plain):
            say(f"{name}={os.environ[name]} has no effect: {why}", is_first_process())


def _number(name: str, otherwise: int) -> int:
    """A whole number above 0 from the environment. `UserError` where there is something else."""
    text = os.environ.get(name) or str(otherwise)
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"{name}={text} in the environment is no number of processes; unset it")
    return int(text)


def check_alone(script: str) -> None:
    """`UserError` where a launcher has started several processes of a script that is one."""
    if os.environ.get("LOCAL_RANK") and _number("WORLD_SIZE", 1) > 1:
        raise UserError(f"{script} is one process; start it with python, without a launcher")


def _is_true(name: str) -> bool:
    """Whether a variable of the environment says yes."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def uses_cuda() -> bool:
    """Whether training will run on an NVIDIA GPU (and not on a CPU by the user's wish)."""
    return torch.cuda.is_available() and not _is_true("ACCELERATE_USE_CPU")


def measuring_device(device: torch.device) -> torch.device:
    """Where the latents of a network that trains on `device` are measured.

    The same, but for Apple's GPU: it lacks float64, which some metrics need.
    """
    return torch.device("cpu") if device.type == "mps" else device


def choose_precision(precision: str) -> str:
    """Turn `auto` into bf16 where the hardware computes it faster than float32, else into `no`.

    Raises:
        UserError: fp16 on a CPU, where Accelerate would run it without a loss scaler.
    """
    if precision == "fp16" and not uses_cuda():
        raise UserError("--precision fp16 needs a GPU; take bf16, no or auto on a CPU")
    if precision != "auto":
        return precision
    if uses_cuda():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    has_amx, has_avx512_bf16 = (
        getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()
        for name in ("amx_tile", "avx512_bf16")
    )
    # Intel's AVX512-BF16 without AMX takes 1.5 to 2 times as long as float32, AMD's half as long
    is_fast = has_amx or (has_avx512_bf16 and _cpu_info("vendor_id") != "GenuineIntel")
    return "bf16" if is_fast else "no"


def set_threads(resume: str | None = None) -> None:
    """Share the cores among the local processes, unless the user chose a number of threads.

    A run that is resumed on the same processor, in as many processes, has as many threads as it
    began with: the bits depend on it, and fewer cores may be free for it now.

    `accelerate launch` and torchrun export OMP_NUM_THREADS=1, which leaves all cores but one idle;
    that value counts as a choice only where no launcher set it.
    """
    global own_threads
    chosen = os.environ.get("OMP_NUM_THREADS")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if chosen and chosen != own_threads and not (launched and chosen == "1"):
        return
    threads = max(1, usable_cores() // (_number("LOCAL_WORLD_SIZE", 1) * processes_beside))
    config = Path(resume or "") / "config.json"
    if resume and config.is_file() and isinstance(facts := read_json(config).get("facts"), dict):
        same = device_name(torch.device("cpu")), _number("WORLD_SIZE", 1)
        if same == (facts.get("device"), facts.get("processes")):
            threads = facts.get("threads", threads)
    torch.set_num_threads(threads)
    # for scikit-learn, which is loaded later
    own_threads = os.environ["OMP_NUM_THREADS"] = str(threads)


def usable_cores() -> int:
    """How many cores this process may use: by its affinity and by the quota of a container."""
    from joblib import cpu_count

    return cpu_count()


def _keep_freed_memory() -> None:
    """Let glibc reuse what a step frees instead of giving it back: page faults cost 14 % on a CPU.

    The user's own MALLOC_… variables, if there are any, go before.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, 2**30)):
        libc.mallopt(parameter, value)


def _follow_launcher() -> None:
    """End with `accelerate launch`: killed by a sweep, it would leave us training as an orphan."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != first_parent():  # it went while we were importing
            raise SystemExit(128 + signal.SIGTERM)


def share_batch_norm(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Let batch norm see the whole batch of all processes; on a CPU torch has no such layer."""
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Move the network to the device. On a GPU all its filters become channels-last, which cuDNN
    is faster at; on a CPU they keep the layout that they were made with.
    """
    if device.type == "cuda":
        return network.to(device, memory_format=torch.channels_last)
    return network.to(device)


def compile_step(compute: Callable, accelerator: Accelerator) -> Callable:
    """The part of a training step in front of `backward`, compiled, its backward pass with it.

    On one GPU the kernels are also recorded as a CUDA graph, since launching them one by one takes
    longer than computing a small network. Not with several: they exchange gradients meanwhile.
    """
    is_one_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    mode = "reduce-overhead" if is_one_gpu else "default"
    # torch 2.14's compiler about itself
    warnings.filterwarnings("ignore", ".*_prims_common.check", FutureWarning)
    return torch.compile(compute, dynamic=False, mode=mode)


@contextlib.contextmanager
def forbid_waiting(device: torch.device, step: int) -> Iterator[None]:
    """A step in which waiting for a GPU is an error, where CHECK_WAITING is 1: for benchmarks.

    Not the first steps of an epoch, `step` being their number: they may set up and measure kernels.
    """
    checks = device.type == "cuda" and os.environ.get("CHECK_WAITING") == "1" and step >= SET_UP
    if checks:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if checks:
            torch.cuda.set_sync_debug_mode("default")


def _forget_peak_memory() -> None:
    """Let `peak_memory_gib` begin anew: a process may train several runs."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux only; a container may forbid it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held since `start`, in GiB: on the GPU, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):  # Linux; unlike ru_maxrss, it can begin anew
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
            return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def cost(device: torch.device, seconds: float, images: int) -> dict[str, float]:
    """What an epoch of `images` took, under the names that all scripts share."""
    return {
        "time/epoch_seconds": seconds,
        "time/images_per_second": images / seconds,
        "memory/peak_gib": peak_memory_gib(device),
    }


def facts(accelerator: Accelerator) -> dict[str, Any]:
    """What a reader needs to judge or repeat a figure: versions, commit, hardware, processes."""
    names = ("torch", "torchvision", "accelerate", "wandb", "scikit-learn", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "commit": commit(),
        "device": device_name(accelerator.device),
        **(cuda_facts() if accelerator.device.type == "cuda" else {}),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,  # what --precision came to
    }


def cuda_facts() -> dict[str, Any]:
    """The versions of CUDA and cuDNN, and what the GPU can do and hold."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu_memory_gib": round(device.total_memory / 2**30, 1),
        "compute_capability": f"{device.major}.{device.minor}",
    }


def commit() -> str | None:
    """The commit of the code that runs, with a + where files were changed; None outside git."""
    here = Path(__file__).parents[2]
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = _cpu_info("model name") or platform.processor() or platform.machine()
    return model + APPLE_GPU if device.type == "mps" else f"{model}, {os.cpu_count()} cores"


def _cpu_info(key: str) -> str:
    """What Linux says of the processor under `key`; empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return ""
