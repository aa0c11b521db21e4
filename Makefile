# README's two commands are `make demo` and `make test`. Everything lives in .venv; nothing outside is touched.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
JOBS   ?= 2

.PHONY: demo test test-slow check lint types imports bench matrix contest picture clean

$(VENV)/core.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing bitport (PyTorch and ONNX Runtime; a minute or two the first time) ..."
	$(PIP) -e .
	@touch $@

$(VENV)/test.stamp: $(VENV)/core.stamp
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/lint.stamp: $(VENV)/test.stamp
	$(PIP) -e '.[test,lint]'
	@touch $@

demo: $(VENV)/core.stamp
	$(BIN)/bitport demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

$(VENV)/slow.stamp: $(VENV)/test.stamp
	$(PIP) -e '.[test,tensorflow]'
	@touch $@

test-slow: $(VENV)/slow.stamp
	$(BIN)/python -m pytest -m slow

check: lint types imports

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench

types: $(VENV)/lint.stamp
	$(BIN)/mypy

imports: $(VENV)/lint.stamp
	$(BIN)/lint-imports

bench: $(VENV)/core.stamp
	$(BIN)/python -m bench.run --write docs/benchmarks.md

matrix: $(VENV)/slow.stamp
	$(BIN)/python -m bench.matrix --write docs/matrix.md

contest: $(VENV)/test.stamp
	$(BIN)/python -m bench.peers.contest --record --write docs/benchmarks.md

picture: $(VENV)/test.stamp
	$(BIN)/bitport demo
	$(BIN)/python -m bench.picture out/demo/report.html docs/img/report.png

clean:
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
