# make demo   vanilla -> SFT -> reward model -> PPO on the offline world, ends with a table; exit 1 when RLHF did not work
# make test   the whole test suite, on two processes of one thread each
# make test-fast   without what is marked slow: under a minute on two cores
# make lint   ruff, and the directions of imports (pyproject.toml)
# make bench  speed and memory beside transformers and TRL; installs these into .venv-bench
# Each builds .venv from the pinned requirements when it is missing or the pins have changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
PY     := $(VENV)/bin/python
# The stamps carry a checksum of the pins, so a changed pin (and nothing else) re-installs.
RUN_STAMP := $(VENV)/.installed-$(shell cat requirements.txt | cksum | cut -d' ' -f1)
DEV_STAMP := $(VENV)/.installed-dev-$(shell cat requirements.txt requirements-dev.txt | cksum | cut -d' ' -f1)

BENCH  := .venv-bench
BENCH_STAMP := $(BENCH)/.installed-$(shell cat requirements-bench.txt | cksum | cut -d' ' -f1)

.PHONY: demo test test-fast lint bench clean
.DEFAULT_GOAL := demo

$(PY):
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: install it, or give its path as PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): $(PY)
	@echo "installing requirements.txt into $(VENV) (once; torch is the large one)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "installing requirements-dev.txt into $(VENV)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(BENCH_STAMP): requirements-bench.txt
	@echo "installing requirements-bench.txt into $(BENCH)"
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

demo: $(RUN_STAMP)
	$(PY) src/experiments/main.py -t demo

test: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

test-fast: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -m "not slow"

lint: $(DEV_STAMP)
	$(PY) -m ruff check .
	PYTHONPATH=src $(VENV)/bin/lint-imports --no-cache

bench: $(RUN_STAMP) $(BENCH_STAMP)
	$(PY) src/experiments/main.py -t bench

clean:
	rm -rf $(VENV) $(BENCH) .pytest_cache .ruff_cache
