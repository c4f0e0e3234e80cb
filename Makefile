# make demo: four methods on real handwritten digits, compared; no download.   make test: the tests.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test test-lowest lint bench check-sweeps results clean

demo: .venv/run
	$(BIN)/python study.py --image_size 16 --width 16 --epochs 8 --seeds 1 --labels_per_class 10 all \
		--out runs/demo-$$(date +%Y%m%d-%H%M%S)

# worksteal leaves neighbors together, so that what they share is made once
test: .venv/test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# with the lowest versions that requirements*.txt name; what they depend on is new, and warns of them
test-lowest: .venv-lowest/done
	.venv-lowest/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal \
		-W ignore::DeprecationWarning

lint: .venv/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: .venv/bench  # speed and memory beside the peers; wants an idle machine
	$(BIN)/python -W ignore benchmarks/run_all.py

results: .venv/run  # the tables of RESULTS.md, and the command of each row
	$(BIN)/python benchmarks/collect_studies.py
	$(BIN)/python benchmarks/collect_results.py

check-sweeps: .venv-sweeps/done  # against W&B's own schema
	.venv-sweeps/bin/python -W ignore tests/sweep_schema.py sweeps/*.yaml

.venv-sweeps/done:
	$(PYTHON) -m venv .venv-sweeps
	.venv-sweeps/bin/pip install sweeps pyyaml "numpy<2"
	touch $@

.venv-lowest/done: requirements.txt requirements-export.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install uv
	VIRTUAL_ENV=.venv-lowest .venv-lowest/bin/uv pip install --resolution lowest-direct \
		-r requirements-dev.txt
	touch $@

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/test: requirements-dev.txt requirements-export.txt .venv/run
	$(BIN)/pip install -r requirements-dev.txt
	touch $@

.venv/bench: requirements-bench.txt .venv/run
	$(BIN)/pip install -r requirements-bench.txt
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-sweeps
