# doctor · demo · demo-distributed · test · test-slow · test-sglang · test-gpu · sanitize-gpu · dry-gpu · test-peers · test-endurance · test-sanitize ·
# bench · bench-gpu · bench-sglang · visit-gpu · lint · docs: each sets up what it needs in .venv.
#
# make USE=<python> TARGET: that interpreter instead, with what it has. Nothing is installed and
# nothing downloaded; the extension is built in place and the source tree is what is imported.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ifdef USE
PY := $(USE)
PYTEST := $(PY) -m pytest
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(BIN)/python
PYTEST := $(BIN)/pytest
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
endif

.PHONY: setup build doctor demo demo-distributed test test-slow sglang-env test-sglang bench-sglang test-gpu sanitize-gpu dry-gpu
.PHONY: visit-gpu test-peers test-endurance test-sanitize bench bench-gpu lint docs clean

setup: $(READY)

ifndef USE
$(READY): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy "setuptools>=77" "pybind11>=2.13" "cmake>=3.25" ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@
endif

# The extension follows its sources: CMake rebuilds what changed.
build: $(READY)
	$(PY) -c 'import setup; setup.compile_into()'

doctor: build
	$(PY) -m pyrlk.cli doctor $(ARGS)

demo: build
	$(PY) -m pyrlk.cli demo $(ARGS)

# The same run by FSDP2, with one engine; each rank sets its own number of threads.
RANKS ?= 2
demo-distributed: build
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) \
	  -m pyrlk.cli demo --name distributed $(ARGS)

test: build
	$(PYTEST) tests -m "not gpu and not peers and not slow and not endurance" $(ARGS)

# Compiled ops over many lengths, the other targets of every kernel, longer grids.
test-slow: build
	$(PYTEST) tests -m "slow and not gpu and not peers and not endurance" --timeout 1800 $(ARGS)

# Faults a hundred times each, ten thousand updates, a million frames.
test-endurance: build
	$(PYTEST) tests -m endurance --timeout 7200 $(ARGS)

# The C++ tests under each sanitizer; OpenMP on std::thread for TSan (csrc/tests/gomp_threads.cpp).
SANITIZERS ?= address,undefined thread
test-sanitize: $(READY)
	for kind in $(SANITIZERS); do \
	  cmake -S csrc -B build/sanitize-$$kind -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DPYRLK_PYTHON=OFF -DPYRLK_TESTS=ON -DPYRLK_SANITIZE=$$kind && \
	  cmake --build build/sanitize-$$kind && \
	  ctest --test-dir build/sanitize-$$kind --output-on-failure || exit 1; \
	done

# A first visit of a GPU: everything below and the benches, each with its time limit, in the order
# of its worth. Logs and results go to LOGS.
LOGS ?= build/visit
visit-gpu: $(READY)
	$(PY) tests/gpu/visit.py --logs $(LOGS) $(ARGS)

test-gpu: build
	$(PYTEST) tests/gpu $(ARGS)

# compute-sanitizer (memcheck, racecheck, initcheck, synccheck) over every kernel, on short rows.
sanitize-gpu: build
	$(PY) tests/gpu/sanitize.py $(ARGS)

# The gpu tests and benches on a device that is not there: small, in Triton's interpreter.
dry-gpu: build
	$(PYTEST) tests/test_gpu_dry.py $(ARGS)

# The frameworks have many dependencies: they stay out of .venv. verl's losses need none of its own.
PEERS := .venv-peers

$(PEERS)/.ready: pyproject.toml constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -c constraints.txt torch numpy "setuptools>=77" "pybind11>=2.13" "cmake>=3.25" ninja
	$(PEERS)/bin/pip install -q -c constraints.txt --no-build-isolation -e ".[peers]"
	$(PEERS)/bin/pip install -q --no-deps verl==0.9.1
	touch $@

test-peers: $(PEERS)/.ready
	PATH=$(CURDIR)/$(PEERS)/bin:$$PATH $(PEERS)/bin/python setup.py -q build_ext --inplace
	$(PEERS)/bin/pytest tests/peers $(ARGS)

# A real SGLang server on the CPU, in an environment of its own; its output goes to files, since
# processes that a server leaves behind would hold a pipe open.
SGLANG := $(CURDIR)/.venv-sglang
test-sglang bench-sglang: export PYRLK_SGLANG_PYTHON = $(SGLANG)/bin/python
test-sglang bench-sglang: export PYRLK_SGLANG_SITE = $(SGLANG)/pyrlk-site

sglang-env: build
	tests/sglang/install.sh $(SGLANG) $(SGLANG)/pyrlk-site

test-sglang: sglang-env
	$(PYTEST) tests/sglang $(ARGS)

bench-sglang: sglang-env
	$(PY) tests/sglang/with_server.py moe-large moe -- \
	  $(PY) -m pyrlk.bench.weights_sglang --write bench/results $(ARGS)

bench: build
	$(PY) -m pyrlk.cli bench --write bench/results $(ARGS)

RESULTS ?= bench/results
bench-gpu: build
	$(PY) -m pyrlk.cli bench --device cuda --write $(RESULTS) $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp')

docs: build
	$(PY) -m pyrlk.bench.table README.md bench/results

clean:
	rm -rf build dist *.egg-info $(VENV) $(PEERS) $(SGLANG) pyrlk/_C*.so
