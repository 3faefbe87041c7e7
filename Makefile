# train_gpt2_compact: `make help` lists the targets and the settings.

SHELL := /bin/bash
PYTHON ?= python3
REVISION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
CXXFLAGS ?= -O3 -fno-math-errno -fno-trapping-math
override CXXFLAGS += -std=c++17 -Wall -Wextra $(EXTRA)

# What the compiler and the machine offer. `compiles` says yes where a program builds with a flag.
compiles = $(shell echo 'int main() { return 0; }' | \
  $(CXX) -x c++ $(1) - -o /dev/null >/dev/null 2>&1 && echo yes)
NATIVE := $(firstword $(foreach flag,-march=native -mcpu=native,\
  $(if $(call compiles,$(flag)),$(flag))))

MAC := $(filter Darwin,$(shell uname))
ifndef NO_OPENMP
  ifeq ($(call compiles,-fopenmp),yes)
    OPENMP := -fopenmp
  else
    # Apple's compiler lacks the library, and Homebrew puts it where no compiler looks.
    LIBOMP_AT := $(firstword $(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp))
    LIBOMP := -Xclang -fopenmp $(LIBOMP_AT:%=-I%/include) $(LIBOMP_AT:%=-L%/lib) -lomp
    OPENMP := $(if $(call compiles,$(LIBOMP)),$(LIBOMP))
  endif
endif
BREW := $(if $(MAC), ('brew install libomp' brings it))
NO_THREADS := no OpenMP: one thread$(if $(NO_OPENMP),,$(BREW))
ifndef NO_BLAS
  ifeq ($(shell pkg-config --exists openblas 2>/dev/null && echo yes),yes)
    BLAS := OpenBLAS
    BLAS_FLAGS := -DUSE_OPENBLAS $(shell pkg-config --cflags openblas)
    BLAS_LIBS := $(shell pkg-config --libs openblas)
  else ifneq ($(MAC),)
    BLAS := Accelerate
    BLAS_FLAGS := -DUSE_ACCELERATE
    BLAS_LIBS := -framework Accelerate
  endif
endif

# The CUDA toolkit. Where there is none, dev/setup.sh brings headers and a compiler under build/:
# enough for the tests, not to link with cuBLAS.
NVCC := $(shell command -v nvcc || ls '$(or $(CUDA_HOME),/usr/local/cuda)/bin/nvcc' 2>/dev/null)
BROUGHT := $(firstword $(wildcard build/venv/lib/python3*/site-packages/nvidia/cu13))
CUDA_HOME ?= $(or $(patsubst %/bin/nvcc,%,$(realpath $(NVCC))),$(BROUGHT))
PRECISION ?= BF16
ifeq ($(filter BF16 FP32,$(PRECISION)),)
  $(error PRECISION is $(PRECISION), not BF16 or FP32)
endif

# The cards, and their compute capabilities, 90 for 9.0: nvidia-smi may answer with an error's text
# instead. CUDA_VISIBLE_DEVICES may hide all cards. Where it hides some, it counts in an order that
# need not be nvidia-smi's; so each card that is new enough is built for, as the newest that the
# toolkit knows. Where there is none, the code is for 8.0. PTX beside it serves newer ones.
# The oldest that will do has bf16 and cp.async; in fp32, 7.5 will.
OLDEST := $(if $(filter FP32,$(PRECISION)),75,80)
ask_cards = $(shell test "$${CUDA_VISIBLE_DEVICES-0}" && \
  test "$${CUDA_VISIBLE_DEVICES-0}" != -1 && \
  nvidia-smi --query-gpu=$(1) --format=csv,noheader 2>/dev/null $(2))
CARDS := $(call ask_cards,compute_cap,| grep -xE '[0-9]+\.[0-9]' | tr -d . | sort -nu)
GPU := $(if $(CARDS),$(call ask_cards,name,| sort -u | paste -sd / -))
USABLE := $(shell for card in $(CARDS); do test $$card -lt $(OLDEST) || echo $$card; done)
as_toolkit_knows = $(shell $(NVCC) --list-gpu-arch | sed -n 's/^compute_//p' | \
  awk '$$1 <= $(1) && $$1 > known { known = $$1 } END { print known ? known : $(1) }')
KNOWN := $(if $(NVCC),$(sort $(foreach card,$(USABLE),$(call as_toolkit_knows,$(card)))))
GPU_COMPUTE_CAPABILITY ?= $(or $(KNOWN),$(CARDS),80)
CC_GPU := $(subst .,,$(GPU_COMPUTE_CAPABILITY))
TOO_OLD := $(shell for cc in $(CC_GPU); do test $$cc -ge $(OLDEST) 2>/dev/null || echo $$cc; done)
ON_GPU := $(if $(TOO_OLD),,$(and $(CARDS),$(NVCC)))

# MPI=1: several processes, started by mpirun, share each step. MPICXX is a compiler that knows
# where MPI is; where two stand side by side, MPICXX=mpicxx.mpich takes the other one.
MPI_FLAGS := -DUSE_MPI -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX
MPI_WITH := OMPI_CXX='$(CXX)' MPICH_CXX='$(CXX)'
MPICXX ?= mpicxx
COMPILER = $(if $(MPI),$(MPI_WITH) $(MPICXX) $(MPI_FLAGS),$(CXX))
NVCC_COMPILER = $(if $(MPI),$(MPI_WITH) $(NVCC) -ccbin $(MPICXX) $(MPI_FLAGS),$(NVCC))
NCCL = $(if $(MPI),-lnccl)
needs_mpi = @$(if $(MPI),which $(MPICXX) > /dev/null || { echo \
  "MPI=1 needs $(MPICXX): apt-get install libopenmpi-dev openmpi-bin"; exit 2; },true)
needs_nccl = @$(if $(MPI),echo '\#include <nccl.h>' | $(NVCC) -x cu -E - > /dev/null 2>&1 || \
  { echo "MPI=1 needs NCCL: apt-get install libnccl-dev"; exit 2; },true)

FLAGS = $(CXXFLAGS) $(NATIVE) $(or $(OPENMP),-Wno-unknown-pragmas) $(BLAS_FLAGS)
NVCC_FLAGS = -std=c++17 -O3 -DPRECISION_$(PRECISION) -DREVISION='"$(REVISION)"' \
  -Xcompiler -Wall,-Wextra,-fopenmp,-Wno-unknown-pragmas \
  $(foreach cc,$(CC_GPU),-gencode arch=compute_$(cc),code=sm_$(cc) \
    -gencode arch=compute_$(cc),code=compute_$(cc)) \
  $(if $(filter -Werror,$(EXTRA)),-Werror all-warnings)
NOGPU_FLAGS = -std=c++17 -fopenmp -Wall -Wextra $(EXTRA) -D__NOGPU__ -Idev/nogpu/include \
  -isystem $(CUDA_HOME)/include
NOGPU = $(CXX) $(NOGPU_FLAGS)
NOGPU_HEADERS := $(wildcard dev/nogpu/include/*)
SANITIZE = -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all

TARGETS = $(if $(TOO_OLD),; compute capability $(call dotted,$(TOO_OLD)) is too old,$(if \
  $(NVCC),; building for $(CC_GPU:%=sm_%) and PTX))

.PHONY: all found demo setup check checked test tested bench clean help
all: train_gpt2_compact

found:
	@echo "compiler $(CXX); $(or $(OPENMP),$(NO_THREADS));" \
	  "$(or $(BLAS),no BLAS: the trainer's own matrix product);" \
	  "$(or $(NATIVE),no native instructions)"
	@echo "CUDA $(if $(NVCC),$(CUDA_HOME),toolkit: none); device: $(or $(GPU),none)$(TARGETS)"

train_gpt2_compact: train_gpt2_compact.cpp Makefile build/settings | found
	$(needs_mpi)
	$(COMPILER) $(FLAGS) -DREVISION='"$(REVISION)"' $< -o $@ $(BLAS_LIBS)

# ---- the CUDA trainer, and its tests: for a GPU, and under dev/nogpu for a CPU

needs_nvcc = @$(if $(NVCC),true,echo "$@ needs the CUDA toolkit, 12 or 13: nvcc was not found"; \
  exit 2)
dotted = $(shell echo $(1) | sed 's/[0-9]\>/.&/g')
other_card = GPU_COMPUTE_CAPABILITY=$(OLDEST) builds for another machine's
whose = $(if $(filter file,$(origin GPU_COMPUTE_CAPABILITY)),$(GPU) has $(call dotted,$(CARDS)); \
  $(other_card),GPU_COMPUTE_CAPABILITY is $(GPU_COMPUTE_CAPABILITY))
or_newer = or newer$(if $(filter BF16,$(PRECISION)), (7.5 with PRECISION=FP32))
needs_card = @$(if $(TOO_OLD),echo "$@ needs a card of compute capability" \
  "$(call dotted,$(OLDEST)) $(or_newer): $(whose)"; exit 2,true)
needs_cuda = @test -e $(CUDA_HOME)/include/cuda_bf16.h || \
  { echo "$@ needs the headers of the CUDA toolkit, 12 or 13: set CUDA_HOME"; exit 2; }

train_gpt2_compactcu: train_gpt2_compact.cu Makefile build/settings | found
	$(needs_nvcc)
	$(needs_card)
	$(needs_mpi)
	$(needs_nccl)
	$(NVCC_COMPILER) $(NVCC_FLAGS) $< -o $@ -lcublas -lcublasLt $(NCCL)

test_gpt2cu: test_gpt2.cu train_gpt2_compact.cu train_gpt2_compact.cpp Makefile \
  build/settings | found
	$(needs_nvcc)
	$(needs_card)
	$(NVCC) $(NVCC_FLAGS) $< -o $@ -lcublas -lcublasLt

.PRECIOUS: build/%.nogpu.cpp
build/%.nogpu.cpp: %.cu train_gpt2_compact.cu dev/nogpu/translate.py | build
	$(PYTHON) dev/nogpu/translate.py $< > $@ || { rm -f $@; exit 1; }

train_gpt2_compact_nogpu: build/train_gpt2_compact.nogpu.cpp $(NOGPU_HEADERS) Makefile \
  build/settings
	$(needs_cuda)
	$(NOGPU) -O2 -DPRECISION_$(PRECISION) $< -lboost_context -o $@

test_gpt2_nogpu: build/test_gpt2.nogpu.cpp train_gpt2_compact.cpp $(NOGPU_HEADERS) Makefile \
  build/settings
	$(needs_cuda)
	$(NOGPU) $(SANITIZE) -DPRECISION_$(PRECISION) $< -lboost_context -o $@

# ---- a first look: a small GPT-2 learns this project's own sources

DEMO_TEXT = $(wildcard *.cpp *.md Makefile data_prep/*.py dev/*.py dev/test/*.py dev/test/*.cpp)
DEMO_TRAINER = $(if $(ON_GPU),train_gpt2_compactcu,train_gpt2_compact)
demo: $(DEMO_TRAINER) | build
	@rm -rf build/demo; cat $(DEMO_TEXT) > build/demo.txt
	@set -o pipefail; ./$(DEMO_TRAINER) --train build/demo.txt -e d4 --channels 128 --context 128 \
	  --batch 16 --steps 800 --lr 6e-3 --warmup 40 --projection sparse --val-every 200 \
	  --sample-every -1 --sample-tokens 400 --out build/demo \
	  | awk '!/^step/ || /val/ || ++n % 50 == 1 { print; fflush() }'

# ---- tests: `check` before a commit, `test` for all. Both first bring what they need; a make of
# its own then finds it.

setup:
	@CXX='$(CXX)' PYTHON='$(PYTHON)' NVCC='$(NVCC)' dev/setup.sh

PYTEST = OMP_WAIT_POLICY=passive PATH="$$PATH:$$(realpath $(or $(CUDA_HOME),/)/bin)" \
  build/venv/bin/python -m pytest -q -n auto --maxprocesses 8 --dist loadgroup
# As many at once as there are processors, where the make around this has not said how many.
JOBS = $(if $(filter -j%,$(MAKEFLAGS)),,-j$$(getconf _NPROCESSORS_ONLN))
check test: setup
	@$(MAKE) --no-print-directory $(JOBS) $@ed

TEST_LIBS = $(BLAS_LIBS) $$(pkg-config --cflags --libs gtest)
ifneq ($(wildcard $(CUDA_HOME)/include/curand_kernel.h),)
CURAND_TEST := build/test_curand
endif
build/test_curand: dev/test/test_curand.cpp train_gpt2_compact.cpp Makefile | build
	$(CXX) $(FLAGS) -Wno-unused-function $< -o $@ -isystem $(CUDA_HOME)/include $(TEST_LIBS)

build/train_mpi: train_gpt2_compact.cpp Makefile | build
	$(MPI_WITH) mpicxx $(MPI_FLAGS) $(FLAGS) $< -o $@ $(BLAS_LIBS)

build/train_mpich: train_gpt2_compact.cpp Makefile | build
	$(MPI_WITH) mpicxx.mpich $(MPI_FLAGS) $(FLAGS) $< -o $@ $(BLAS_LIBS)

build/test_cpu: dev/test/test_cpu.cpp train_gpt2_compact.cpp Makefile | build
	$(CXX) $(FLAGS) -Wno-unused-function $< -o $@ $(TEST_LIBS)

build/test_cpu_sanitized: dev/test/test_cpu.cpp train_gpt2_compact.cpp Makefile | build
	$(CXX) $(FLAGS) $(SANITIZE) -Wno-unused-function $< -o $@ $(TEST_LIBS)

build/train_sanitized: train_gpt2_compact.cpp Makefile | build
	$(CXX) $(FLAGS) $(SANITIZE) $< -o $@ $(BLAS_LIBS)

build/train_no_blas: train_gpt2_compact.cpp Makefile | build
	$(CXX) $(CXXFLAGS) $(NATIVE) $(or $(OPENMP),-Wno-unknown-pragmas) $< -o $@

# The CUDA sources on a CPU, in both precisions: the comparison with the CPU trainer under the
# sanitizers, the trainer itself without.
BOOST := $(call compiles,-include boost/context/fiber.hpp -lboost_context)
ifneq ($(and $(wildcard $(CUDA_HOME)/include/cuda_bf16.h),$(BOOST)),)
NOGPU_TESTS := $(foreach p,bf16 fp32,build/test_gpt2_$(p)_sanitized build/train_nogpu_$(p))
endif
build/test_gpt2_%_sanitized: build/test_gpt2.nogpu.cpp train_gpt2_compact.cpp $(NOGPU_HEADERS) \
  Makefile
	$(NOGPU) $(SANITIZE) -DPRECISION_$(shell echo $* | tr a-z A-Z) -I. $< -lboost_context -o $@

build/train_nogpu_mpi: build/train_gpt2_compact.nogpu.cpp $(NOGPU_HEADERS) Makefile
	$(MPI_WITH) mpicxx $(MPI_FLAGS) $(NOGPU_FLAGS) -O2 -DPRECISION_FP32 $< -lboost_context -o $@

build/train_nogpu_%: build/train_gpt2_compact.nogpu.cpp $(NOGPU_HEADERS) Makefile
	$(NOGPU) -O2 -DPRECISION_$(shell echo $* | tr a-z A-Z) $< -lboost_context -o $@

# ---- the numbered variants of the kernels
include dev/cuda/Makefile

GTEST := $(shell pkg-config --exists gtest 2>/dev/null && echo yes)
checked: train_gpt2_compact $(if $(GTEST),build/test_cpu)
	@$(PYTEST) -m 'not slow' dev

tested: train_gpt2_compact build/train_sanitized build/train_no_blas \
  $(if $(shell which mpicxx),build/train_mpi $(if $(NOGPU_TESTS),build/train_nogpu_mpi)) \
  $(if $(shell which mpicxx.mpich),build/train_mpich) \
  $(if $(GTEST),build/test_cpu build/test_cpu_sanitized $(CURAND_TEST)) \
  $(NOGPU_TESTS) $(if $(NOGPU_TESTS),variants_nogpu) $(if $(ON_GPU),test_gpt2cu)
	@$(PYTEST) dev

bench: train_gpt2_compact build/train_no_blas
	$(PYTHON) dev/bench_cpu.py $(if $(LLMC),--llmc $(LLMC))

build:
	@mkdir -p build

# What was built with other settings is built again.
CHOSEN = $(PRECISION) $(if $(MPI),$(MPICXX))
.PHONY: settings
build/settings: settings | build
	@echo '$(CHOSEN)' | cmp -s - $@ || echo '$(CHOSEN)' > $@

clean:
	find dev/cuda -type l -delete
	rm -rf build train_gpt2_compact train_gpt2_compactcu test_gpt2cu train_gpt2_compact_nogpu \
	  test_gpt2_nogpu

define HELP
make                  the CPU trainer, ./train_gpt2_compact
make train_gpt2_compactcu      the CUDA trainer; PRECISION=BF16|FP32, GPU_COMPUTE_CAPABILITY=90
make test_gpt2cu               its test against the CPU trainer, on a GPU
make train_gpt2_compact_nogpu  the CUDA trainer's sources on a CPU, for tests
make test_gpt2_nogpu           likewise, test_gpt2cu's
make -C dev/cuda      the kernels' numbered variants, each with its check and its benchmark
make demo             a small GPT-2 learns this project's sources: about two minutes on two cores
make check            the quick tests, two minutes on two cores, before every commit
make test             all tests, about 17 minutes on two cores; the last line counts them
                      check and test first bring what they lack, and say what (dev/setup.sh)
make bench            ms a step of GPT-2 d12 at full rank and compressed
                      LLMC=dir compares with the llm.c that is built there
make clean            removes what was built
make MPI=1            the CPU trainer for several processes, which mpirun starts; Debian's MPICH
                      beside its Open MPI: MPICXX=mpicxx.mpich, and mpirun.mpich
make MPI=1 train_gpt2_compactcu  likewise, on a GPU for each, with NCCL
settings: CXX=clang++ NATIVE= (code for any machine of this kind) NO_BLAS=1 NO_OPENMP=1
          EXTRA=-Werror PYTHON=python3
endef

help: found
	@: $(info $(HELP))
