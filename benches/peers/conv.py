"""Convolution and its gradients against PyTorch (eager, channels_last), in one interleaved run.

    cargo bench --bench conv --no-run                    # prints the program's path
    python benches/peers/conv.py PROGRAM [--cpu] [--rounds N] [--batch N] [--layers SUBSTRING]

Both sides compute the same layers in turn. By default two threads each and the least wall-clock time of all
rounds. `--cpu` takes one thread each and processor time instead, which other programs on the machine disturb
far less.
"""

import argparse
import os
import subprocess
import time

parser = argparse.ArgumentParser()
parser.add_argument("program")
parser.add_argument("--cpu", action="store_true")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--layers", default="")
args = parser.parse_args()
threads = 1 if args.cpu else 2
os.environ["RAYON_NUM_THREADS"] = str(threads)

import torch  # noqa: E402  (after the environment is set)

torch.set_num_threads(threads)
FUNCTIONS = ["forward", "input gradient", "weight gradient"]
REPEATS = 2

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


def timed(function, cpu_clock):
    """Milliseconds of one call, and what it returned."""
    clock = cpu_clock if args.cpu else time.perf_counter
    start = clock()
    result = function()
    return (clock() - start) * 1e3, result


class Ours:
    def __init__(self):
        pipe = subprocess.PIPE
        self.server = subprocess.Popen([args.program, "--serve"], stdin=pipe, stdout=pipe, text=True)
        # The processor-time clock of another process, as clock_getcpuclockid(3) makes it.
        self.clock_id = (~self.server.pid << 3) | 2

    def ask(self, *words):
        print(*words, file=self.server.stdin, flush=True)
        return self.server.stdout.readline()

    def layer(self, *layer):
        self.ask("layer", args.batch, *layer)

    def run(self, function):
        cpu, wall = timed(
            lambda: float(self.ask("run", function, REPEATS)),
            lambda: time.clock_gettime(self.clock_id),
        )
        return cpu / REPEATS if args.cpu else wall


class Peer:
    def layer(self, size, c, out, kernel, stride, padding):
        last = torch.channels_last
        x = torch.randn(args.batch, c, size, size).contiguous(memory_format=last)
        w = torch.randn(out, c, kernel, kernel).contiguous(memory_format=last)

        def forward():
            return torch.nn.functional.conv2d(x, w, stride=stride, padding=padding)

        dy = torch.randn_like(forward())

        def backward(dx, dw):
            shape = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
            return torch.ops.aten.convolution_backward(dy, x, w, None, *shape, [dx, dw, False])

        self.functions = [forward, lambda: backward(True, False), lambda: backward(False, True)]
        for function in self.functions:
            function()

    def run(self, function):
        with torch.no_grad():
            return min(timed(self.functions[function], time.process_time)[0] for _ in range(REPEATS))


sides = [Ours(), Peer()]
clock = "processor time" if args.cpu else "wall-clock time"
print(f"PyTorch {torch.__version__}, batch {args.batch}, {threads} thread(s), least {clock} of {args.rounds} rounds")
print("ms ours / PyTorch = ratio; last column GFLOP/s of ours")
print(f"{'layer':>22} " + "".join(f"{head:>26}" for head in [*FUNCTIONS, "all three"]) + "   GFLOP/s")
for layer in LAYERS:
    size, c, out, kernel, stride, padding = layer
    name = f"{c}→{out} {kernel}×{kernel}/{stride} {size}²"
    if args.layers not in name:
        continue
    for side in sides:
        side.layer(*layer)
    least = [[float("inf")] * 3 for _ in sides]
    for _ in range(args.rounds):
        for function in range(3):
            for side, times in zip(sides, least):
                times[function] = min(times[function], side.run(function))
    pairs = list(zip(*least)) + [tuple(map(sum, least))]
    extent = (size + 2 * padding - kernel) // stride + 1
    flops = 2 * args.batch * extent**2 * kernel**2 * c * out
    rates = "/".join(f"{flops / t / 1e6:.0f}" for t in least[0])
    print(f"{name:>22} " + "".join(f"{a:9.2f} /{b:8.2f} = {a / b:4.2f}" for a, b in pairs) + "   " + rates, flush=True)
