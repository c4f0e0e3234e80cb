"""A backend of Matplotlib that is not installed costs nothing: no figure is ever shown."""

import sys

import pytest


@pytest.mark.parametrize("backend", ["module://nowhere.backend_inline", "nonsense", ""])
def test_a_backend_that_is_not_there_is_left_out(run_command, backend):
    code = "import common.display.plots"
    done = run_command(sys.executable, "-c", code, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr


def test_a_backend_that_is_there_stays(run_command):
    code = "import os, common.display.plots; print(os.environ['MPLBACKEND'])"
    assert run_command(sys.executable, "-c", code, MPLBACKEND="svg").stdout == "svg\n"
