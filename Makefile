# `make demo` shows it at work, `make test` tests it. As root on a bare Debian 12 everything that is needed gets
# installed first; without root the tests of the kernel are skipped, each with its reason.

export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONOPTIMIZE PYTHONUSERBASE VIRTUAL_ENV

PY := .venv/bin/python

.PHONY: help demo test unit lint bench venv setup clean

help:
	@echo "make demo         a node in network namespaces, served by kproxy; root; ends with Ctrl-C"
	@echo "make demo ONCE=1  the same, once through and out: some seconds"
	@echo "make test         every test: unit, integration, packaging; about 12 minutes"
	@echo "make unit         the quick ones"
	@echo "make lint         ruff, mypy, import contracts"
	@echo "make bench        the data plane beside HAProxy and nginx; root; 9 minutes, QUICK=1: 2. WHAT=..."
	@echo "make venv         only build .venv; PYTHON=... chooses the interpreter"
	@echo "make clean        remove what was built"

venv: .venv/.ready

.venv/.ready: setup.cfg pyproject.toml .ci/setup
	@PYTHON="$(PYTHON)" bash .ci/setup

# Also when it was done before: asks again what is missing on this machine.
setup:
	@PYTHON="$(PYTHON)" bash .ci/setup

demo: venv
	@$(PY) demo/demo.py $(if $(ONCE),--once)

test: venv
	@$(PY) -m tests.run

unit: venv
	@$(PY) -m tests.run unit

lint: venv
	@$(PY) -m tests.run --lint --no-tests

bench: venv
	@$(PY) -m benchmarks $(WHAT) $(if $(QUICK),--quick)

clean:
	rm -rf .venv build dist *.egg-info _trial_temp* .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f twisted/plugins/dropin.cache kproxy-demo.log
	find twisted_kproxy twisted tests benchmarks demo -name __pycache__ -type d -prune -exec rm -rf {} +
