"""Check sweeps against W&B's own schema: python tests/sweep_schema.py sweeps/*.yaml

Not run by pytest: the schema is in the package `sweeps`, which wants an old NumPy. `make
check-sweeps` makes an environment for it.
"""

import sys
from pathlib import Path

import yaml

import sweeps

problems = {
    path: sweeps.schema_violations_from_proposed_config(yaml.safe_load(Path(path).read_text()))
    for path in sys.argv[1:]
}
for path, found in problems.items():
    print(path, "; ".join(found) or "ok")
sys.exit(any(problems.values()))
