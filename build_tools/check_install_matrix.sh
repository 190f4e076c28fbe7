#!/usr/bin/env bash
# Installs gplws in every way that users do, each into a virtual environment of its own, and checks
# what came out of it: the outcome, what pip fetched, the message of a failure. Takes some 15 minutes
# and 3 GB under TMPDIR.
#
#   build_tools/check_install_matrix.sh [case ...]      all cases, or only those whose name is given
#
#   PYTHON=python3           the interpreter
#   TORCH='torch==2.13.*'    the torch that is there before gplws; should be a CPU build
#   CUDA_PYTHON=python3.12   if set, a case with a CUDA build of torch (several GB more) ...
#   CUDA_TORCH='torch==2.11.*'    ... namely this one
#
# A line per case: what was done, seconds, and what gplws says about its CUDA kernels; for a case
# that must fail, its last message. Exits with 1 if any case is not as it should be.
set -uo pipefail

source=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.*}
wanted=" $* "
failures=0
unset GPLWS_CUDA GPLWS_CPU_ISA TORCH_CUDA_ARCH_LIST PYTHONPATH

# Short compile times; the architectures are not what is checked here.
export TORCH_CUDA_ARCH_LIST="9.0+PTX"
NO_NVCC="CUDA_HOME=$work/no-cuda"
OFFLINE="PIP_NO_INDEX=1 PIP_FIND_LINKS= https_proxy=http://127.0.0.1:9 http_proxy=http://127.0.0.1:9"

selected() { [ "$wanted" = "  " ] || [[ $wanted == *" $1 "* ]]; }

# A copy of the source tree without what was built in it.
copy_source() {
  mkdir "$1"
  tar -C "$source" --exclude=./.git --exclude=./build --exclude='*.so' --exclude='*.egg-info' \
    -cf - . | tar -C "$1" -xf -
}

# environment NAME BASE: a new virtual environment that shares the files of BASE.
environment() {
  rm -rf "${work:?}/$1"
  cp -al "$work/$2" "$work/$1"
}

report() { printf '%-7s %-34s %4d s  %s\n' "$1" "$2" "$3" "$4"; }

# install NAME BASE EXPECT VARIABLES PIP-ARGUMENTS...: runs pip in a new environment.
#   EXPECT: a regular expression; for the CUDA status of the installed gplws, or, if it begins with
#   "error:", for the last lines of what pip prints.
install() {
  local name=$1 base=$2 expect=$3 variables=$4 start=$SECONDS verbose=-v log shown status
  shift 4
  selected "$name" || return 0
  environment env "$base"
  log="$work/$name.log"
  [[ $expect != error:* ]] || verbose=-qq # nothing but the error
  # shellcheck disable=SC2086 # the variables are words on purpose
  (cd "$work/tree" && env $variables "$work/env/bin/python" -m pip $verbose install "$@") >"$log" 2>&1
  status=$?
  if [[ $expect == error:* ]]; then
    shown=$(grep 'gplws: ' "$log" | tail -n 1 | sed 's/^ *//')
    if [ $status -ne 0 ] && tail -n 20 "$log" | grep -Eq -- "${expect#error:}"; then
      report ok "$name" $((SECONDS - start)) "$shown"
      return
    fi
  elif [ $status -eq 0 ]; then
    shown=$(cd / && "$work/env/bin/python" -c '
import torch, gplws
torch.ops.gplws.focus_search.default, torch.ops.gplws.group_pointwise_conv3d.default
print(gplws.build_info()["cuda_status"])' 2>&1)
    status=$?
    shown=$(tail -n 1 <<<"$shown")
    if [ "$base" != bare ] && grep -Eq '^ *(Collecting|Downloading) torch\b' "$log"; then
      shown="torch was fetched again" status=1
    fi
    if [ $status -eq 0 ] && grep -Eq -- "$expect" <<<"$shown"; then
      report ok "$name" $((SECONDS - start)) "$shown"
      return
    fi
  fi
  failures=$((failures + 1))
  report WRONG "$name" $((SECONDS - start)) "${shown:-}"
  tail -n 25 "$log"
}

copy_source "$work/tree"
"$PYTHON" -m venv "$work/bare"
cp -a "$work/bare" "$work/torch"
"$work/torch/bin/python" -m pip install -q "$TORCH" numpy tifffile imageio opencv-python-headless \
  matplotlib "jsonargparse[signatures]" PyYAML tqdm safetensors trimesh || exit 1
cp -al "$work/torch" "$work/tools"
"$work/tools/bin/python" -m pip install -q "setuptools>=77" wheel ninja pybind11 || exit 1
# What an offline machine may have: neither ninja's nor pybind11's package, but ninja on PATH.
cp -al "$work/tools" "$work/few-tools"
"$work/few-tools/bin/python" -m pip uninstall -q -y pybind11 || exit 1

# PATHs on which something is missing: links to all programs but the compilers.
mkdir "$work/no-compiler" "$work/old-compiler"
for program in /usr/bin/* /bin/*; do
  case ${program##*/} in
    *g++* | *gcc* | c++* | cc | c[89]9* | clang* | *-cpp* | cpp*) ;;
    *) ln -sf "$program" "$work/no-compiler/" ;;
  esac
done
cp -a "$work/no-compiler/." "$work/old-compiler/"
cat >"$work/old-compiler/g++" <<'SCRIPT'
#!/bin/sh
case "$*" in
  *--version*) echo "g++ (imitated) 8.3.0" ;;
  *) echo "g++: error: unrecognized command line option '-std=c++20'" >&2; exit 1 ;;
esac
SCRIPT
chmod +x "$work/old-compiler/g++"

cpu_torch='^(built, not loaded: torch .* was built without CUDA)$'
no_nvcc='^not built: nvcc was not found'

if command -v nvcc >/dev/null || compgen -G '/usr/local/cuda*/bin/nvcc' >/dev/null; then
  install with-torch torch "$cpu_torch" "" .
else
  install with-torch torch "$no_nvcc" "" .
fi
install without-nvcc torch "$no_nvcc" "$NO_NVCC" .
install cuda-switched-off torch '^not built: GPLWS_CUDA=0' "GPLWS_CUDA=0" .
install editable torch "$no_nvcc" "$NO_NVCC" -e .
install no-isolation tools "$no_nvcc" "$NO_NVCC" --no-build-isolation .
install no-isolation-editable tools "$no_nvcc" "$NO_NVCC" --no-build-isolation -e .
install offline tools "$no_nvcc" "$NO_NVCC $OFFLINE" --no-build-isolation --no-deps .
install offline-torchs-pybind11 few-tools "$no_nvcc" "$NO_NVCC $OFFLINE" \
  --no-build-isolation --no-deps .
# The constraint keeps pip from the newest CUDA build of torch, in the build environment as well.
echo "$TORCH" >"$work/constraint"
install no-torch bare "$no_nvcc" "$NO_NVCC PIP_CONSTRAINT=$work/constraint" .
if selected sdist; then
  "$work/tools/bin/python" -m pip install -q build
  (cd "$work/tree" && "$work/tools/bin/python" -m build -q --no-isolation --sdist -o "$work/dist") \
    >"$work/sdist.log" 2>&1 || cat "$work/sdist.log"
  install sdist torch "$no_nvcc" "$NO_NVCC" "$work"/dist/gplws-*.tar.gz
fi

# Programs of the interpreter's own folder (pip, ninja) come from the environment, not from PATH.
install no-compiler torch 'error:no C\+\+ compiler was found .*apt-get install g\+\+' \
  "PATH=$work/no-compiler" .
install no-compiler-no-torch bare 'error:no C\+\+ compiler was found .*apt-get install g\+\+' \
  "PATH=$work/no-compiler" .
install old-compiler torch 'error:\(imitated\) 8\.3\.0\) cannot compile C\+\+20' \
  "PATH=$work/old-compiler" .
install cuda-without-nvcc torch 'error:GPLWS_CUDA=1, but nvcc was not found' \
  "$NO_NVCC GPLWS_CUDA=1" .
install wrong-arch-list torch "error:holds 'Hopper', expected numbers" \
  "TORCH_CUDA_ARCH_LIST=Hopper" .
install no-isolation-no-torch bare \
  'error:(torch 2\.10 or newer is needed to build|setuptools 77 or newer is needed)' \
  "$NO_NVCC $OFFLINE" --no-build-isolation --no-deps .

if [ -n "${CUDA_PYTHON:-}" ] && selected cuda-torch; then
  "$CUDA_PYTHON" -m venv "$work/cuda"
  "$work/cuda/bin/python" -m pip install -q "${CUDA_TORCH:-torch==2.11.*}" numpy "setuptools>=77" \
    wheel ninja pybind11 || exit 1
  install cuda-torch cuda '^loaded$' "" --no-build-isolation --no-deps .
fi

[ "$failures" -eq 0 ] || { echo "$failures cases are not as they should be"; exit 1; }
