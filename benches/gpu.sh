#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command, into benches/results/GPU.json.
#
#     benches/gpu.sh [ECHOGRAD]        the program; target/release/echograd by default
#
# Needs an NVIDIA GPU with its driver, compute-sanitizer, and Python with PyTorch (PYTHON, or python3); no Rust.
#
# - Correctness: every kernel against the CPU's code, twice for equal bits, and by graph replay (`gradcheck --device
#   cuda`); compute-sanitizer's four tools over a smaller run of the same; two short trainings, and one that was
#   interrupted and resumed, with equal bits; an epoch in f32 and its evaluation, as on the CPU (benches/alike.py).
# - Speed: the feature block as `echograd profile` measures it, at the shapes that the peers are measured at, PyTorch's eager and compiled versions of it and the copy
#   bandwidth (benches/peers/features_gpu.py); whole training steps of `unet` and `efficientnet-b1` and PyTorch's
#   (benches/peers/step_gpu.py); each of their convolutions and cuDNN's (benches/peers/conv_gpu.py). On compute capability 9.0
#   the checks of convolutions and the training steps again with ECHOGRAD_WGMMA=1.
# - Training: a run of `efficientnet-b1` with its curve, the GPU's busy share of an epoch, and the external test.
#
# SOURCE and TARGET name what is trained and tested on, as for --data and best as packs: SOURCE=pack:breast.pack
# TARGET=pack:busi.pack; where they are not set, BrEaST and BUSI in the folder ECHOGRAD_DATA; where there is none, phantoms,
# which say nothing of patients. EPOCHS (50) shortens the run.
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
# sanitized NAME TOOL COMMAND...: a step under one of compute-sanitizer's tools.
sanitized() {
    local name=$1 tool=$2 options=(--tool "$2" --error-exitcode 1)
    # The program asks the driver for what may not be there (a kernel's parameters until there are no more, a name in
    # one module after another), and a no is an answer, not an error; those that are, it reports itself.
    if [[ $tool == memcheck ]]; then options+=(--report-api-errors no); fi
    step "$name" compute-sanitizer "${options[@]}" "${@:3}"
}
# Seed 4 draws large problems.
for tool in memcheck racecheck initcheck synccheck; do
    sanitized "$tool" "$tool" "$echograd" gradcheck --device cuda --seed 4 --cases 2
done
# Tiles that small problems do not fill, and results against the CPU's.
for shape in 8,64,64,128 16,64,64,64; do
    step "conv2d_$shape" "$echograd" profile --device cuda --op conv2d --shape "$shape" --iters 50 --json --dtype bf16
done
for shape in 256,256,256,1 64,256,256,1 16,256,256,1 256,128,128,1; do
    for dtype in f32 bf16; do
        step "profile_${dtype}_$shape" \
            "$echograd" profile --device cuda --features --shape "$shape" --iters 50 --json --dtype "$dtype"
    done
done
step pytorch "$python" benches/peers/features_gpu.py

# Whole steps, and their convolutions.
for preset in unet efficientnet-b1; do
    step "summary_$preset" "$echograd" summary --preset "$preset" --size 256 --json
    for batch in 16 64; do
        step "step_${preset}_$batch" "$echograd" profile --device cuda --step --preset "$preset" --size 256 \
            --batch "$batch" --iters 20 --json --dtype bf16
        step "conv_${preset}_$batch" "$python" benches/peers/conv_gpu.py "$logs/step_${preset}_$batch.out"
    done
done
# The same convolutions by wgmma, which other GPUs than those of compute capability 9.0 lack.
if [[ $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1) == 9.0 ]]; then
    step gradcheck_wgmma env ECHOGRAD_WGMMA=1 "$echograd" gradcheck --device cuda
    for tool in memcheck racecheck synccheck; do
        ECHOGRAD_WGMMA=1 sanitized "${tool}_wgmma" "$tool" "$echograd" gradcheck --device cuda --op conv2d --cases 20
    done
    for preset in unet efficientnet-b1; do
        for batch in 16 64; do
            step "wgmma_${preset}_$batch" env ECHOGRAD_WGMMA=1 "$echograd" profile --device cuda --step --preset "$preset" \
                --size 256 --batch "$batch" --iters 20 --json --dtype bf16
        done
    done
fi
step pytorch_step "$python" benches/peers/step_gpu.py

# Training. Short runs on phantoms first, whose bits must be equal.
data=$logs/phantoms
step phantom "$echograd" phantom --site A --count 60 --seed 1 --out "$data"
short=(--data "busi:$data" --preset efficientnet-b1 --device cuda --epochs 3)
step run_1 "$echograd" train "${short[@]}" --out "$logs/run_1"
step run_2 "$echograd" train "${short[@]}" --out "$logs/run_2"
# Interrupted after some steps; one that ended before resumes to itself.
interrupted() {
    "$echograd" train "${short[@]}" --out "$logs/run_3" &
    local pid=$!
    while kill -0 $pid 2>/dev/null && ! [[ -s $logs/run_3/metrics.csv ]]; do sleep 0.05; done
    kill -TERM $pid 2>/dev/null || true
    wait $pid || (($? == 130)) || return 1
    "$echograd" train --resume --out "$logs/run_3"
}
step run_3 interrupted
step repeated cmp "$logs/run_1/last.safetensors" "$logs/run_2/last.safetensors"
step resumed cmp "$logs/run_1/last.safetensors" "$logs/run_3/last.safetensors"
# An epoch in f32, and one run's evaluation, on the GPU and on the CPU: sums in another order move the weights apart.
full=(--data "busi:$data" --preset efficientnet-b1 --size 128 --epochs 1 --set precision=f32)
for device in cpu cuda; do
    step "epoch_$device" "$echograd" train "${full[@]}" --device $device --out "$logs/epoch_$device"
    step "evaluated_$device" "$echograd" evaluate "$logs/epoch_cpu" --data "busi:$data" --include-training \
        --device $device --out "$logs/evaluated_$device"
done
step epoch_alike "$python" benches/alike.py "$logs"/epoch_{cpu,cuda}/metrics.csv \
    loss,cross_entropy,dice_loss,classification,gradient_norm 0.01
step evaluated_alike "$python" benches/alike.py "$logs"/evaluated_{cpu,cuda}/per_image.csv p,phi,margin 0.001

source=${SOURCE:-${ECHOGRAD_DATA:+breast:$ECHOGRAD_DATA/BrEaST}}
target=${TARGET:-${ECHOGRAD_DATA:+busi:$ECHOGRAD_DATA/BUSI}}
if [[ -z $source ]]; then
    source=busi:$data
    echo "neither SOURCE nor ECHOGRAD_DATA is set: training on phantoms"
fi
step train "$echograd" train --data "$source" --preset efficientnet-b1 --device cuda --epochs "${EPOCHS:-50}" --out "$logs/run"
step validation cat "$logs/run/validation/metrics.json"
step curve cat "$logs/run/metrics.csv"
if [[ -n $target ]]; then
    step external "$echograd" evaluate "$logs/run" --data "$target" --device cuda --out "$logs/external" --json
fi

"$python" benches/gpu_report.py "$logs" benches/results "$echograd"
