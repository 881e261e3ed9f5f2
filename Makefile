# Everything happens in a virtual environment of its own; VENV=... and PYTHON=... choose others.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-all lint format docs clean
help:
	@echo "make demo      install into $(VENV) and trace a question about a picture"
	@echo "make test      the tests that CI runs     (make test-all: the slow ones too)"
	@echo "make lint      ruff and mypy              (make format: let ruff put it right)"
	@echo "make docs      the documentation, into site/"

demo: $(VENV)/.installed-demo
	$(BIN)/mmlens demo

# Each of JOBS processes takes one core (and up to 3 GB, where it holds the demo model).
JOBS ?= 2

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal --durations=15

test-all: $(VENV)/.installed-dev
	MMLENS_TYPECHECK=all $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=15

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Stamps: an extra is installed again only when pyproject.toml has changed since.
$(VENV)/.installed-demo: EXTRAS := demo
$(VENV)/.installed-dev: EXTRAS := demo,dev
$(VENV)/.installed-docs: EXTRAS := docs
$(VENV)/.installed-%: pyproject.toml
	@echo "installing mmlens with its packages into $(VENV) (a minute or two, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
