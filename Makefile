# Two commands: `make demo` and `make test`. Both install what they need into .venv first and ask nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= fashion_mnist
SHELL := /bin/bash

.PHONY: install demo data test test-slow bench lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

data: install
	$(BIN)/python -W ignore::RuntimeWarning -m lightning_dpgen.data.fetch --root data

demo: install
	@if [ "$(DATA)" = fashion_mnist ]; then $(BIN)/python -W ignore::RuntimeWarning -m lightning_dpgen.data.fetch --root data FashionMNIST; fi
	@if [ "$(DATA)" = mnist ]; then $(BIN)/python -W ignore::RuntimeWarning -m lightning_dpgen.data.fetch --root data MNIST; fi
	@echo "1 of 2: a mixture, epsilon 3 of 10"
	$(BIN)/dpgen fit --config examples/configs/mixture_$(DATA).yaml --trainer.strategy.init_args.epsilon 3
	$(BIN)/dpgen verify runs/mixture_$(DATA)/release
	@echo "2 of 2: a private set that starts from it, epsilon 10 in total"
	$(BIN)/dpgen fit --config examples/configs/set_from_mixture_$(DATA).yaml
	$(BIN)/dpgen verify runs/mixture_$(DATA)/set
	@echo "Pictures: runs/mixture_$(DATA)/{release,set}/preview.png   Logs, ledger, checkpoints (private): runs/mixture_$(DATA)"

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

test-slow: install data
	$(BIN)/python -m pytest -m slow

bench: install
	$(BIN)/python benchmarks/per_record_gradients.py
	$(BIN)/python benchmarks/lot_memory.py
	$(BIN)/python benchmarks/dp_step.py
	$(BIN)/python benchmarks/ask_once.py --table
	$(BIN)/python benchmarks/table.py --scale cpu --render

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist *.egg-info
