PYTHON ?= python3
BIN := .venv/bin

KERNELS := robe/_cpu.abi3.so
READER := data/_tsv.so
SANITIZED := build/sanitized/_cpu.so
SANITIZED_READER := build/sanitized/_tsv.so
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined

.PHONY: setup train bench test test-integrations test-triton test-sanitized lint format

setup: .venv/installed $(KERNELS) $(READER)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Without a compiler this only warns: robe then runs on its reference.
$(KERNELS): .venv/installed setup.py $(wildcard robe/csrc/*)
	$(BIN)/python setup.py --quiet build_ext --inplace

# Without a compiler, polars reads the logs.
$(READER): data/csrc/criteo_tsv.cpp
	-$(CXX) -std=c++17 -O3 -Wall -Wextra -shared -fPIC $< -o $@

# Generate rows with a known best AUC, train full tables and ROBE on them, compare.
train: setup
	$(BIN)/python -m benchmarks.demo --output runs/demo

# Speed against nn.EmbeddingBag and fbgemm, and of the data: about 10 minutes on a quiet machine. Takes 15 GB of memory.
bench: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.txt fbgemm-gpu-cpu==1.8.0
	$(BIN)/python -m benchmarks.embedding --output runs/embedding.json
	$(BIN)/python -m benchmarks.step --output runs/step.json
	$(BIN)/python -m benchmarks.data --output runs/data.json
	$(BIN)/python -m benchmarks.training --output runs/training.json

# Each worker computes on one thread: as many workers as cores already.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

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
	    tests/robe/layers tests/robe/test_optim.py tests/robe/admission
	PYTHONPATH=build/triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/robe/triton_kernels/test_compiled.py

build/triton/installed: Makefile
	rm -rf build/triton
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/triton triton==3.9.0
	touch $@

# The kernels and the reader of logs with every read and write checked, on the tests that call them. AddressSanitizer
# keeps freed memory for a while, so the memory in use says nothing about leaks. Optimized, g++ leaves some of the
# reader's reads unchecked.
$(SANITIZED): .venv/installed $(wildcard robe/csrc/*)
	mkdir -p $(@D)
	torch=$$($(BIN)/python -c "import torch; print(torch.__path__[0])") && $(CXX) robe/csrc/robe_cpu.cpp -o $@ \
	    -std=c++17 -O1 -g -shared -fPIC -ffp-contract=off $(SANITIZE) \
	    -isystem $$torch/include -L$$torch/lib -ltorch_cpu

$(SANITIZED_READER): data/csrc/criteo_tsv.cpp
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O0 -g -shared -fPIC $(SANITIZE) $< -o $@

test-sanitized: setup $(SANITIZED) $(SANITIZED_READER)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 ROBE_KERNELS=$(SANITIZED) ROBE_READER=$(SANITIZED_READER) \
	    $(BIN)/python -m pytest tests/robe/test_native.py tests/robe/admission tests/dlrm/test_mlp.py tests/robe/test_optim.py \
	    tests/data/formats/test_criteo_tsv.py --deselect tests/robe/test_native.py::test_nothing_leaks

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
