#!/bin/sh
# Runs the tests of the emulator under ThreadSanitizer: races on global memory between blocks, which the
# emulator's own checks do not cover. Slow; arguments go to the test program (a filter, for instance).
set -eu
cd "$(dirname "$0")/../.."
export ECHOGRAD_EMULATOR_SANITIZE=thread
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/thread-sanitizer"
# Its shadow memory needs addresses that strong randomisation may take.
exec setarch -R cargo test --release --features emulator --test emulator -- "$@"
