# make train   train the two-block CNN on real handwritten digits
# make test    the tests that need no GPU, in minutes; `make long` runs the rest
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

.PHONY: train test long lint reference stub codegen emulated interpreter bench op mutants clean

train: .venv/ready
	.venv/bin/tritonshare train --out $(OUT) $(ARGS)

# Two processes' worth of lanes: Triton's interpreter needs a process of its own (see tests/conftest.py).
test: lint .venv/ready
	$(PYTEST) -m 'not long'
	TRITON_INTERPRET=1 $(PYTEST) -m 'not long'

# The long tests, benchmarks run dry, and the oldest Triton: with `make test`, all that needs no GPU, but for the
# emulated lane's other dtypes and chip, which `make emulated` runs.
long: .venv/ready .triton36/ready
	$(PYTEST) -m 'long and not emulated'
	$(PYTEST) --lane emulated -m long -k 'bf16-sm_90 or test_law or test_steps'
	$(RUN) -m pytest -q bench --benchmark-disable
	TRITON_INTERPRET=1 $(PYTEST) -m long
	$(OLDEST) $(PYTEST) -m '(stub or codegen or emulated and not long) and not once'
	$(OLDEST) TRITON_INTERPRET=1 $(PYTEST) -m 'not once'

lint: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m pyright

# One lane whole, long tests included.
reference stub codegen emulated: .venv/ready
	$(PYTEST) --lane $@

interpreter: .venv/ready
	TRITON_INTERPRET=1 $(PYTEST) --lane interpreter

# every op beside its rivals on a GPU; anywhere, host microseconds per call with the device stubbed out
bench: .venv/ready
	$(RUN) -m pytest bench --benchmark-columns=median,iqr,min,rounds $(ARGS)

# a new op, complete and green, to be changed into the one that is wanted: make op NAME=row_scale
op: .venv/ready
	$(RUN) -m tests.new_op $(NAME)

# a sample of wrong kernels, which the tests must tell; others with: make mutants ARGS="segment_sum --each 20 --seed 1"
mutants: .venv/ready
	$(RUN) -m tests.mutants $(ARGS)

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
