# `make video` and `make test` set up what they need in .venv, once: a second run finds the stamp and goes straight on.
#
# pip's own variables are honoured. PyPI's torch for Linux carries CUDA; for the CPU build, a tenth of its size, give
# PIP_EXTRA_INDEX_URL=<index of PyTorch's CPU wheels> or PIP_FIND_LINKS=<folder that holds one>.

PYTHON ?=
# Not ?=: some shells have a PROMPT of their own in the environment.
PROMPT = a large red circle moving left on a gray background
OUT = outputs/video.mp4
ARGS =
# By the environment, so that a prompt may hold quotes.
export PROMPT OUT

BIN := .venv/bin
STAMP := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup video app test lint format clean

help:
	@echo "make video   a video from a sentence: PROMPT='...' OUT=video.mp4 ARGS='--seed 1'"
	@echo "make app     the app in a browser, at http://127.0.0.1:7860: ARGS='--port 8000'"
	@echo "make test    the tests: ARGS='tests/kernels -x'"
	@echo "make lint    style and types; make format mends the style"
	@echo "make setup   only the set-up that the others share: PYTHON=python3.12"
	@echo "make clean   remove the set-up and what tools left behind"

video: $(STAMP)
	@mkdir -p "$$(dirname "$$OUT")"
	@$(BIN)/ziggurat generate "$$PROMPT" --out "$$OUT" $(ARGS)

app: $(STAMP)
	@$(BIN)/ziggurat app $(ARGS)

test: $(STAMP)
	@$(BIN)/pytest -rs $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/basedpyright -p pyproject.toml

format: $(STAMP)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

setup: $(STAMP)

FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

# A name on the path proves nothing: version managers put names there that only fail. So each candidate has to run.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1 || ! $(BIN)/python -c "$(FITS)" >/dev/null 2>&1; then \
	  chosen=; lacking=; \
	  for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	    "$$python" -c "$(FITS)" >/dev/null 2>&1 || continue; \
	    if "$$python" -c "import ensurepip, venv" >/dev/null 2>&1; then chosen=$$python; break; fi; \
	    lacking=$${lacking:-$$python}; \
	  done; \
	  if [ -z "$$chosen" ] && [ -n "$$lacking" ]; then \
	    version=$$("$$lacking" -c "import sys; print('%d.%d' % sys.version_info[:2])"); \
	    echo "$$lacking can't make a virtual environment with pip in it:" \
	      "on Debian and Ubuntu run 'apt install python$$version-venv', then make again." >&2; exit 1; \
	  elif [ -z "$$chosen" ]; then \
	    echo "Ziggurat needs Python 3.11, 3.12 or 3.13, and $(if $(PYTHON),$(PYTHON) is none that works,none that works" \
	      "is on the path): install one, or name it with PYTHON=/path/to/python3.12." >&2; exit 1; \
	  fi; \
	  echo "Setting up .venv with $$("$$chosen" --version): a minute or two, once"; \
	  "$$chosen" -m venv --clear .venv || exit 1; \
	fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	@mkdir -p .venv/typing && ln -sfn ../.. .venv/typing/ziggurat
	@touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
