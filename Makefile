# Two commands on a bare machine with Python 3.11 or newer: `make demo` and `make test`.
# Each makes the virtual environment it needs in .venv first.

# The newest Python that is there and can make environments: 3.12 and 3.13 get a newer and faster jax than 3.11.
PYTHON ?= $(shell for v in 3.13 3.12 3.11; do python$$v -c 'import ensurepip, venv' 2>/dev/null && echo python$$v && exit; done; echo python3)
VENV ?= .venv
PY := $(VENV)/bin/python
DEMO ?= runs/demo
# Large buffers in 2 MB pages where glibc knows how to ask for them; it ignores what it does not know.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1
# Tests in as many processes as there are processors; the tests of a file share what they have made.
WORKERS ?= --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all lint docs benchmark clean

demo: $(VENV)/.installed  ## Train on generated scenes, evaluate densely and with CSQ, draw pictures (about 10 minutes)
	rm -rf $(DEMO)
	$(HUGE_PAGES) $(PY) train.py demo --run $(DEMO)
	$(HUGE_PAGES) $(PY) eval.py $(DEMO)
	$(HUGE_PAGES) $(PY) predict.py hituav --images examples/hituav --out $(DEMO)/hituav --draw queries

test: lint  ## Style, types, layers and the test suite
	$(PY) -m pytest $(WORKERS)

test-all: lint  ## The same with the tests marked slow
	$(PY) -m pytest $(WORKERS) -m ""

lint: $(VENV)/.installed-test  ## Style, types and layers only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright --pythonpath $(PY)
	PYTHONPATH=. $(VENV)/bin/lint-imports

docs: $(VENV)/.installed-docs  ## The documentation, in docs/_build/html; warnings are errors
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo "built docs/_build/html/index.html"

benchmark: $(VENV)/.installed  ## Dense against CSQ, ResNet-50, 800x1344
	$(HUGE_PAGES) $(PY) benchmark.py end-to-end

# The commands run from the checkout, so only what they need is installed, not the package itself.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(PY) || { echo "making $(VENV) with $$($(PYTHON) --version); another: make PYTHON=python3.X"; $(PYTHON) -m venv $(VENV); }
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt
	$(PY) -m pip install --quiet -r requirements-test.txt
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed requirements-docs.txt
	$(PY) -m pip install --quiet -r requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis docs/_build
