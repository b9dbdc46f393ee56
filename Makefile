# make demo and make test need Python >= 3.11 with venv, and make; everything else is installed into .venv.

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
VENV := .venv
RUN := $(VENV)/bin/python
DEPENDENCIES := pyproject.toml constraints.txt

.PHONY: help demo test lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   compare ADMM with tuned backpropagation on the digits data: a table and a figure"
	@echo "make test   run all tests"
	@echo "make lint   run ruff and mypy"
	@echo "make clean  remove the virtual environment and the caches; runs/ stays"

demo: $(VENV)/installed
	@echo "Fourteen runs of at most four training seconds each, most of them to tune the learning rates of Adam and SGD:"
	@folder=runs/demo-$$(date +%Y%m%d-%H%M%S) && $(RUN) -m piecework compare digits --hidden 100 50 \
		--methods admm adam sgd lbfgs --tune lr=3e-4,3e-3,3e-2,3e-1,1 --seconds 4 --threads 1 --out $$folder && \
		echo "The figure is $$folder/compare.png"

test: $(VENV)/installed-test
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/installed-lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/made:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 was found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/made $(DEPENDENCIES)
	@echo "Installing into $(VENV); the first time this takes some minutes"
	$(RUN) -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/made $(DEPENDENCIES)
	@echo "Installing into $(VENV); the first time this takes some minutes"
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/installed-lint: $(VENV)/made $(DEPENDENCIES)
	@echo "Installing into $(VENV); the first time this takes some minutes"
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[test,lint]'
	@touch $@
