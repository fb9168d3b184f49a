# `make train` and `make test` need python3 (>= 3.11) and make; everything else goes into .venv.
PYTHON ?= $(shell for p in python3.13 python3.12 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch is for the parity tests only; where Python 3.11 is used, the CPU build is enough.
TORCH := $(if $(filter 3.11,$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)),torch==2.13.0,)
# Python compiles what it imports, and keeps it; compiling all that is installed takes longer than to train 20 steps.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: train test check format bench clean

train: $(VENV)/.installed
	$(BIN)/python -m experiments.train --config=configs/tiny.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test
	$(BIN)/python -m experiments.bench train
	$(BIN)/python -m experiments.bench decode

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; set PYTHON=/path/to/python"; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "installing JAX, Flax, Orbax and what else pyproject.toml names into $(VENV): 1 GB, about a minute, once"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml
	@echo "installing what pyproject.toml names into $(VENV), PyTorch and transformers for the tests included: 3 GB or"
	@echo "more, some minutes, once"
	@$(INSTALL) $(TORCH) -e '.[test]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .cache runs
