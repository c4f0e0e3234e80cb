"""What the scripts share, in rooms; docs/architecture.md has a drawing of them."""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit(
        "error: these scripts need Python 3.11 or newer, and this is "
        f"{sys.version_info[0]}.{sys.version_info[1]}; make the environment with another one"
    )

_parent = os.getppid()


def first_parent() -> int:
    """The process that started this one; another one where it has ended since."""
    return _parent


def _forked() -> None:
    global _parent
    _parent = os.getppid()


os.register_at_fork(after_in_child=_forked)

# A thread that waits for another sleeps instead of spinning: beside one other busy process, or a
# second run, spinning threads take the cores from those that they wait for. OpenMP reads it when
# torch is loaded, so the scripts import this package first. The user's own settings stay.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "passive"
