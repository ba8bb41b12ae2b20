#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command, into benches/results/GPU.json.
#
#     benches/gpu.sh [ECHOGRAD]        the program; target/release/echograd by default
#
# Needs an NVIDIA GPU with its driver, compute-sanitizer, and Python with PyTorch (PYTHON, or python3); no Rust.
#
# - Correctness: every kernel against the CPU's code, twice for equal bits, and by graph replay (`gradcheck --device
#   cuda`); compute-sanitizer's four tools over a smaller run of the same.
# - Speed: the feature block as `echograd profile` measures it, at the shapes that the peers are measured at, PyTorch's eager and compiled versions of it and the copy
#   bandwidth (benches/peers/features_gpu.py).
#
# The file is written whatever happens, and holds no paths of the machine. Exit status: 0 if every step passed, 1 if one failed, 2 if nothing could be run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 2
}

(($# <= 1)) || fail "expected the path of echograd or nothing, found $# arguments"
echograd=${1:-target/release/echograd}
python=${PYTHON:-python3}
[[ -x $echograd ]] || fail "$echograd: no such program; build it by \`cargo build --release\` or give its path"
command -v nvidia-smi >/dev/null || fail "nvidia-smi not found; an NVIDIA GPU and its driver are needed"
command -v "$python" >/dev/null || fail "$python not found; set PYTHON"

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader >"$logs/gpu" ||
    fail "nvidia-smi: $(head -n 1 "$logs/gpu")"

# step NAME COMMAND...: runs it, keeps what it says, and notes how it ended.
step() {
    local name=$1 status=0 begin=$SECONDS
    shift
    printf '== %s: %s\n' "$name" "$*"
    "$@" >"$logs/$name.out" 2>"$logs/$name.err" || status=$?
    if ((status)); then
        tail -n 20 "$logs/$name.out" "$logs/$name.err"
        echo "$name FAILED, exit status $status"
    else
        echo "ok, $((SECONDS - begin)) s"
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" "$*" >>"$logs/steps"
}

step doctor "$echograd" doctor --json
step gradcheck "$echograd" gradcheck --device cuda
for tool in memcheck racecheck initcheck synccheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$echograd" gradcheck --device cuda --cases 2
done
for shape in 256,256,256,1 64,256,256,1 16,256,256,1 256,128,128,1; do
    for dtype in f32 bf16; do
        step "profile_${dtype}_$shape" \
            "$echograd" profile --device cuda --features --shape "$shape" --iters 50 --json --dtype "$dtype"
    done
done
step pytorch "$python" benches/peers/features_gpu.py

"$python" benches/gpu_report.py "$logs" benches/results "$echograd"
