# Everything runs from .venv, which is made again only when setup.py changes.
#   make run     start the system with the examples, here, now
#   make demo    five calls and their answers, checked
#   make test    all checks: lint, types, tests; as root it gets by apt what they want
#   make coverage  the tests with a floor for the code that they reach; our programs need twice the time under it
#   make quick   lint, types, and the tests that start no process
#   make lint    lint and types only
#   make clean   remove what these have made
# PYTHON=python3.12 picks another interpreter than python3, TEST_PROCESSES=4 how many run tests: most wait for something.

PYTHON ?= python3
TEST_PROCESSES ?= 3
BIN    := .venv/bin
STATE  := .run
URL    := http://127.0.0.1:$(or $(port),8080)

.PHONY: help run demo test coverage quick lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   make/make/p' Makefile

run: .venv/installed
	@mkdir -p $(STATE)/tmp
	@echo "Starting the system at $(URL); its queue is $(STATE)/spool, Ctrl-C stops it.  What it does is shown at $(URL)/ui/.  To try from another terminal:"
	@$(BIN)/python examples/demo.py --lines $(URL)
	@exec env TMPDIR="$$PWD/$(STATE)/tmp" functions=examples/functions.toml queue_url=spool:$(STATE)/spool state=$(STATE)/state $(BIN)/fgateway

demo: .venv/installed
	@$(BIN)/python examples/demo.py

test: lint
	@$(get_needed)
	@$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal --timeout 600

coverage: lint
	@$(get_needed)
	@$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal --timeout 600 --cov --cov-report term

quick: lint
	@$(BIN)/python -m pytest -q -n 2 --no-processes

lint: .venv/installed-test .venv/package/faashound
	@$(BIN)/ruff check -q --output-format concise . || { echo "make: ruff found faults; '$(BIN)/ruff check --fix .' mends some of them" >&2; exit 1; }
	@$(BIN)/ruff format -q --check . || { echo "make: the format is not ruff's; '$(BIN)/ruff format .' makes it so" >&2; exit 1; }
	@MYPYPATH=.venv/package $(BIN)/mypy -p faashound

clean:
	rm -rf .venv $(STATE) build dist *.egg-info .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# mypy does not follow the import hook of an editable install: it gets the package, and with it tests and examples, as
# a directory of that name.
.venv/package/faashound: .venv/installed
	@mkdir -p .venv/package
	@ln -sfn ../.. $@

.venv/installed: setup.py
	@$(make_venv)
	@$(call install,.)
	@touch $@

.venv/installed-test: setup.py .venv/installed
	@$(call install,.[test])
	@touch $@

define install
echo "Installing faashound$(patsubst .%,%,$(1)) into .venv" && \
$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '$(1)' || { \
	echo "make: pip could not install faashound and what it needs (above); it needs a package index it can reach" >&2; exit 1; }
endef

# What some tests want of the machine (testkit/needed.py) is installed where that is for us to do, else named.
define get_needed
wanted="$$($(BIN)/python -m testkit.needed)"; \
if [ -z "$$wanted" ]; then exit 0; fi; \
if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	echo "Installing $$wanted"; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get -qq update && apt-get -qq install -y --no-install-recommends $$wanted >/dev/null && exit 0; \
fi; \
echo "make: some tests are left out for want of programs; to run them too: sudo apt-get install $$wanted" >&2
endef

# Debian's python3 comes without ensurepip, which python3-venv brings.
define make_venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "make: Python 3.11 or newer is needed as $(PYTHON); install it, or name one: make PYTHON=python3.12" >&2; exit 1; }; \
if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing python3-venv" && apt-get -qq update && apt-get -qq install -y python3-venv >/dev/null; \
	else \
		echo "make: Python's venv module is missing; run 'sudo apt-get install python3-venv', then this again" >&2; exit 1; \
	fi; \
fi; \
rm -rf .venv && $(PYTHON) -m venv .venv || { echo "make: $(PYTHON) could not make .venv (above)" >&2; exit 1; }
endef
