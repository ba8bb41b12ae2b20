"""Convolution and its gradients against PyTorch (eager, channels_last), in one interleaved run.

    cargo bench --bench conv --no-run
    python benches/peers/conv.py target/release/deps/conv-<hash> [rounds] [batch]

Both sides compute the same layers in turn on the same number of threads; the least time of all rounds counts.
"""

import os
import subprocess
import sys
import time

THREADS = os.environ.setdefault("RAYON_NUM_THREADS", "2")
import torch  # noqa: E402  (after the environment is set)

torch.set_num_threads(int(THREADS))

# size, in, out, kernel, stride, padding
LAYERS = [
    (256, 32, 32, 3, 1, 1),
    (128, 64, 64, 3, 1, 1),
    (64, 128, 128, 3, 1, 1),
    (32, 256, 256, 3, 1, 1),
    (16, 512, 512, 3, 1, 1),
    (256, 96, 32, 3, 1, 1),
    (128, 192, 64, 3, 1, 1),
    (64, 384, 128, 3, 1, 1),
    (32, 768, 256, 3, 1, 1),
    (128, 32, 64, 3, 1, 1),
    (256, 1, 32, 3, 1, 1),
    (256, 32, 1, 1, 1, 0),
    (128, 64, 128, 3, 2, 1),
    (64, 256, 256, 1, 1, 0),
]


def least(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def peer(batch, layer, repeats):
    size, c, out, kernel, stride, padding = layer
    x = torch.randn(batch, c, size, size).contiguous(memory_format=torch.channels_last)
    w = torch.randn(out, c, kernel, kernel).contiguous(memory_format=torch.channels_last)
    y = torch.nn.functional.conv2d(x, w, stride=stride, padding=padding)
    dy = torch.randn_like(y)

    def backward(mask):
        arguments = (dy, x, w, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
        return torch.ops.aten.convolution_backward(*arguments, [*mask, False])

    with torch.no_grad():
        return [
            least(lambda: torch.nn.functional.conv2d(x, w, stride=stride, padding=padding), repeats),
            least(lambda: backward((True, False)), repeats),
            least(lambda: backward((False, True)), repeats),
        ]


def main():
    program = sys.argv[1]
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    batch = int(sys.argv[3]) if len(sys.argv) > 3 else 4
    server = subprocess.Popen([program, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ours(layer, repeats):
        print(batch, *layer, repeats, file=server.stdin, flush=True)
        return [float(word) for word in server.stdout.readline().split()]

    print(f"PyTorch {torch.__version__}, {THREADS} threads, batch {batch}, least of {rounds} interleaved rounds")
    print("ms ours/PyTorch = ratio; GFLOP/s of ours")
    heads = ["forward", "input gradient", "weight gradient", "all three"]
    print(f"{'layer':>26} " + "".join(f"{head:>26}" for head in heads) + "   GFLOP/s")
    for layer in LAYERS:
        size, c, out, kernel, stride, padding = layer
        best_ours, best_peer = [float("inf")] * 3, [float("inf")] * 3
        for _ in range(rounds):
            best_peer = [min(a, b) for a, b in zip(best_peer, peer(batch, layer, 2))]
            best_ours = [min(a, b) for a, b in zip(best_ours, ours(layer, 2))]
        pairs = list(zip(best_ours, best_peer)) + [(sum(best_ours), sum(best_peer))]
        extent = (size + 2 * padding - kernel) // stride + 1
        flops = 2 * batch * extent**2 * kernel**2 * c * out
        rates = "/".join(f"{flops / t / 1e6:.0f}" for t in best_ours)
        name = f"{c}→{out} {kernel}×{kernel}/{stride} {size}²"
        print(f"{name:>26} " + "".join(f"{a:9.2f}/{b:8.2f} = {a / b:4.2f}" for a, b in pairs) + "   " + rates, flush=True)


if __name__ == "__main__":
    main()
