# `make help` lists the targets.
PYTHON ?= python3
OUT ?= out
PARTS ?=
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help figures test systems layers lint bench readme docs clean
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

help: ## show this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1	\2/p' Makefile | expand -t 18
	@echo "The first use installs into $(VENV). To choose a Python: make PYTHON=python3.12 figures"

figures: $(VENV)/installed ## run every experiment on embedded data, seconds each; figures go to out/
	@status=0; \
	$(BIN)/python -m experiments all --preset smoke --out "$(OUT)" || status=$$?; \
	$(BIN)/python -m experiments report --out "$(OUT)" || status=$$?; \
	echo "Figures and records are in $(OUT)/, all on one page in $(OUT)/index.html"; \
	exit $$status

test: $(VENV)/installed-dev ## run the tests; INFLUENCE_DATA names the folder of the real data
	@OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

systems: $(VENV)/installed-dev ## test every solver on 200 random linear systems of each kind; takes minutes
	@SYSTEMS=200 OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 $(BIN)/python -m pytest --numprocesses auto \
	  --timeout 3600 tests/influence/solvers/test_systems.py

layers: $(VENV)/installed-dev ## test the derivatives of every Keras layer, an hour; goes on where it stopped
	@status=0; for onednn in 1 0; do \
	  TF_ENABLE_ONEDNN_OPTS=$$onednn $(BIN)/python -m tests.influence.net.layer_grid "$(OUT)/layers.jsonl" || status=1; \
	done; exit $$status

lint: $(VENV)/installed-dev ## run ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/pyright

bench: $(VENV)/installed ## compare speed with targets and other libraries, 1 hour; parts: make bench PARTS="lissa cnn"
	@for peers in bench bench-tf; do \
	  $(MAKE) --no-print-directory $(VENV)-$$peers/installed || \
	  echo "The benchmarks run without the libraries of requirements-$$peers.txt. That file says what they need." >&2; \
	done
	@$(BIN)/python -m benchmarks $(PARTS)

readme: $(VENV)/installed ## update README's table and docs/experiments from results/*/record.json
	@$(BIN)/python -m experiments report --readme README.md --pages docs/experiments --results results

docs: $(VENV)/installed-docs ## build the documentation; the first page is out/docs/index.html
	@$(BIN)/python docs/write_notebooks.py
	@$(BIN)/python -m sphinx -W --keep-going --quiet -d "$(OUT)/doctrees" docs "$(OUT)/docs"
	@echo "The first page is $(OUT)/docs/index.html"

clean: ## remove generated files, except .venv and results
	@rm -rf out examples-out influence-out build .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# If .venv has no pip, its creation was interrupted: create it again.
$(VENV)/installed: requirements.txt
	@set -e; python="$(PYTHON)"; \
	if $(BIN)/python -m pip --version >/dev/null 2>&1; then python=$(BIN)/python; fi; \
	command -v "$$python" >/dev/null || { \
	  echo "PYTHON must name a Python 3.10 to 3.13, but there is no $$python: make PYTHON=python3.12 ..." >&2; exit 1; }; \
	"$$python" -c 'import sys; v = "%d.%d.%d" % sys.version_info[:3]; \
	(3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	"Python 3.10 to 3.13 is needed, but %s is %s: make PYTHON=python3.12 ... (if $(VENV) exists, first rm -rf $(VENV))" \
	% (sys.executable, v)); print("Python", v, "in $(VENV)")'; \
	if [ "$$python" != $(BIN)/python ]; then "$$python" -m venv --clear $(VENV); fi
	@echo "Installing requirements.txt into $(VENV). This happens once and takes some minutes and about 2 GB ..."
	@$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed requirements-docs.txt
	@echo "Installing requirements-docs.txt into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --requirement requirements-docs.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt requirements-docs.txt
	@echo "Installing requirements-dev.txt into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

$(VENV)-bench/installed: requirements-bench.txt
	@echo "Installing requirements-bench.txt into $(VENV)-bench ..."
	@$(BIN)/python -m venv --clear $(VENV)-bench
	@$(VENV)-bench/bin/python -m pip install --quiet --requirement requirements-bench.txt
	@touch $@

# This folder has only influenciae and tf-keras. They use the TensorFlow of $(VENV).
$(VENV)-bench-tf/installed: $(VENV)/installed requirements-bench-tf.txt
	@echo "Installing requirements-bench-tf.txt into $(VENV)-bench-tf ..."
	@rm -rf $(VENV)-bench-tf
	@$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)-bench-tf \
	  --requirement requirements-bench-tf.txt
	@touch $@
