# `make demo` and `make test` set up all they need in .venv by themselves and are safe to repeat.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint bench bench-decode bench-train bench-losses clean

demo: $(VENV)/.installed
	$(RUN) train_dpo.py --config data/demo.json --output-dir runs/demo $(ARGS)

# two test files at a time, each on one thread; ARGS="-n 0 tests/test_dpo.py" runs one in this process
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-dev
	$(TEST) $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(TEST) -m slow $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: bench-decode bench-train

bench-decode: $(VENV)/.installed-dev
	$(RUN) benchmarks/decode.py $(ARGS)

bench-train: $(VENV)/.installed-dev
	$(RUN) benchmarks/train.py $(ARGS)

bench-losses: $(VENV)/.installed
	$(RUN) benchmarks/demo_losses.py $(ARGS)

$(VENV)/.installed: setup.py constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[plots]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[plots,dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info
