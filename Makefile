# Each target sets up what it needs: .venv with vLLM 0.32.0, for the GPU or CPU it finds.
.PHONY: help setup demo test test-all lint

help:
	@echo "make demo      serve the nano pair, stream a completion, compare with plain vLLM"
	@echo "make test      linters and the tests, a chosen part of the matrices"
	@echo "make test-all  the full matrices (hours on 2 cores)"
	@echo "make lint      ruff and mypy"
	@echo "make setup     only install into .venv"

setup:
	@scripts/setup.sh

demo: setup
	@.venv/bin/python examples/demo.py $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# One engine a module; two modules at a time.
PYTEST = .venv/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not full" $(ARGS)

test-all: lint
	$(PYTEST) $(ARGS)
