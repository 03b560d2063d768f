# Everything a newcomer needs: `make demo`, `make test`. Only python3 (3.11 or newer) and make are assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export RAY_DISABLE_IMPORT_WARNING := 1

.PHONY: help install demo report-demo test drills soak check audit format lock clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(STAMP)  ## the virtual environment with everything that was tested (quick when up to date)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 is older than 3.11; set PYTHON=" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: install  ## a whole run in a few minutes: synthetic release, ingest, two DDP workers, report, MLflow
	$(BIN)/python jobs/demo.py

report-demo: install  ## the whole report of the latest demo again, in seconds (a demo first, if there is none)
	$(BIN)/python jobs/demo.py --report

test: install check  ## lint, types, known vulnerabilities, and every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

drills: install  ## hurt real processes, and write what came of it to docs/reliability.md
	CXR_DRILLS=$(CURDIR)/docs/drills.jsonl $(BIN)/python -m pytest tests/drills -m drill
	$(BIN)/python -m tests.drills.table docs/drills.jsonl docs/reliability.md

soak: install  ## hurt one long run at random for MINUTES (30), SEED (0), and see what is lost and what grows
	mkdir -p outputs
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30) --seed $(or $(SEED),0) --json outputs/soak.json

check: install audit  ## lint, types, known vulnerabilities and AWS's template only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/cfn-lint infra/aws/stack.yaml

audit: install  ## known vulnerabilities of what is pinned, if PyPI can be asked
	$(BIN)/python infra/audit.py requirements.lock

format: install  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: install  ## pin what is installed now
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip > $(VENV)/freeze
	{ echo "# What was tested, pinned; written by make lock."; cat $(VENV)/freeze; } > requirements.lock

clean:  ## remove what make made
	rm -rf $(VENV) outputs demo-out .stack mlflow.db mlflow-artifacts
