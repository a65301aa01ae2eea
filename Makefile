# make quickstart   text to trained MoE, in .venv, under 4 minutes          make test          what a change must pass
# make check        lint, format, types                                     make test-faults   kills of real runs
# make wheel        dist/openmoe-*.whl, as Ray jobs carry it                make lock          new versions and hashes
# make test-interop   exports in PyTorch and transformers, which it installs in .venv-interop
# make test-gpu     on a machine with a GPU, by the Python there, whose JAX is one for GPUs (with pytest, flax, optax)
# make demo-preemption   a fake TPU slice is taken away from a run, which goes on on another (Linux; 4 minutes)

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest
# A run is a dozen Python processes: importing takes each of them 3 s of CPU, and 10 s if nothing is kept compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-interop test-tpu test-gpu test-faults demo-preemption check format wheel wheel-check lock clean

quickstart: $(READY)
	$(BIN)/openmoe quickstart $(ARGS)

test: $(READY)
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "not faults" --ignore=tests/tpu --ignore=tests/interop --ignore=tests/gpu $(ARGS)

# Compiled by the TPU's own compiler, libtpu, which needs no TPU for that (Linux; 3 minutes).
test-tpu: .venv-tpu/.ready
	PYTHONPATH=.venv-tpu $(PYTEST) tests/tpu $(ARGS)

.venv-tpu/.ready: requirements-tpu.lock | $(READY)
	rm -rf .venv-tpu
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target .venv-tpu --require-hashes -r requirements-tpu.lock
	@touch $@

# What transformers makes of our exports and W&B of our curves (2 minutes). PyTorch comes by pip: maybe a build for CPUs.
test-interop: .venv-interop/.ready
	.venv-interop/bin/python -m pytest tests/interop tests/platform/train/test_wandb_curves.py $(ARGS)

.venv-interop/.ready: requirements-interop.lock $(READY)
	rm -rf .venv-interop && $(BIN)/python -m venv --without-pip .venv-interop
	$(BIN)/uv pip install --quiet --python .venv-interop/bin/python --require-hashes -r requirements-interop.lock
	$(BIN)/python -m pip --python .venv-interop/bin/python install --quiet torch==2.13.0
	@for bin in .venv-interop/bin $(BIN); do $$bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; done | \
		{ read -r new; read -r ours; echo "import site; site.addsitedir('$$ours')" >$$new/openmoe.pth; }
	@touch $@

test-gpu:
	$(PYTHON) -m pytest --confcutdir=tests/gpu tests/gpu $(ARGS)

test-faults: $(READY)
	$(PYTEST) -m faults --ignore=tests/gpu $(ARGS)

demo-preemption: $(READY)
	docs/demo_preemption.sh

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(READY)
	rm -rf dist build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build
	@ls dist

# A fresh environment with nothing but the wheel and the locked dependencies, away from the sources.
wheel-check: wheel
	rm -rf .venv-wheel && $(PYTHON) -m venv .venv-wheel
	$(BIN)/uv pip install --quiet --python .venv-wheel/bin/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python .venv-wheel/bin/python --no-deps dist/openmoe-*.whl
	cd .venv-wheel && bin/openmoe --help && bin/openmoe validate quickstart && bin/openmoe quickstart train.steps=20
	rm -rf .venv-wheel

$(READY): requirements.lock requirements-uv.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "needs Python 3.11, 3.12 or 3.13 on the PATH; or: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@mkdir -p .venv/typing/openmoe  # type checkers do not follow the editable install's map: the import names as links
	@for name in platform model pipelines clusters runs; do ln -sfn ../../../$$name .venv/typing/openmoe/$$name; done
	@touch $(READY)

lock: $(READY)
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --group dev \
		--python-version 3.11 -o requirements.lock pyproject.toml
	echo "uv==$$($(BIN)/uv --version | cut -d' ' -f2)" | $(BIN)/uv pip compile --quiet --universal \
		--generate-hashes --no-annotate --no-header --python-version 3.11 -o requirements-uv.lock -
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --extra tpu \
		--python-version 3.11 -c requirements.lock pyproject.toml | awk '/^[^ ]/ { keep = /^libtpu==/ } keep' \
		>requirements-tpu.lock
	printf '%s\n' transformers filelock jinja2 networkx setuptools sympy typing-extensions wandb | $(BIN)/uv pip compile --quiet \
		--universal --generate-hashes --no-annotate --no-header --python-version 3.11 -c requirements.lock \
		-o requirements-interop.lock -

clean:
	rm -rf .venv .venv-interop .venv-tpu .venv-wheel build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
