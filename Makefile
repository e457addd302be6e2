# Each target sets up what it needs: .venv with vLLM, for the GPU or CPU it finds.
.PHONY: help setup demo test test-all test-newest check-newest lint docs

help:
	@echo "make demo          serve the nano pair, stream a completion, compare with plain vLLM"
	@echo "make test          linters, the site and the tests, a chosen part of the matrices"
	@echo "make test-all      the full matrices (hours on 2 cores)"
	@echo "make test-newest   the tests closest to vLLM, on the newest minor that is supported"
	@echo "make check-newest  whether the newest vLLM release fits, by its source"
	@echo "make lint          ruff, mypy, import-linter, hadolint, schemas of YAML files"
	@echo "make docs          the documentation as a site, into build/site"
	@echo "make setup         only install into .venv"

setup:
	@scripts/setup.sh

demo: setup
	@.venv/bin/python examples/demo.py $(ARGS)

FORMS = .github/ISSUE_TEMPLATE
lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/hadolint docker/Dockerfile
	.venv/bin/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	.venv/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*
	.venv/bin/check-jsonschema --builtin-schema vendor.github-issue-config $(FORMS)/config.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.github-issue-forms \
		$(filter-out %/config.yml,$(wildcard $(FORMS)/*))
	@if command -v actionlint >/dev/null; then actionlint; \
	else echo "actionlint is not on the path: skipped here, GitHub's CI has it"; fi

docs: setup
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

# One engine a module; two modules at a time.
PYTEST = .venv/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint docs
	$(PYTEST) -m "not full" $(ARGS)

test-all: lint docs
	$(PYTEST) $(ARGS)

# Where that minor has no build for CPUs yet, its Python runs over the installed build. VLLM names
# another minor.
NEWEST = ring plugin options graphs lossless as_on_a_gpu
test-newest: setup
	vllm=$$(.venv/bin/python scripts/other_vllm.py $(VLLM)) && \
	PYTHONPATH=$$vllm $(PYTEST) -m "not full" $(NEWEST:%=tests/test_%.py) $(ARGS)

check-newest: setup
	.venv/bin/python scripts/check_vllm.py --newest
