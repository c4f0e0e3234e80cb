"""What the scripts share, in rooms; docs/architecture.md has a drawing of them."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit(
        "error: these scripts need Python 3.11 or newer, and this is "
        f"{sys.version_info[0]}.{sys.version_info[1]}; make the environment with another one"
    )
