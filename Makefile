PYTHON ?= python3
BIN := .venv/bin

PIP := $(BIN)/pip --quiet --disable-pip-version-check
SOURCES := $(wildcard robe/csrc/* dlrm/csrc/* data/csrc/*)
SANITIZED := build/sanitized/robe/_cpu.so build/sanitized/dlrm/_cpu.so
SANITIZED_READER := build/sanitized/_tsv.so
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined

.PHONY: setup train bench wheel test test-install test-integrations test-triton test-sanitized test-hostile fuzz-manifests \
    lint format

# A virtual environment with the pinned packages and this project in editable mode. Without a compiler the project is
# installed all the same, and says what is missing.
setup: .venv/project

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -r requirements.txt
	touch $@

.venv/project: .venv/installed setup.py pyproject.toml robe/version.py $(SOURCES)
	$(PIP) install --no-deps --no-build-isolation -c requirements.txt -e .
	touch $@

# Generate rows with a known best AUC, train full tables and ROBE on them, compare.
train: setup
	$(BIN)/python -m benchmarks.demo --output runs/demo

# Speed against nn.EmbeddingBag and fbgemm, and of the data: about 20 minutes on a quiet machine. Takes 15 GB of memory.
bench: setup
	$(PIP) install -c requirements.txt fbgemm-gpu-cpu==1.8.0
	$(BIN)/python -m benchmarks.embedding --output runs/embedding.json
	$(BIN)/python -m benchmarks.step --output runs/step.json
	$(BIN)/python -m benchmarks.data --output runs/data.json
	$(BIN)/python -m benchmarks.training --output runs/training.json

# dist/*.whl for every Python and every torch from 2.10 on. What older builds left must not get into it.
wheel: setup
	rm -rf build/lib* build/bdist* dist/*.whl
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

# Each worker computes on one thread: as many workers as cores already.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not install"

# The project installed into clean environments by pip, by uv and from the wheel, with and without a compiler.
test-install: wheel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m install tests/test_install.py

# Other people's models, compressed and trained: torchrec's, deepctr-torch's. Their packages ask for builds of torch that
# bring CUDA, so they come without dependencies, into a folder of their own.
test-integrations: setup build/integrations/installed
	PYTHONPATH=build/integrations OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -o filterwarnings= tests/integrations

build/integrations/installed: requirements-integrations.txt
	rm -rf build/integrations
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/integrations -r $<
	touch $@

# The kernels for GPUs, without one: in Triton's interpreter against the reference, and in the place of the CPU kernels in
# the tests of layers and optimizers; and compiled. Torch for CPUs asks for no triton, so it comes into a folder of its own.
test-triton: setup build/triton/installed
	PYTHONPATH=build/triton:. TRITON_INTERPRET=1 ROBE_KERNELS=reference OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -n auto -p tests.helpers.interpreted tests/robe/triton_kernels tests/robe/ops \
	    tests/robe/layers tests/robe/test_optim.py tests/robe/test_optim_as_torch.py tests/robe/admission
	PYTHONPATH=build/triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/robe/triton_kernels/test_compiled.py

build/triton/installed: Makefile
	rm -rf build/triton
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/triton triton==3.9.0
	touch $@

# The kernels and the reader of logs with every read and write checked, on the tests that call them. AddressSanitizer
# keeps freed memory for a while, so the memory in use says nothing about leaks. Optimized, g++ leaves some of the
# reader's reads unchecked.
build/sanitized/%/_cpu.so: .venv/installed $(wildcard robe/csrc/* dlrm/csrc/*)
	mkdir -p $(@D)
	torch=$$($(BIN)/python -c "import torch; print(torch.__path__[0])") && $(CXX) $*/csrc/$*_cpu.cpp -o $@ \
	    -std=c++17 -O1 -g -shared -fPIC -ffp-contract=off -fvisibility=hidden $(SANITIZE) -I$*/csrc -Irobe/csrc \
	    -Wl,--no-as-needed -L$$torch/lib -ltorch_cpu

$(SANITIZED_READER): data/csrc/criteo_tsv.cpp
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O0 -g -shared -fPIC $(SANITIZE) $< -o $@

WITH_SANITIZERS = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1

test-sanitized: setup $(SANITIZED) $(SANITIZED_READER)
	$(WITH_SANITIZERS) OMP_NUM_THREADS=2 ROBE_KERNELS=build/sanitized ROBE_READER=$(SANITIZED_READER) \
	    $(BIN)/python -m pytest tests/robe/csrc tests/robe/test_int8_array.py tests/robe/ops/test_schema.py \
	    tests/robe/ops/test_counting.py tests/robe/admission tests/robe/test_optim.py tests/robe/test_optim_as_torch.py \
	    tests/dlrm/test_mlp.py tests/dlrm/test_interaction.py tests/dlrm/test_hostile_calls.py \
	    tests/dlrm/inference/test_plan.py tests/data/formats/test_criteo_tsv.py \
	    tests/data/formats/test_readers_agree.py \
	    --deselect tests/robe/csrc/test_memory.py

# 100,000 calls of each operator with arguments that do not fit, under the same sanitizers.
test-hostile: setup $(SANITIZED)
	$(WITH_SANITIZERS) OMP_NUM_THREADS=1 ROBE_KERNELS=build/sanitized HOSTILE_CALLS=100000 \
	    $(BIN)/python -m pytest -n auto tests/robe/csrc/test_hostile_calls.py tests/dlrm/test_hostile_calls.py

# A million damaged manifests of prepared folders: a quarter of an hour on one core.
fuzz-manifests: setup
	$(BIN)/python -m tests.fuzz.manifests

# The reader of logs on a million changed lines, against a grammar of its own, with every read and write checked. clang
# (Debian: clang and libclang-rt-14-dev; make fuzz CXX=clang++) chooses the inputs by what they reach; g++ draws them.
FUZZ_INPUTS ?= 1000000
FUZZ := -std=c++17 -O1 -g $(SANITIZE) tests/fuzz/criteo_tsv.cpp -o build/fuzz/criteo_tsv
.PHONY: fuzz
fuzz:
	mkdir -p build/fuzz/inputs
ifneq (,$(findstring clang,$(CXX)))
	$(CXX) -fsanitize=fuzzer $(FUZZ)
	build/fuzz/criteo_tsv -runs=$(FUZZ_INPUTS) -max_len=4096 build/fuzz/inputs tests/fuzz/criteo_tsv
else
	$(CXX) -DDRIVER $(FUZZ)
	build/fuzz/criteo_tsv $(FUZZ_INPUTS)
endif

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site of the docs and the docstrings in build/site, in half a minute. Its packages need no torch and get a virtual
# environment of their own; the build makes no requests, and any broken link or reference ends it.
.PHONY: docs
docs: build/docs/installed
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build

build/docs/installed: requirements-docs.txt
	rm -rf build/docs
	$(PYTHON) -m venv build/docs
	build/docs/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@
