# make demo: one run on real handwritten digits, no download.   make test: the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/run
	$(BIN)/python train_ae.py --run_dir runs/demo-$$(date +%Y%m%d-%H%M%S)

test: .venv/test
	$(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/test: requirements-dev.txt requirements-export.txt .venv/run
	$(BIN)/pip install -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs wandb
