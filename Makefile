# make setup: all that is needed, on Debian 12+ or Ubuntu 22.04+.  make demo: see it work.  make check: fast, before
# each commit.  make test: all of it.

# The interpreter for .venv: the distribution's, as the package has it (another may be built without its optimisations)
# if it is new enough, else a newer one beside it. Choose one with PYTHON=...
PYTHON ?= $(shell for python in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Every Python package has the version and one of the hashes in conf/locked, what builds them too.
PIP := -m pip install --quiet --disable-pip-version-check --no-build-isolation --use-pep517
LOCKED := $(PIP) --require-hashes

.DEFAULT_GOAL := help
.PHONY: help setup packages image demo picture test test-matrix test-foreign test-on test-pythons lint bench fuzz chaos fleet audit deb

help:
	@echo "make setup   install what is needed: distribution packages, $(VENV), the guest image"
	@echo "make demo    boot a real guest, give it CPUs and memory while it runs, ask the guest"
	@echo "make picture the picture of the demo in README"
	@echo "make test    run all tests, those on a real guest too; ARGS='-k dimm' goes to pytest"
	@echo "make test-matrix   start 14,000 definitions before and after they are prepared: half a day; ARGS='q35 kvm32' or"
	@echo "                   ARGS='--seconds 600' for some"
	@echo "make test-foreign  guests of POWER, s390x and Arm, and the newest QEMU and libvirt; ten minutes"
	@echo "make test-on       the gate on another Debian, in a directory: SUITE=trixie ARGS='tests/unit'"
	@echo "make test-pythons  the fast tests on Python 3.11 to 3.14; ARGS='--on 3.12' for one"
	@echo "make check   the fast gate: lint, types, floors, golden plans, documents, unit tests; some minutes"
	@echo "make lint    ruff and mypy"
	@echo "make bench   how fast and how small it is: every target with the ratio to it; build/bench.json"
	@echo "make fuzz    what takes bytes from outside, led by coverage; SECONDS=600 for each target"
	@echo "make chaos   everything at once is done to the agent, for hours: SECONDS=3600 SEED=1; figures at its end"
	@echo "make fleet   many agents, their server and Prometheus in one box: N=100 SECONDS=120, the server's outage"
	@echo "make audit   known holes in the Python packages that are installed"
	@echo "make lock    write conf/locked anew: the versions and hashes of all Python packages; UPGRADE=NAME or all"
	@echo "make release VERSION=1.0.0   set the version everywhere and freeze its contract; CONTRIBUTING.md has the rest"
	@echo "make deb     the Debian package and its SBOM, in dist/; with the Python packages of conf/locked"

setup: packages $(STAMP) image

packages:
	@PYTHON="$(PYTHON)" sh tests/lab/packages.sh

$(STAMP): setup.py pyproject.toml $(wildcard conf/locked/*.txt) | packages
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python 3.11 or newer is needed; name one: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "==> making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> installing kvmagent and its Python packages (libvirt-python is compiled: a minute or so)"
	@$(BIN)/python $(LOCKED) -r conf/locked/build.txt
	@$(BIN)/python $(LOCKED) -r conf/locked/test.txt
	@$(BIN)/python $(PIP) --no-deps --editable .
	@touch $@

image: $(STAMP)
	@$(BIN)/python -m tests.lab.image
	@$(BIN)/python -m tests.lab.foreign
	@$(BIN)/python -m tests.lab.promtool
	@$(BIN)/python -m tests.lab.axe
	@$(BIN)/python -m tests.lab.fonts
	@$(BIN)/python -m tests.lab.nodepackages

# What the tests need beside it, a demo does not: a third of the packages, and an environment of its own.
DEMO := $(VENV)-demo

$(DEMO)/.installed: setup.py pyproject.toml $(wildcard conf/locked/*.txt)
	@PYTHON="$(PYTHON)" sh tests/lab/packages.sh demo
	@echo "==> making $(DEMO): kvmagent and its Python packages (libvirt-python is compiled: a minute or so)"
	@$(PYTHON) -m venv $(DEMO)
	@$(DEMO)/bin/python $(LOCKED) -r conf/locked/build.txt
	@$(DEMO)/bin/python $(LOCKED) -r conf/locked/agent.txt
	@$(DEMO)/bin/python $(PIP) --no-deps --editable .
	@touch $@

demo: $(DEMO)/.installed
	@$(DEMO)/bin/python -m tests.lab.demo

picture: $(DEMO)/.installed
	@$(DEMO)/bin/python -m tests.lab.demo --svg docs/demo.svg

# Two workers more than CPUs: many tests wait for a guest or a limit.
WORKERS ?= $(shell echo $$(($$(nproc) + 2)))

# The tests start the programs a thousand times: each would compile them, where PYTHONDONTWRITEBYTECODE is set.
COMPILE = $(BIN)/python -m compileall -q kvmagent plugins

test: setup
	@echo "==> all tests, real guests, browsers and packages too: some 25 minutes on two cores, and ten more the first time; make check takes a few"
	@$(COMPILE)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-matrix: setup
	@$(BIN)/python -m tests.matrix $(ARGS)

test-foreign: setup
	$(BIN)/python -m pytest tests/guest/test_foreign.py tests/guest/test_power.py tests/guest/test_newest.py $(ARGS)

SUITE := trixie

test-on: $(STAMP)
	@$(BIN)/python -m tests.lab.suite $(SUITE) $(ARGS)

test-pythons: setup
	@$(BIN)/python -m tests.lab.pythons $(ARGS)

check: $(STAMP)
	@$(COMPILE)
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow" tests/test_lint.py tests/test_floors.py tests/golden tests/docs/test_docs.py tests/unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict kvmagent plugins

bench: setup
	@$(BIN)/python $(LOCKED) -r conf/locked/bench.txt
	@$(BIN)/python -m tests.bench $(ARGS)

SECONDS := 60
FUZZED := wire framing domainxml

fuzz: $(STAMP)
	@$(BIN)/python $(LOCKED) -r conf/locked/fuzz.txt
	@for target in $(FUZZED); do $(BIN)/python -m tests.fuzz.coverage_guided $$target $(SECONDS) || exit 1; done

SEED := 1

chaos: setup
	KVMAGENT_CHAOS_SECONDS=$(SECONDS) KVMAGENT_CHAOS_SEED=$(SEED) $(BIN)/python -m pytest -s tests/chaos

N := 100

fleet: setup
	@$(BIN)/python -m tests.fleet $(N) $(SECONDS)

audit: $(STAMP)
	@$(BIN)/python $(LOCKED) -r conf/locked/audit.txt
	@$(BIN)/pip-audit --skip-editable

# UPGRADE=NAME or UPGRADE=all: what is locked is replaced by the newest version; without it, only what setup.py asks.
.PHONY: lock
lock: $(STAMP)
	@$(BIN)/python $(LOCKED) -r conf/locked/lock.txt
	@$(BIN)/python conf/locked/lock.py $(UPGRADE)

# The version stands in kvmagent/__init__.py, and the collection's is the same; the contract of each version is frozen.
.PHONY: release
release: $(STAMP)
	@test -n "$(VERSION)" || { echo "make: name the version: make release VERSION=1.0.0" >&2; exit 1; }
	@sed -i 's/^__version__ = .*/__version__ = "$(VERSION)"/' kvmagent/__init__.py
	@sed -i 's/^version: .*/version: $(VERSION)/' conf/ansible/galaxy.yml
	@sed -i "s/^## Unreleased$$/## $(VERSION) - $$(date -u +%F)/" CHANGELOG.md conf/ansible/CHANGELOG.md
	$(BIN)/python -m pytest -q tests/http/test_contract.py -k frozen --update-golden
	@git status --short

deb: $(STAMP)
	@sh conf/debian/build.sh $(BIN)/python dist
