# What a developer needs. `make run` and `make test` set up everything themselves (scripts/prepare).

VENV ?= .venv
PYTHON_VENV = $(VENV)/bin/python
export VENV

.PHONY: help run test lint format bench soak docs clean

help:
	@echo "make run [IMAGE=disk.qcow2] [FORMAT=raw|qcow2] [READONLY=1]   serve an image over NBD, controlled over QMP"
	@echo "make test [ARGS='-k nbd']                                     run the tests"
	@echo "make lint                                                     check style, types and the order of imports"
	@echo "make bench                                                    compare the speed with qemu-storage-daemon and nbdkit"
	@echo "make soak [ARGS='--minutes 10']                               run the random tests for longer"
	@echo "make docs                                                     write the QMP reference to build/docs/"

run:
	@scripts/prepare run
	@exec $(PYTHON_VENV) scripts/run.py $(if $(IMAGE),--image '$(IMAGE)') $(if $(FORMAT),--format '$(FORMAT)') \
	    $(if $(READONLY),--read-only)

test:
	@scripts/prepare test
	@$(PYTHON_VENV) -m pytest $(ARGS)

lint:
	@scripts/prepare lint
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format:
	@scripts/prepare lint
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

bench:
	@scripts/prepare test
	$(PYTHON_VENV) -m benchmarks $(ARGS)

soak:
	@scripts/prepare test
	$(PYTHON_VENV) -m tests.soak $(ARGS)

docs:
	@scripts/prepare run
	$(PYTHON_VENV) scripts/reference.py build/docs/qmp-reference.md

clean:
	rm -rf build dist .run .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
