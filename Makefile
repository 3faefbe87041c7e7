# train_gpt2_compact: `make help` lists the targets. Settings: CXX, NO_BLAS=1, NO_OPENMP=1, EXTRA=-Werror, PYTHON.

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
CUDA_INCLUDE := $(shell nvcc=$$(command -v nvcc) && echo $$(dirname $$(dirname $$(readlink -f $$nvcc)))/include)

FLAGS = $(CXXFLAGS) $(NATIVE) $(or $(OPENMP),-Wno-unknown-pragmas) $(BLAS_FLAGS)
SANITIZE = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all

.PHONY: all found demo test bench clean help
all: train_gpt2_compact

found:
	@echo "compiler $(CXX); $(or $(OPENMP),no OpenMP: one thread); $(or $(BLAS),no BLAS: the trainer's own matrix product); $(or $(NATIVE),no native instructions)"

train_gpt2_compact: train_gpt2_compact.cpp Makefile | found
	$(CXX) $(FLAGS) -DREVISION='"$(REVISION)"' $< -o $@ $(BLAS_LIBS)

# ---- a first look: a small GPT-2 learns this project's own sources

DEMO_TEXT = $(wildcard *.cpp *.md Makefile data_prep/*.py dev/*.py dev/test/*.py dev/test/*.cpp)
demo: train_gpt2_compact | build
	@cat $(DEMO_TEXT) > build/demo.txt
	@set -o pipefail; ./train_gpt2_compact --train build/demo.txt -e d4 --channels 128 --context 128 --batch 16 --steps 800 \
	  --lr 4e-3 --warmup 40 --projection sparse --val-every 200 --sample-every -1 --sample-tokens 400 --out build/demo \
	  | awk '!/^step/ || /val/ || ++n % 50 == 1 { print; fflush() }'

# ---- tests: all that can run here; the last line says how many passed and failed

ifneq ($(CUDA_INCLUDE),)
CURAND_TEST := build/test_curand
build/test_curand: dev/test/test_curand.cpp train_gpt2_compact.cpp Makefile | build
	$(CXX) $(FLAGS) -Wno-unused-function $< -o $@ -isystem $(CUDA_INCLUDE) $(BLAS_LIBS)
endif

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

test: train_gpt2_compact build/test_cpu build/test_cpu_sanitized build/train_sanitized build/train_no_blas $(CURAND_TEST) build/venv
	@build/venv/bin/python -m pytest -q dev

bench: train_gpt2_compact build/train_no_blas
	$(PYTHON) dev/bench_cpu.py $(if $(LLMC),--llmc $(LLMC))

build:
	@mkdir -p build

clean:
	rm -rf build train_gpt2_compact

help: found
	@echo "make                  the CPU trainer, ./train_gpt2_compact"
	@echo "make demo             trains a small GPT-2 on this project's sources, about two minutes on two cores"
	@echo "make test             all tests that can run here; the last line counts them"
	@echo "make bench            ms per step of GPT-2 d12 at full rank and compressed; LLMC=dir compares with llm.c built there"
	@echo "make clean            removes what was built"
	@echo "settings: CXX=clang++ NO_BLAS=1 NO_OPENMP=1 EXTRA=-Werror PYTHON=python3"
