# Everything that these targets need is set up by themselves: only Python (>= 3.11) and make.
PYTHON ?= python3
VENV ?= .venv
INTEROP_VENV ?= .venv-interop
BIN := $(VENV)/bin
JOBS ?= 2  # test files at a time

.PHONY: demo test coverage test-interop check clean

## The main job on the bundled model: measure, group, train, evaluate, report.
demo: $(VENV)/.installed
	$(BIN)/groupsae run --out runs/demo

## Style, types, layering and tests.
test: $(VENV)/.installed-dev check
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST)

## The same, and which lines no test has run; a third slower.
coverage: PYTEST = --cov --cov-report=term
coverage: test

## The tests in which sae-lens, eai-sparsify and dictionary-learning judge, in an environment of theirs.
test-interop: $(INTEROP_VENV)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(INTEROP_VENV)/bin/python -m pytest \
		tests/interop/test_libraries.py tests/interop/test_sae_lens_evals.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# nnsight, which dictionary-learning needs, brings a torchvision that only a CUDA build of torch loads;
# beside a CPU build it breaks transformers, and nothing here needs it.
$(INTEROP_VENV)/.installed: pyproject.toml constraints.txt
	test -x $(INTEROP_VENV)/bin/python || $(PYTHON) -m venv $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(INTEROP_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[test,interop]'
	$(INTEROP_VENV)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf $(VENV) $(INTEROP_VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
