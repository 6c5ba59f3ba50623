# make run: install on the first call, then run the embedded experiment.   make test: the fast tests; make test-all: all.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run smoke plan mlflow test test-all check docs rehearse rehearse-cluster audit prove-smollm2 clean

run: $(INSTALLED)
	$(BIN)/python workflows/efficientscale.py

smoke: $(INSTALLED)
	$(BIN)/python workflows/efficientscale.py experiment=smoke paths.root=runs/smoke

plan: $(INSTALLED)
	$(BIN)/python workflows/efficientscale.py action=plan

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Including the tests marked `process`: with Ray, browsers and killed processes.
test-all: $(INSTALLED)
	TEST_EFFORT=all $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --durations=40

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# docs/ as a website in site/, without dead links.
docs: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python tools/docs_site.py

# The MLflow UI for runs/, at http://127.0.0.1:5000.
mlflow: $(INSTALLED)
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --port 5000 --workers 1

# docker-compose.yml without Docker, as root: see docs/docker.md.
rehearse: $(INSTALLED)
	tools/rehearse_compose.sh

# A Ray cluster of several raylets on this machine: one is killed, one joins, two are preempted with a notice. Takes minutes.
rehearse-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m slow tests/training/ray/test_cluster.py

# Check every pin against the PyPI advisory database, in an environment of its own; fails if it cannot be reached.
audit:
	$(PYTHON) -m venv .rehearsal/audit
	.rehearsal/audit/bin/pip install --quiet pip-audit
	.rehearsal/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

# Grow a real pretrained checkpoint and compare perplexities in transformers; downloads 93 MB once, needs about 8 GB of disk.
prove-smollm2: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[proof]'
	$(BIN)/python tools/prove_smollm2.py

# torch is installed first, at its pinned version: other packages would pull a build with gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(INSTALLED)

# Removes only what `make` has installed; runs/ with your checkpoints is kept.
clean:
	[ ! -f $(INSTALLED) ] || rm -rf $(VENV)
