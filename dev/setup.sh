#!/usr/bin/env bash
# Brings what the tests need and the machine lacks, and says what; where all is there it does
# nothing. `make check` and `make test` call it. The system's packages are installed by apt-get, as
# root or by a sudo that asks no password; else one line says how. Python's go to build/venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} cxx=${CXX:-c++} venv=build/venv system=$(uname)
nvcc=${NVCC-$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2> /dev/null || true)}
mkdir -p build

quietly() { "$@" > /dev/null 2>&1; }
say() { echo "setup: $*"; }
stop() { say "$*"; exit 2; }
has_torch() {
  "$1" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'
}

# ---- the system's packages, by Debian's names; each is looked for by what it is for

as_root=(env DEBIAN_FRONTEND=noninteractive)
[ "$(id -u)" = 0 ] || as_root=(sudo -n "${as_root[@]}")
apt=
if quietly command -v apt-get && quietly "${as_root[@]}" true; then
  apt=yes
  # which has Debian's PyTorch: pip's is a hundred times as large
  quietly has_torch "$python" || python=/usr/bin/python3
fi

need() {
  local package=$1
  shift
  quietly "$@" || missing+=("$package")
}
look() {
  missing=()
  need g++ "$cxx" --version
  need pkg-config pkg-config --version
  [ "$system" = Darwin ] || need libopenblas-dev pkg-config --exists openblas
  need libgtest-dev pkg-config --exists gtest
  need libboost-context-dev "$cxx" -E -x c++ -include boost/context/fiber.hpp /dev/null
  need libopenmpi-dev mpicxx --version
  need openmpi-bin mpirun --version
  need procps pgrep --version
  need python3-venv "$python" -c 'import venv, ensurepip'
  [ -z "$apt" ] || need python3-torch has_torch "$python"
}

look
if [ ${#missing[@]} != 0 ] && [ "$apt" ]; then
  say "installing ${missing[*]} (apt-get)"
  quietly "${as_root[@]}" apt-get update || say "apt-get update failed"
  install=("${as_root[@]}" apt-get install -q -y --no-install-recommends)
  if ! quietly "${install[@]}" "${missing[@]}"; then
    # one that this system lacks must not keep the others away
    for package in "${missing[@]}"; do
      said=$("${install[@]}" "$package" 2>&1) || say "$package: $(tail -n 1 <<< "$said")"
    done
  fi
  look
elif [ ${#missing[@]} != 0 ]; then
  case $system in
    Darwin) say "some tests need more: brew install pkg-config googletest boost" ;;
    *) say "some tests need more: sudo apt-get install --no-install-recommends ${missing[*]}" ;;
  esac
fi
for package in ${missing[@]+"${missing[@]}"}; do
  case $package in g++ | python3-venv) stop "nothing can be tested without $package" ;; esac
done

# ---- Python's packages

bring() {  # its name for next time, what to say, and pip's arguments
  local done=$venv/brought_$1 what=$2
  shift 2
  [ "$done" -nt dev/test/requirements.txt ] && return
  say "installing $what into build/venv (pip)"
  $venv/bin/python -m pip install -q --disable-pip-version-check "$@" && touch "$done"
}

if ! quietly $venv/bin/python -c 'import pip'; then
  rm -rf $venv
  "$python" -m venv --system-site-packages $venv ||
    stop "'$python -m venv' failed: Python 3.9 or newer with venv is needed"
fi
# where PyTorch is there, the NumPy that it was built for
numpy=$($venv/bin/python -c 'from importlib.metadata import version
version("torch"); print(version("numpy").split(".")[0])' 2> /dev/null || true)
bring packages "the packages of dev/test/requirements.txt" -r dev/test/requirements.txt \
  ${numpy:+"numpy==$numpy.*"} || stop "the tests need these packages"
quietly has_torch $venv/bin/python || bring torch "PyTorch (on Linux with CUDA: 5 GB)" torch || true
if [ -z "$nvcc" ] && [ "$system" = Linux ]; then
  # of one version: the tests hold what its compiler makes of registers
  bring cuda "NVIDIA's compiler and headers (1 GB)" --no-deps 'nvidia-cuda-nvcc==13.0.*' \
    'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
    'nvidia-cuda-cccl==13.0.*' 'nvidia-cublas==13.0.*' 'nvidia-curand==10.4.*' || true
fi
