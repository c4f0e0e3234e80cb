"""What every test shares: nothing of the user's W&B, a fresh Accelerator, a fair share of cores."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # those that a training takes

for name in [name for name in os.environ if name.startswith(("WANDB_", "ACCELERATE_"))]:
    del os.environ[name]
os.environ["WANDB_MODE"] = "offline"  # no test may reach a network

# `make test` starts workers (pytest-xdist); each computes on one core, unless the user chose
ON_ONE_CORE = "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ
if ON_ONE_CORE:
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported
    os.environ["OMP_WAIT_POLICY"] = "passive"  # where a test takes all cores, none waits busily


@pytest.fixture(autouse=True)
def _fresh_process():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


@pytest.fixture
def unset(monkeypatch):
    """Remove environment variables; what the code sets in their place is undone after the test."""

    def remove(*names: str) -> None:
        for name in names:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    return remove


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A signal from outside that a training within a test has taken for itself ends all tests."""
    report = yield
    ended = call.excinfo and call.excinfo.errisinstance(SystemExit)
    if ended and call.excinfo.value.code in {128 + number for number in SIGNALS}:
        pytest.exit(f"stopped from outside in {item.nodeid}")
    return report


@pytest.fixture(scope="session", params=["ae", "joint", "supcon"])
def straight(tmp_path_factory, request):
    """A whole run of each script: method, run folder, and what it returned."""
    import tiny

    folder = tmp_path_factory.mktemp("runs") / request.param
    return request.param, folder, tiny.run(request.param, folder)


@pytest.fixture
def run_command(tmp_path):
    """Run a command line as a user would, in an empty folder; returns the finished process."""

    def run(*words: str, cwd: Path = tmp_path, **environment: str) -> subprocess.CompletedProcess:
        surroundings = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
        if ON_ONE_CORE:
            del surroundings["OMP_NUM_THREADS"]
        return subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env=surroundings | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
