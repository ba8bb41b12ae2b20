#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command, into benches/results/GPU.json.
#
#     benches/gpu.sh [ECHOGRAD]                  the program; target/release/echograd by default
#     BUDGET=540 LOGS=target/gpu benches/gpu.sh  what fits into nine minutes; called again, it goes on
#
# Needs an NVIDIA GPU with its driver, compute-sanitizer, and Python with PyTorch (PYTHON, or python3); no Rust. Without
# kernels in the program also NVRTC, which is found beside PyTorch; a program with kernels saves half a minute.
#
# What matters most comes first:
# - Correctness: every kernel against the CPU's code, twice for equal bits, and by graph replay (`gradcheck --device
#   cuda`), a few problems first; what fails once more by itself, since a kernel that fails ends its process's work on
#   the GPU. Two short trainings, and one that was interrupted and resumed, with equal bits; an epoch in f32 and its
#   evaluation, as on the CPU (benches/alike.py); compute-sanitizer's tools over a smaller run of gradcheck.
# - Speed: the feature block and whole training steps of `unet` and `efficientnet-b1` as `echograd profile` measures them,
#   and PyTorch's (benches/peers/features_gpu.py, step_gpu.py); each of their convolutions and cuDNN's (conv_gpu.py).
#   On compute capability 9.0 the checks of convolutions and the training steps again with ECHOGRAD_WGMMA=1.
# - Training: a run of `efficientnet-b1` with its curve, the GPU's busy share of an epoch, and the external test.
# - The rest: all problems of gradcheck, other sizes, and torch.compile, which takes minutes for each network.
#
# SOURCE and TARGET name what is trained and tested on, as for --data and best as packs: SOURCE=pack:breast.pack
# TARGET=pack:busi.pack; where they are not set, BrEaST and BUSI in the folder ECHOGRAD_DATA; where there is none, phantoms,
# which say nothing of patients. EPOCHS (50) shortens the run.
#
# BUDGET: seconds in all; no step takes more than half of what is left, and those that would begin with less than ten are
# left out. LOGS: a folder for what steps say; it is kept, and a step that passed or failed there is not run again. RESULTS:
# the folder of the file, instead of benches/results.
#
# The file is written after every step, and holds no paths of the machine. Exit status: 0 if every step passed, 1 if one
# failed or was left out, 2 if nothing could be run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 2
}

(($# <= 1)) || fail "expected the path of echograd or nothing, found $# arguments"
echograd=${1:-target/release/echograd}
python=${PYTHON:-python3}
budget=${BUDGET:-1000000}
results=${RESULTS:-benches/results}
# Where toolkits put their tools.
PATH=$PATH:/usr/local/cuda/bin
[[ -x $echograd ]] || fail "$echograd: no such program; build it by \`cargo build --release\` or give its path"
[[ $budget =~ ^[0-9]+$ ]] || fail "BUDGET: expected seconds, found '$budget'"
command -v nvidia-smi >/dev/null || fail "nvidia-smi not found; an NVIDIA GPU and its driver are needed"
command -v "$python" >/dev/null || fail "$python not found; set PYTHON"

if [[ -n ${LOGS:-} ]]; then
    logs=$LOGS
    mkdir -p "$logs"
else
    logs=$(mktemp -d)
    trap 'rm -rf "$logs"' EXIT
fi
mkdir -p "$results"
touch "$logs/steps"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader >"$logs/gpu" ||
    fail "nvidia-smi: $(head -n 1 "$logs/gpu")"
if [[ -z ${ECHOGRAD_NVRTC:-} ]]; then
    ECHOGRAD_NVRTC=$("$python" -c 'import glob, nvidia
print(next((p for p in nvidia.__path__ if glob.glob(p + "/*/lib/libnvrtc.so*")), ""))' 2>/dev/null || true)
    export ECHOGRAD_NVRTC
fi

# status NAME: how that step ended last, in this call or an earlier one.
status() { awk -F '\t' -v name="$1" '$1 == name { status = $2 } END { print status }' "$logs/steps"; }
# has NAME: whether it passed.
has() { [[ $(status "$1") == 0 ]]; }
# ended NAME: whether it came to an end, which time took from others.
ended() { [[ $(status "$1") =~ ^[0-9]+$ && ! $(status "$1") =~ ^(124|137)$ ]]; }

# step NAME COMMAND...: runs it, keeps what it says, and notes how it ended.
step() {
    local name=$1 status=0 begin=$SECONDS left=$((budget - SECONDS)) said
    shift
    said=${*//[$'\n\t']/ }
    if ended "$name"; then
        echo "== $name: $(has "$name" && echo passed || echo failed) before"
        return
    fi
    printf '== %s: %s\n' "$name" "$said"
    if ((left < 10)); then
        status=skipped
        echo "left out: no time"
    else
        timeout --kill-after=10 $((left / 2)) "$@" >"$logs/$name.out" 2>"$logs/$name.err" </dev/null || status=$?
        if ((status)); then
            tail -n 20 "$logs/$name.out" "$logs/$name.err"
            echo "$name FAILED, exit status $status, $((SECONDS - begin)) s"
        else
            echo "ok, $((SECONDS - begin)) s"
        fi
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" "$said" >>"$logs/steps"
    "$python" benches/gpu_report.py "$logs" "$results" "$echograd" >"$logs/report" 2>&1 || true
}

# trained NAME ARGUMENTS...: a training, anew if it was cut short before.
trained() {
    ended "$1" || rm -rf "${logs:?}/$1"
    step "$1" "$echograd" train "${@:2}" --out "$logs/$1"
}

# sanitized NAME TOOL COMMAND...: a step under one of compute-sanitizer's tools.
sanitized() {
    local name=$1 tool=$2 options=(--tool "$2" --error-exitcode 1)
    # The program asks the driver for what may not be there (a kernel's parameters until there are no more, a name in
    # one module after another), and a no is an answer, not an error; those that are, it reports itself.
    if [[ $tool == memcheck ]]; then options+=(--report-api-errors no); fi
    step "$name" compute-sanitizer "${options[@]}" "${@:3}"
}

check=("$echograd" gradcheck --device cuda)
profile=("$echograd" profile --device cuda --json)
on_hopper=false
if [[ $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1) == 9.0 ]]; then on_hopper=true; fi

# ---- Correctness ----

step doctor "$echograd" doctor --json
step gradcheck "${check[@]}" --cases 10
if ! has gradcheck && [[ -s $logs/gradcheck.out ]]; then
    for op in $(awk '$NF == "FAILED" && $1 !~ /^(adamw|augment)$/ { print $1 }' "$logs/gradcheck.out"); do
        step "gradcheck_$op" "${check[@]}" --cases 10 --op "$op"
        # Which of its kernels it is.
        has "gradcheck_$op" || step "blocking_$op" env CUDA_LAUNCH_BLOCKING=1 "${check[@]}" --cases 10 --op "$op"
    done
fi
# Tiles that small problems do not fill, and results against the CPU's.
for shape in 8,64,64,128 16,64,64,64; do
    step "conv2d_$shape" "${profile[@]}" --op conv2d --shape "$shape" --iters 50 --dtype bf16
done
# Short runs on phantoms, whose bits must be equal.
data=$logs/phantoms
step phantom "$echograd" phantom --site A --count 60 --seed 1 --out "$data"
short=(--data "busi:$data" --preset efficientnet-b1 --device cuda --epochs 3)
trained run_1 "${short[@]}"
trained run_2 "${short[@]}"
# Interrupted after some steps; one that ended before resumes to itself.
ended run_3 || rm -rf "${logs:?}/run_3"
step run_3 bash -c '
    "$0" train "${@:2}" --out "$1" &
    pid=$!
    while kill -0 $pid 2>/dev/null && ! [[ -s $1/metrics.csv ]]; do sleep 0.05; done
    kill -TERM $pid 2>/dev/null
    wait $pid || (($? == 130)) || exit 1
    exec "$0" train --resume --out "$1"
' "$echograd" "$logs/run_3" "${short[@]}"
step repeated cmp "$logs/run_1/last.safetensors" "$logs/run_2/last.safetensors"
step resumed cmp "$logs/run_1/last.safetensors" "$logs/run_3/last.safetensors"
# An epoch in f32, and one run's evaluation, on the GPU and on the CPU: sums in another order move the weights apart.
full=(--data "busi:$data" --preset efficientnet-b1 --size 128 --epochs 1 --set precision=f32)
for device in cpu cuda; do
    trained "epoch_$device" "${full[@]}" --device $device
    step "evaluated_$device" "$echograd" evaluate "$logs/epoch_cpu" --data "busi:$data" --include-training \
        --device $device --out "$logs/evaluated_$device"
done
step epoch_alike "$python" benches/alike.py "$logs"/epoch_{cpu,cuda}/metrics.csv \
    loss,cross_entropy,dice_loss,classification,gradient_norm 0.01
step evaluated_alike "$python" benches/alike.py "$logs"/evaluated_{cpu,cuda}/per_image.csv p,phi,margin 0.001
# Seed 4 draws large problems.
sanitized memcheck memcheck "${check[@]}" --seed 4 --cases 2

# ---- Speed ----

# blocks SHAPE...: the feature block.
blocks() {
    local shape dtype
    for shape; do
        for dtype in f32 bf16; do
            step "profile_${dtype}_$shape" "${profile[@]}" --features --shape "$shape" --iters 50 --dtype "$dtype"
        done
    done
}
# steps NAME BATCH [VARIABLE=VALUE]: whole training steps.
steps() {
    local preset
    for preset in unet efficientnet-b1; do
        step "$1_${preset}_$2" env "${@:3}" "${profile[@]}" --step --preset "$preset" --size 256 --batch "$2" --iters 20 \
            --dtype bf16
    done
}
blocks 256,256,256,1
step pytorch "$python" benches/peers/features_gpu.py --no-compile
for preset in unet efficientnet-b1; do
    step "summary_$preset" "$echograd" summary --preset "$preset" --size 256 --json
done
steps step 16
steps step 64
step pytorch_step "$python" benches/peers/step_gpu.py --no-compile
if $on_hopper; then
    for op in conv2d conv2d_wide; do
        step "gradcheck_wgmma_$op" env ECHOGRAD_WGMMA=1 "${check[@]}" --cases 20 --op "$op"
    done
    steps wgmma 16 ECHOGRAD_WGMMA=1
    steps wgmma 64 ECHOGRAD_WGMMA=1
fi
for preset in unet efficientnet-b1; do
    step "conv_${preset}_16" "$python" benches/peers/conv_gpu.py "$logs/step_${preset}_16.out"
done

# ---- Training ----

source=${SOURCE:-${ECHOGRAD_DATA:+breast:$ECHOGRAD_DATA/BrEaST}}
target=${TARGET:-${ECHOGRAD_DATA:+busi:$ECHOGRAD_DATA/BUSI}}
if [[ -z $source ]]; then
    source=busi:$data
    echo "neither SOURCE nor ECHOGRAD_DATA is set: training on phantoms"
fi
trained run --data "$source" --preset efficientnet-b1 --device cuda --epochs "${EPOCHS:-50}"
step validation cat "$logs/run/validation/metrics.json"
step curve cat "$logs/run/metrics.csv"
if [[ -n $target ]]; then
    step external "$echograd" evaluate "$logs/run" --data "$target" --device cuda --out "$logs/external" --json
fi

# ---- The rest ----

for tool in racecheck synccheck initcheck; do
    sanitized "$tool" "$tool" "${check[@]}" --seed 4 --cases 2
done
step gradcheck_all "${check[@]}"
if $on_hopper; then
    step gradcheck_wgmma env ECHOGRAD_WGMMA=1 "${check[@]}"
    for tool in memcheck racecheck synccheck; do
        ECHOGRAD_WGMMA=1 sanitized "${tool}_wgmma" "$tool" "${check[@]}" --op conv2d --cases 20
    done
fi
blocks 64,256,256,1 16,256,256,1 256,128,128,1
for block in 256x256 64x256 16x256 256x128; do
    step "pytorch_compile_$block" "$python" benches/peers/features_gpu.py --blocks "$block"
done
for preset in unet efficientnet-b1; do
    step "conv_${preset}_64" "$python" benches/peers/conv_gpu.py "$logs/step_${preset}_64.out"
done
for batch in 64 16; do
    for preset in unet efficientnet-b1; do
        step "pytorch_step_compile_${preset}_$batch" "$python" benches/peers/step_gpu.py --steps "$preset:$batch"
    done
done

"$python" benches/gpu_report.py "$logs" "$results" "$echograd"
