# The commands of the project; `make` prints them. Everything is installed into .venv and nowhere else.
PYTHON ?= python3
BIN := .venv/bin
# What JupyterLab writes into a notebook when it saves one, beside outputs and counts.
SAVED := $(addprefix metadata.language_info.,codemirror_mode file_extension mimetype nbconvert_exporter pygments_lexer version)
NBSTRIPOUT := $(BIN)/nbstripout --keep-id --extra-keys "$(SAVED)"

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test browser cluster-test check format gitfilter lab docs lock assets screenshots reference curves links clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.stamp  ## install the versions of requirements.lock into .venv (7 GB, a few minutes, once)

reproduce: setup  ## run the whole chain on the mini data set; ends with the results and the path of the report
	$(BIN)/smaf run configs/mini.yaml

# Whole files, since a file shares what its tests set up, in the order of tests/conftest.py.
AT_ONCE := --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
test: setup browser  ## run all tests
	$(BIN)/python -m pytest $(AT_ONCE)

# tests/browser/conftest.py tries the same names. Without a browser its tests say so: skipped here, failed in CI.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
browser:  ## make sure of a Chromium for the browser tests; root on Debian or Ubuntu gets it from apt-get
	@for name in "$$SMAF_CHROMIUM" $(BROWSERS); do command -v "$$name" >/dev/null 2>&1 && exit; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  mkdir -p build; apt="apt-get -qq -o Acquire::Retries=3"; $$apt update && DEBIAN_FRONTEND=noninteractive $$apt install \
	  --no-install-recommends chromium fonts-dejavu-core >build/browser.log 2>&1 || \
	  echo "apt-get could not install chromium: build/browser.log"; \
	else echo "no Chromium here, so the browser tests are skipped; install it, or name one in SMAF_CHROMIUM"; fi

check: setup  ## format, lint, types, notebooks stored without outputs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(NBSTRIPOUT) --verify notebooks/*.ipynb

format: setup  ## bring code into shape and strip the notebooks' outputs
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(NBSTRIPOUT) notebooks/*.ipynb

# JupyterLab saves by itself, with outputs. git compares what the filter leaves of a notebook: its text and code. Not jupytext: that would
# keep each notebook twice, and what people open would not be what papermill runs.
gitfilter:  ## let git overlook the outputs in notebooks, so that running them leaves nothing to commit (setup does it)
	@! git rev-parse --git-dir >/dev/null 2>&1 || { git config filter.nbstripout.smudge cat && git config \
	  filter.nbstripout.clean 'if [ -x $(BIN)/nbstripout ]; then $(NBSTRIPOUT); else cat; fi'; }

docs: setup  ## build the documentation, offline: docs/_build/html/index.html
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

lab: setup  ## open the notebooks in JupyterLab; the reports of runs can be opened there, too
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_one_image_end_to_end.ipynb

assets: setup  ## renew the pretrained weights from the run papermill_runs/mini, and the README's picture
	$(BIN)/python -m tools.make_assets papermill_runs/mini docs/scales.png

screenshots: setup browser  ## take the pictures of the explorer again, in a real browser
	SMAF_SCREENSHOTS=docs $(BIN)/python -m pytest tests/browser -k screenshot

cluster-test: setup  ## run a sweep on a real Slurm on this machine; root on Debian or Ubuntu gets it from apt-get
	@mkdir -p build; command -v slurmctld >/dev/null && command -v munged >/dev/null || { apt="apt-get -qq -o Acquire::Retries=3"; \
	  $$apt update && DEBIAN_FRONTEND=noninteractive $$apt install --no-install-recommends slurm-wlm munge \
	  >build/slurm.log 2>&1; } || { echo "apt-get could not install slurm-wlm and munge: build/slurm.log" >&2; exit 1; }
	$(BIN)/python -m tools.cluster_test

# Which run is exported; one thread, so that the numbers do not depend on the cores of this machine.
REFERENCE_RUN ?= mini-reference
REFERENCE_SETTINGS := configs/mini.yaml --name $(REFERENCE_RUN) --set num_threads=1

reference: setup  ## renew papermill_runs/reference: the mini preset and its ablation, 20 to 40 minutes; resumes where it stopped
	$(BIN)/smaf run $(REFERENCE_SETTINGS)
	$(BIN)/smaf ablate $(REFERENCE_SETTINGS) --seeds 0,1,2
	$(BIN)/smaf run $(REFERENCE_SETTINGS)
	$(BIN)/python -m tools.export_reference_run papermill_runs/$(REFERENCE_RUN)

curves: setup  ## draw docs/voc12_small.png from docs/voc12_small.json
	$(BIN)/python -m tools.photo_curves

links:  ## put REPOSITORY=owner/name (on GitHub) into the notebook for Colab
	@case '$(REPOSITORY)' in */*) ;; *) echo "say which: make links REPOSITORY=owner/name" >&2; exit 1;; esac
	sed -i.bak 's#OWNER/NAME#$(REPOSITORY)#g' binder/colab.ipynb
	rm binder/colab.ipynb.bak

clean:  ## remove caches and build leftovers; .venv and papermill_runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

HEADERS := import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("include"), "Python.h").stat()

# The stamp comes last: a set-up that was interrupted resumes with the next call.
.venv/.stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "smaflib needs Python 3.11 or newer, '$(PYTHON)' is not; name one with: make setup PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@if command -v gcc >/dev/null && command -v g++ >/dev/null && $(PYTHON) -c '$(HEADERS)' 2>/dev/null; \
	then cp requirements.lock .venv/requirements.txt; \
	else grep -v '^pydensecrf2==' requirements.lock >.venv/requirements.txt; \
	  echo "no gcc, g++ or Python headers here, so pydensecrf2 cannot be compiled and is left out: torch refines the" \
	  "masks, with the same result. To have both, install them ('apt install build-essential python3-dev' on Debian" \
	  "and Ubuntu, 'xcode-select --install' on a Mac), then: rm -r .venv && make setup"; fi
	$(BIN)/python -m pip install --disable-pip-version-check --requirement .venv/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@$(MAKE) --no-print-directory gitfilter
	touch $@

# Torch's own CUDA and triton packages stay out (see the lock's header), and so do pip and smaflib itself. appnope is
# what IPython's kernel needs on a Mac and nowhere else. From 3.0.2 on soupsieve asks for Python 3.11.5; Debian 12 has 3.11.2.
lock:  ## write requirements.lock again from the newest versions that pyproject.toml allows
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]' appnope 'soupsieve<3'
	{ grep '^#' requirements.lock; build/lock/bin/python -m pip freeze --all --exclude pip --exclude-editable \
	  | grep -vE '^(cuda-|nvidia-|triton==)' \
	  | sed "s/^appnope==.*/& ; sys_platform == 'darwin'/"; } > build/requirements.lock
	mv build/requirements.lock requirements.lock
	rm -rf build/lock
