# train_gpt2_compact: `make help` lists the targets and the settings.

SHELL := /bin/bash
PYTHON ?= python3
REVISION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
CXXFLAGS ?= -O3 -fno-math-errno -fno-trapping-math
override CXXFLAGS += -std=c++17 -Wall -Wextra $(EXTRA)

# What the compiler and the machine offer. `compiles` answers yes when a program builds with some flags.
compiles = $(shell echo 'int main() { return 0; }' | $(CXX) -x c++ $(1) - -o /dev/null >/dev/null 2>&1 && echo yes)
NATIVE := $(if $(call compiles,-march=native),-march=native,$(if $(call compiles,-mcpu=native),-mcpu=native))

ifndef NO_OPENMP
  ifeq ($(call compiles,-fopenmp),yes)
    OPENMP := -fopenmp
  else ifeq ($(call compiles,-Xclang -fopenmp -lomp),yes)
    OPENMP := -Xclang -fopenmp -lomp
  endif
endif
ifndef NO_BLAS
  ifeq ($(shell pkg-config --exists openblas 2>/dev/null && echo yes),yes)
    BLAS := OpenBLAS
    BLAS_FLAGS := -DUSE_OPENBLAS $(shell pkg-config --cflags openblas)
    BLAS_LIBS := $(shell pkg-config --libs openblas)
  else ifeq ($(shell uname),Darwin)
    BLAS := Accelerate
    BLAS_FLAGS := -DUSE_ACCELERATE
    BLAS_LIBS := -framework Accelerate
  endif
endif

# The CUDA toolkit and a device. Without a device the binary is for sm_80; PTX beside it serves newer ones.
NVCC := $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
GPU := $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
GPU_COMPUTE_CAPABILITY ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .),80)
PRECISION ?= BF16
ifeq ($(filter BF16 FP32,$(PRECISION)),)
  $(error PRECISION is $(PRECISION), not BF16 or FP32)
endif

FLAGS = $(CXXFLAGS) $(NATIVE) $(or $(OPENMP),-Wno-unknown-pragmas) $(BLAS_FLAGS)
CC_GPU = $(GPU_COMPUTE_CAPABILITY)
NVCC_FLAGS = -std=c++17 -O3 -DPRECISION_$(PRECISION) -DREVISION='"$(REVISION)"' -Xcompiler -Wall,-Wextra,-fopenmp,-Wno-unknown-pragmas \
  -gencode arch=compute_$(CC_GPU),code=sm_$(CC_GPU) -gencode arch=compute_$(CC_GPU),code=compute_$(CC_GPU) -Werror all-warnings
NOGPU = $(CXX) -std=c++17 -fopenmp -Wall -Wextra $(EXTRA) -D__NOGPU__ -Idev/nogpu/include -isystem $(CUDA_HOME)/include
SANITIZE = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all

.PHONY: all found demo test bench clean help
all: train_gpt2_compact

found:
	@echo "compiler $(CXX); $(or $(OPENMP),no OpenMP: one thread); $(or $(BLAS),no BLAS: the trainer's own matrix product); $(or $(NATIVE),no native instructions)"
	@echo "CUDA $(or $(CUDA_HOME),toolkit: none); device: $(or $(GPU),none)$(if $(NVCC),; building for sm_$(CC_GPU) and PTX)"

train_gpt2_compact: train_gpt2_compact.cpp Makefile | found
	$(CXX) $(FLAGS) -DREVISION='"$(REVISION)"' $< -o $@ $(BLAS_LIBS)

# ---- the CUDA trainer, and its tests: for a GPU, and under dev/nogpu for a CPU

needs_nvcc = @$(if $(NVCC),true,echo "$@ needs the CUDA toolkit, 12 or 13: nvcc was not found" && exit 2)
needs_cuda = @test -e $(CUDA_HOME)/include/cuda_bf16.h || { echo "$@ needs the headers of the CUDA toolkit, 12 or 13: set CUDA_HOME"; exit 2; }

train_gpt2_compactcu: train_gpt2_compact.cu Makefile | found
	$(needs_nvcc)
	$(NVCC) $(NVCC_FLAGS) $< -o $@ -lcublas

test_gpt2cu: test_gpt2.cu train_gpt2_compact.cu train_gpt2_compact.cpp Makefile | found
	$(needs_nvcc)
	$(NVCC) $(NVCC_FLAGS) $< -o $@ -lcublas

.PRECIOUS: build/%.nogpu.cpp
build/%.nogpu.cpp: %.cu train_gpt2_compact.cu dev/nogpu/translate.py | build
	$(PYTHON) dev/nogpu/translate.py $< > $@ || { rm -f $@; exit 1; }

train_gpt2_compact_nogpu: build/train_gpt2_compact.nogpu.cpp $(wildcard dev/nogpu/include/*) Makefile
	$(needs_cuda)
	$(NOGPU) -O2 -DPRECISION_$(PRECISION) $< -lboost_context -o $@

test_gpt2_nogpu: build/test_gpt2.nogpu.cpp train_gpt2_compact.cpp $(wildcard dev/nogpu/include/*) Makefile
	$(needs_cuda)
	$(NOGPU) $(SANITIZE) -DPRECISION_$(PRECISION) $< -lboost_context -o $@

# ---- a first look: a small GPT-2 learns this project's own sources

DEMO_TEXT = $(wildcard *.cpp *.md Makefile data_prep/*.py dev/*.py dev/test/*.py dev/test/*.cpp)
DEMO_TRAINER = $(if $(and $(GPU),$(NVCC)),train_gpt2_compactcu,train_gpt2_compact)
demo: $(DEMO_TRAINER) | build
	@cat $(DEMO_TEXT) > build/demo.txt
	@set -o pipefail; OMP_WAIT_POLICY=passive ./$(DEMO_TRAINER) --train build/demo.txt -e d4 --channels 128 --context 128 --batch 16 --steps 800 \
	  --lr 4e-3 --warmup 40 --projection sparse --val-every 200 --sample-every -1 --sample-tokens 400 --out build/demo \
	  | awk '!/^step/ || /val/ || ++n % 50 == 1 { print; fflush() }'

# ---- tests: all that can run here; the last line says how many passed and failed

ifneq ($(wildcard $(CUDA_HOME)/include/curand_kernel.h),)
CURAND_TEST := build/test_curand
endif
build/test_curand: dev/test/test_curand.cpp train_gpt2_compact.cpp Makefile | build
	$(CXX) $(FLAGS) -Wno-unused-function $< -o $@ -isystem $(CUDA_HOME)/include $(BLAS_LIBS) $$(pkg-config --cflags --libs gtest)

build/test_cpu: dev/test/test_cpu.cpp train_gpt2_compact.cpp Makefile | build
	@pkg-config --exists gtest || { echo "make test needs GoogleTest: install libgtest-dev (Debian) or googletest (Homebrew)"; exit 2; }
	$(CXX) $(FLAGS) -Wno-unused-function $< -o $@ $(BLAS_LIBS) $$(pkg-config --cflags --libs gtest)

build/test_cpu_sanitized: dev/test/test_cpu.cpp train_gpt2_compact.cpp Makefile | build
	$(CXX) $(FLAGS) $(SANITIZE) -Wno-unused-function $< -o $@ $(BLAS_LIBS) $$(pkg-config --cflags --libs gtest)

build/train_sanitized: train_gpt2_compact.cpp Makefile | build
	$(CXX) $(FLAGS) $(SANITIZE) $< -o $@ $(BLAS_LIBS)

build/train_no_blas: train_gpt2_compact.cpp Makefile | build
	$(CXX) $(CXXFLAGS) $(NATIVE) $(or $(OPENMP),-Wno-unknown-pragmas) $< -o $@

build/venv: dev/test/requirements.txt | build
	@$(PYTHON) -m venv --system-site-packages build/venv && build/venv/bin/pip install -q -r $< && touch build/venv || \
	  { rm -rf build/venv; echo "make test needs Python 3.9 with venv, and the packages of $<"; exit 2; }

# The CUDA sources on a CPU, in both precisions: the comparison with the CPU trainer under the sanitizers, the trainer itself without.
ifneq ($(and $(wildcard $(CUDA_HOME)/include/cuda_bf16.h),$(call compiles,-include boost/context/fiber.hpp -lboost_context)),)
NOGPU_TESTS := $(foreach p,bf16 fp32,build/test_gpt2_$(p)_sanitized build/train_nogpu_$(p))
endif
build/test_gpt2_%_sanitized: build/test_gpt2.nogpu.cpp train_gpt2_compact.cpp $(wildcard dev/nogpu/include/*) Makefile
	$(NOGPU) $(SANITIZE) -DPRECISION_$(shell echo $* | tr a-z A-Z) -I. $< -lboost_context -o $@

build/train_nogpu_%: build/train_gpt2_compact.nogpu.cpp $(wildcard dev/nogpu/include/*) Makefile
	$(NOGPU) -O2 -DPRECISION_$(shell echo $* | tr a-z A-Z) $< -lboost_context -o $@

# ---- the numbered variants of the kernels
include dev/cuda/Makefile

TESTED = train_gpt2_compact build/test_cpu build/test_cpu_sanitized build/train_sanitized build/train_no_blas $(CURAND_TEST) $(NOGPU_TESTS) \
  $(if $(NOGPU_TESTS),variants_nogpu)
test: $(TESTED) $(if $(and $(GPU),$(NVCC)),test_gpt2cu) build/venv
	@OMP_WAIT_POLICY=passive build/venv/bin/python -m pytest -q dev

bench: train_gpt2_compact build/train_no_blas
	$(PYTHON) dev/bench_cpu.py $(if $(LLMC),--llmc $(LLMC))

build:
	@mkdir -p build

clean:
	find dev/cuda -type l -delete
	rm -rf build train_gpt2_compact train_gpt2_compactcu test_gpt2cu train_gpt2_compact_nogpu test_gpt2_nogpu

help: found
	@echo "make                  the CPU trainer, ./train_gpt2_compact"
	@echo "make train_gpt2_compactcu      the CUDA trainer; PRECISION=BF16|FP32, GPU_COMPUTE_CAPABILITY=90"
	@echo "make test_gpt2cu               its test against the CPU trainer, on a GPU"
	@echo "make train_gpt2_compact_nogpu  the CUDA trainer's sources on a CPU, for tests; likewise test_gpt2_nogpu"
	@echo "make -C dev/cuda      the kernels' numbered variants, each with its check and its benchmark"
	@echo "make demo             trains a small GPT-2 on this project's sources, about two minutes on two cores"
	@echo "make test             all tests that can run here; the last line counts them"
	@echo "make bench            ms per step of GPT-2 d12 at full rank and compressed; LLMC=dir compares with llm.c built there"
	@echo "make clean            removes what was built"
	@echo "settings: CXX=clang++ NO_BLAS=1 NO_OPENMP=1 EXTRA=-Werror PYTHON=python3"
