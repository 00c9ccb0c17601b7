# `make help` lists what there is to make.
PYTHON ?= python3
OUT ?= out
PARTS ?=
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help figures test systems lint bench readme clean
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1	\2/p' Makefile | expand -t 18
	@echo "First use installs into $(VENV); another Python: make PYTHON=python3.12 figures"

figures: $(VENV)/installed ## every experiment on embedded data, in seconds each: figures under out/
	@status=0; \
	$(BIN)/python -m experiments all --preset smoke --out "$(OUT)" || status=$$?; \
	$(BIN)/python -m experiments report --out "$(OUT)" || status=$$?; \
	echo "Figures and records are in $(OUT)/, all on one page in $(OUT)/index.html"; \
	exit $$status

test: $(VENV)/installed-dev ## the tests; those that need real data look in INFLUENCE_DATA
	@OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

systems: $(VENV)/installed-dev ## 200 random linear systems of each kind, for every solver; minutes
	@SYSTEMS=200 OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 $(BIN)/python -m pytest --numprocesses auto \
	  --timeout 3600 tests/influence/solvers/test_systems.py

lint: $(VENV)/installed-dev ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/pyright

bench: $(VENV)/installed ## how fast, against the limit and against peers; an hour; some: make bench PARTS="lissa cnn"
	@for peers in bench bench-tf; do \
	  $(MAKE) --no-print-directory $(VENV)-$$peers/installed || \
	  echo "Benchmarks without the peers of requirements-$$peers.txt: it says what they need." >&2; \
	done
	@$(BIN)/python -m benchmarks $(PARTS)

readme: $(VENV)/installed ## the README's table, from results/*/record.json
	@$(BIN)/python -m experiments report --readme README.md --results results

clean: ## remove what was made, but not .venv and results
	@rm -rf out build .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# A .venv without pip is one whose making was interrupted.
$(VENV)/installed: requirements.txt
	@set -e; python="$(PYTHON)"; \
	if $(BIN)/python -m pip --version >/dev/null 2>&1; then python=$(BIN)/python; fi; \
	command -v "$$python" >/dev/null || { \
	  echo "PYTHON must name a Python 3.10 to 3.13, there is no $$python: make PYTHON=python3.12 ..." >&2; exit 1; }; \
	"$$python" -c 'import sys; v = "%d.%d.%d" % sys.version_info[:3]; \
	(3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	"Python 3.10 to 3.13 is needed, %s is %s: make PYTHON=python3.12 ... (after rm -rf $(VENV), if it is there)" \
	% (sys.executable, v)); print("Python", v, "in $(VENV)")'; \
	if [ "$$python" != $(BIN)/python ]; then "$$python" -m venv --clear $(VENV); fi
	@echo "Installing requirements.txt into $(VENV): once, some minutes, about 2 GB ..."
	@$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	@echo "Installing requirements-dev.txt into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

$(VENV)-bench/installed: requirements-bench.txt
	@echo "Installing requirements-bench.txt into $(VENV)-bench ..."
	@$(BIN)/python -m venv --clear $(VENV)-bench
	@$(VENV)-bench/bin/python -m pip install --quiet --requirement requirements-bench.txt
	@touch $@

# Beside the TensorFlow of $(VENV), which it runs on.
$(VENV)-bench-tf/installed: $(VENV)/installed requirements-bench-tf.txt
	@echo "Installing requirements-bench-tf.txt into $(VENV)-bench-tf ..."
	@rm -rf $(VENV)-bench-tf
	@$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)-bench-tf \
	  --requirement requirements-bench-tf.txt
	@touch $@
