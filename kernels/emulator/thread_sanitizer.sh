#!/bin/sh
# Runs the emulator's tests, and every kernel that an operation has, under ThreadSanitizer: races on global
# memory between blocks, which the emulator's own checks do not cover. Slow; arguments go to gradcheck (`--op
# NAME`, for instance).
set -eu
cd "$(dirname "$0")/../.."
export ECHOGRAD_EMULATOR_SANITIZE=thread
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/thread-sanitizer"
export TSAN_OPTIONS="suppressions=$PWD/kernels/emulator/thread_sanitizer.suppressions"
# Its shadow memory needs addresses that strong randomisation may take.
setarch -R cargo test --release --features emulator --test emulator
setarch -R cargo run --release --features emulator -- gradcheck --device emulator --cases 2 "$@"
