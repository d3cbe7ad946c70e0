# Needs only python3 (3.11 or newer, with venv) and make: every target makes the virtual environment if it is not there,
# with uv where that is installed, which is quicker.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One thread a process: the tests' tensors are tiny, and two processes share the cores better than two thread pools.
# Compiled modules are kept, whatever the environment says: the tests start hundreds of programs.
TEST_ENV = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
COVERED = --cov --cov-report=term:skip-covered --cov-report=html:build/coverage

.PHONY: install demo newcomer test test-slow test-all test-faults lint types bench check-release check-lowest site clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if command -v uv >/dev/null; then uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[dev]"; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"; fi
	touch $@

demo: install
	$(BIN)/pcdistill demo --out runs/demo

newcomer: install
	scripts/newcomer.sh "$(abspath $(BIN))/python"

# With COVER=1 the branch coverage of the package is measured too.
test: install
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not faults" $(if $(COVER),$(COVERED)) tests

# PCDISTILL_SLOW=0.5 runs half of them, at the next commit another half. With COVER=1 what they cover is added to what
# `make test COVER=1` did before, and under 90 % fails.
test-slow: install
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not faults" \
		$(if $(COVER),$(COVERED) --cov-append --cov-fail-under=90) tests

test-all: install
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not faults" tests

# Kills, full disks, damaged files and thousands of wrong inputs; docs/reliability.md shows the counts. Forks: no threads.
test-faults: install
	rm -rf build/faults
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m faults tests

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/run_all.py

# Wheel and sdist, and the wheel alone in an empty environment of every Python at hand; it needs uv, or the package build.
check-release:
	$(PYTHON) scripts/check_release.py

# The lowest versions that pyproject.toml allows, in an environment of their own; it needs uv.
check-lowest:
	$(PYTHON) scripts/check_release.py --lowest

site: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python scripts/site_pages.py
	$(BIN)/python -m mkdocs build --strict --quiet --config-file build/mkdocs.yml

clean:
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
