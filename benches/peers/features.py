"""The feature block, forward and backward, against PyTorch eager and torch.compile, in one interleaved run.

    cargo bench --bench features --no-run                # prints the program's path
    python benches/peers/features.py PROGRAM [--cpu] [--rounds N] [--no-compile]

All sides take 16 masks of 256×256 in f32 from logits to the four features (and, in the second block, to
cross-entropy and Dice loss) and back to the logits. Printed are the least time of all rounds and the median
over rounds of the ratios within a round: by default wall-clock time on two threads; with `--cpu` processor
time on one thread, which other programs on the machine disturb far less.
"""

import argparse
import math
import os
import statistics
import subprocess
import time

parser = argparse.ArgumentParser()
parser.add_argument("program")
parser.add_argument("--cpu", action="store_true")
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--no-compile", action="store_true")
args = parser.parse_args()
threads = 1 if args.cpu else 2
os.environ["RAYON_NUM_THREADS"] = str(threads)

import torch  # noqa: E402  (after the environment is set)
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(threads)
N, SIZE, EPSILON = 16, 256, 1e-3
REPEATS = 3

axis = torch.arange(SIZE, dtype=torch.float32) - (SIZE - 1) / 2
sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
sobel = torch.stack([sobel, sobel.T])[:, None]


def features(z):
    """The four features, N×4. Moments by row and column sums, the cheapest way in PyTorch."""
    m = torch.sigmoid(3 * z)
    columns, rows = m.sum(1), m.sum(2)
    s0, s2 = rows.sum(1), (m * m).sum((1, 2))
    cx, cy = columns @ axis / s0, rows @ axis / s0
    xx = columns @ axis**2 / s0 - cx**2 + 1 / 12
    yy = rows @ axis**2 / s0 - cy**2 + 1 / 12
    xy = (m @ axis) @ axis / s0 - cx * cy
    g = F.conv2d(m[:, None], sobel, padding=2)
    p = (torch.sqrt((g * g).sum(1) + EPSILON**2) - EPSILON).sum((1, 2))
    trace = xx + yy
    root = torch.sqrt(xx * yy - xy * xy)
    rho = 2 * root / trace
    h = (1 - rho) / (1 + rho)
    pe = 2 * math.pi * torch.sqrt(trace * (1 + rho)) * (1 + 3 * h / (10 + torch.sqrt(4 - 3 * h)))
    disc = 4 * math.pi * s2
    return torch.stack([(p * p - disc) / (p * p + disc), (yy - xx) / trace, (p - pe) / (p + pe), rho], 1)


def losses(z, truth):
    """Cross-entropy and Dice loss of each image."""
    entropy = F.binary_cross_entropy_with_logits(z, truth, reduction="none").mean((1, 2))
    m = torch.sigmoid(z)
    both, either = (m * truth).sum((1, 2)), m.sum((1, 2)) + truth.sum((1, 2))
    return entropy, 1 - (2 * both + 1) / (either + 1)


def without_losses(z, truth):
    return features(z).sum()


def with_losses(z, truth):
    entropy, dice = losses(z, truth)
    return features(z).sum() + entropy.sum() + dice.sum()


radius = torch.hypot(axis[:, None], axis[None, :]).expand(N, SIZE, SIZE).contiguous()
logits = ((60 - radius) / 4).requires_grad_()
truth = (radius < 55).float()


def step(block):
    logits.grad = None
    block(logits, truth).backward()


def timed(call):
    clock = time.process_time if args.cpu else time.perf_counter
    least = float("inf")
    for _ in range(REPEATS):
        start = clock()
        call()
        least = min(least, (clock() - start) * 1e3)
    return least


pipe = subprocess.PIPE
server = subprocess.Popen([args.program, "--serve"], stdin=pipe, stdout=pipe, text=True)
# The processor-time clock of another process, as clock_getcpuclockid(3) makes it.
server_clock = (~server.pid << 3) | 2


def ours(block):
    start = time.clock_gettime(server_clock)
    print(block, REPEATS, file=server.stdin, flush=True)
    least = float(server.stdout.readline())
    spent = (time.clock_gettime(server_clock) - start) * 1e3 / REPEATS
    return spent if args.cpu else least


print(f"PyTorch {torch.__version__}, {N} masks of {SIZE}², f32, {threads} thread(s), {args.rounds} rounds")
for number, (name, block) in enumerate([("features", without_losses), ("features and losses", with_losses)]):
    sides = {
        "PyTorch eager": lambda: timed(lambda: step(block)),
        "echograd": lambda: ours(2 * number),
        "echograd, composed": lambda: ours(2 * number + 1),
    }
    if not args.no_compile:
        compiled = torch.compile(block)
        sides["torch.compile"] = lambda: timed(lambda: step(compiled))
    for side in sides.values():
        side()
    rounds = [{side: call() for side, call in sides.items()} for _ in range(args.rounds)]
    print(f"{name}:")
    for side in sides:
        ratio = statistics.median(r[side] / r["PyTorch eager"] for r in rounds)
        least = min(r[side] for r in rounds)
        print(f"  {side:<20} {least:8.3f} ms   {ratio:.4f} of eager")
