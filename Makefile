# make train   train the two-block CNN on real handwritten digits
# make test    every test that needs no GPU, lane by lane (see tests/conftest.py)
#
# Both set up what they need in .venv on the first run, with the versions of constraints.txt.

PYTHON ?= python3
# each run has a folder of its own; continue one with: make train OUT=runs/digits-... ARGS=--resume
OUT ?= runs/digits-$(shell date +%Y%m%d-%H%M%S)
ARGS ?=
RUN := .venv/bin/python
PYTEST := $(RUN) -m pytest -q -n auto --dist worksteal
# a second Triton (and the NumPy that its interpreter works with), found before the one in .venv
OLDEST := PYTHONPATH=$(CURDIR)/.triton36

.PHONY: train test lint reference interpreter codegen stub emulated oldest bench mutants clean

train: .venv/ready
	.venv/bin/tritonshare train --out $(OUT) $(ARGS)

test: lint reference stub codegen emulated interpreter oldest

lint: .venv/ready
	$(RUN) -m ruff check .

reference: .venv/ready
	$(PYTEST) --lane reference

interpreter: .venv/ready
	TRITON_INTERPRET=1 $(PYTEST) --lane interpreter

codegen: .venv/ready
	$(PYTEST) --lane codegen

# of every op some calls, on two chips; without the -m all cases in all dtypes
emulated: .venv/ready
	$(PYTEST) --lane emulated -m 'not repetition'

# a whole dry day takes minutes: `oldest` runs it, with the Triton that machines with a GPU tend to have, and codegen
# beside it
stub: .venv/ready
	$(PYTEST) --lane stub --deselect tests/test_gpu_day.py::test_a_dry_day_leaves_what_a_day_leaves
	$(RUN) -m pytest -q bench --benchmark-disable

# every op beside its rivals on a GPU; anywhere, host microseconds per call with the device stubbed out
bench: .venv/ready
	$(RUN) -m pytest bench --benchmark-columns=median,iqr,min,rounds $(ARGS)

# a sample of wrong kernels, which the tests must tell; others with: make mutants ARGS="segment --each 20 --seed 1"
mutants: .venv/ready
	$(RUN) -m tests.mutants $(ARGS)

oldest: .venv/ready .triton36/ready
	$(OLDEST) $(PYTEST) -m '(stub or codegen or emulated and not repetition) and not once'
	$(OLDEST) TRITON_INTERPRET=1 $(PYTEST) --lane interpreter -m 'not once'

# torch first and by itself, so that what follows takes the build it found (a CPU build where one is offered)
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -c constraints.txt torch
	$(RUN) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.triton36/ready: .venv/ready
	$(RUN) -m pip install -q --no-deps --upgrade --target .triton36 triton==3.6.0 'numpy<2.4'
	touch $@

clean:
	rm -rf .venv .triton36 build *.egg-info .ruff_cache
