# Two commands to start: `make sample` and `make test`. Everything else is for developers; `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Expanded inside the recipes: sources that a build depends on.
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*)
OUT ?= fastdensity-samples
SANITIZED := .venv-sanitize
# processes of the test suite, a core each
WORKERS ?= 2
# Packages that tests and benchmarks run beside this one; some list torchvision or Lightning, which is not needed here.
PEERS := torchcfm flow_matching torchdiffeq zuko torchdyn

.DEFAULT_GOAL := help
.PHONY: help sample test lint bench gpu sanitize clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

sample: $(VENV)/.sample ## create the environment, install, draw guided samples into OUT (default fastdensity-samples)
	$(BIN)/fastdensity sample --out $(OUT)

test: $(VENV)/.test ## create the environment, install, run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.test ## formatting, ruff, mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.test ## the CPU benchmarks: tables, and JSON under benchmarks/results
	$(BIN)/python -m benchmarks.run rows
	$(BIN)/python -m benchmarks.run jvp
	$(BIN)/python -m benchmarks.run probe
	$(BIN)/python -m benchmarks.run track
	$(BIN)/python -m benchmarks.run divergence

gpu: ## on a machine with a CUDA device: build, GPU tests, sanitizer, benchmarks (no network needed)
	bash benchmarks/gpu.sh

sanitize: $(SANITIZED)/.built ## CPU tests on kernels built with AddressSanitizer and UBSan
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 OMP_NUM_THREADS=2 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	$(SANITIZED)/bin/python tests/run_sanitized.py

clean: ## remove environments, builds and caches
	rm -rf $(VENV) $(SANITIZED) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.sample: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[cli]"
	touch $@

$(VENV)/.test: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install -c constraints.txt --no-deps $(PEERS)
	touch $@ $(VENV)/.sample

# A second environment sees the packages of the first, but not its editable install of fastdensity.
$(SANITIZED)/.built: $(VENV)/.test
	$(BIN)/python -m venv $(SANITIZED)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$($(SANITIZED)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth"
	$(BIN)/python -m pip --python $(SANITIZED)/bin/python install -c constraints.txt --no-deps --force-reinstall . \
	  -C build-dir=build/sanitize -C cmake.define.FASTDENSITY_CUDA=OFF -C cmake.build-type=RelWithDebInfo \
	  -C cmake.define.FASTDENSITY_SANITIZE=address,undefined -C install.strip=false
	touch $@
