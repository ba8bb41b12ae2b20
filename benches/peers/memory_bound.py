"""Normalisation, pooling and upsampling against PyTorch (eager, channels_last), in one interleaved run.

    cargo bench --bench memory_bound --no-run
    python benches/peers/memory_bound.py target/release/deps/memory_bound-<hash> [rounds]

The layers of a U-Net 32-512 at 256x256, batch 4. Both sides compute the same operations in turn on the same number
of threads; the least time of all rounds counts. Where the name has an activation, PyTorch runs it as a second
operation, as its users do.
"""

import os
import subprocess
import sys
import time

THREADS = os.environ.setdefault("RAYON_NUM_THREADS", "2")
import torch  # noqa: E402  (after the environment is set)
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(int(THREADS))

BATCH = 4
LEVELS = [(256, 32), (128, 64), (64, 128), (32, 256), (16, 512)]
OPERATIONS = {
    "batch_norm_relu": (LEVELS, lambda x, g, b: F.relu(F.batch_norm(x, None, None, g, b, True), inplace=True)),
    "batch_norm": (LEVELS[:2], lambda x, g, b: F.batch_norm(x, None, None, g, b, True)),
    "batch_norm_silu": (LEVELS[:2], lambda x, g, b: F.silu(F.batch_norm(x, None, None, g, b, True))),
    "group_norm_relu": (LEVELS[:2], lambda x, g, b: F.relu(F.group_norm(x, 8, g, b), inplace=True)),
    "max_pool2d": (LEVELS[:4], lambda x, g, b: F.max_pool2d(x, 2)),
    "avg_pool2d": (LEVELS[:2], lambda x, g, b: F.avg_pool2d(x, 2)),
    "global_avg_pool": (LEVELS[-1:], lambda x, g, b: F.adaptive_avg_pool2d(x, 1)),
    "upsample2x": (LEVELS[1:], lambda x, g, b: F.interpolate(x, scale_factor=2, mode="bilinear")),
}


def least(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def peer(function, size, c, repeats):
    x = torch.rand(BATCH, c, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    g, b = torch.ones(c, requires_grad=True), torch.ones(c, requires_grad=True)
    y = function(x, g, b)
    dy = torch.full_like(y, 0.5)
    inputs = [x, g, b]
    backward = least(
        lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True, allow_unused=True), repeats
    )
    return [least(lambda: function(x, g, b), repeats), backward]


def main():
    program = sys.argv[1]
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    server = subprocess.Popen([program, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ours(name, size, c, repeats):
        print(name, BATCH, size, c, repeats, file=server.stdin, flush=True)
        return [float(word) for word in server.stdout.readline().split()]

    print(f"PyTorch {torch.__version__}, {THREADS} threads, batch {BATCH}, least of {rounds} interleaved rounds")
    print(f"{'ms ours/PyTorch = ratio':>32} {'forward':>24} {'backward':>24} {'both':>24}")
    for name, (cases, function) in OPERATIONS.items():
        for size, c in cases:
            best_ours, best_peer = [float("inf")] * 2, [float("inf")] * 2
            for _ in range(rounds):
                best_peer = [min(a, b) for a, b in zip(best_peer, peer(function, size, c, 3))]
                best_ours = [min(a, b) for a, b in zip(best_ours, ours(name, size, c, 3))]
            pairs = list(zip(best_ours, best_peer)) + [(sum(best_ours), sum(best_peer))]
            row = "".join(f" {a:8.3f}/{b:8.3f} = {a / b:4.2f}" for a, b in pairs)
            print(f"{f'{name} {c}×{size}²':>32}{row}", flush=True)


if __name__ == "__main__":
    main()
