# Everything happens in a virtual environment of its own; VENV=... and PYTHON=... choose others.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-all test-tl39 lint format docs clean
help:
	@echo "make demo      install into $(VENV) and trace a question about an image"
	@echo "make test      the tests that CI runs     (make test-all: the slow ones too)"
	@echo "make test-tl39 those about TransformerLens, with its version 3.9, which sae-lens needs"
	@echo "make lint      ruff, mypy, import-linter  (make format: let ruff put it right)"
	@echo "make docs      the documentation, into site/"

demo: $(VENV)/.installed-demo
	$(BIN)/mmlens demo

# Each of JOBS processes takes one core (and up to 3 GB, where it holds the demo model).
JOBS ?= 2

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal --durations=15

test-all: $(VENV)/.installed-dev
	MMLENS_TYPECHECK=all $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=15

# An environment with TransformerLens 3.9, which borrows all other packages.
TL39 ?= .venv-tl39
test-tl39: $(VENV)/.installed-dev
	@test -x $(TL39)/bin/python || $(BIN)/python -m venv $(TL39)
	@$(TL39)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		'transformer_lens==3.9.*' better-abc
	@$(BIN)/python -c "import sysconfig; \
		print('import site; site.addsitedir(' + repr(sysconfig.get_path('purelib')) + ')')" \
		> $$($(TL39)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth
	$(TL39)/bin/python -m pytest -m "not slow" tests/test_transformer_lens_*.py \
		tests/test_activation_cache.py tests/test_hooks.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

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
	rm -rf $(TL39) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
