"""The feature block in PyTorch on a GPU: eager and torch.compile, forward and backward, as one JSON document.

    python benches/peers/features_gpu.py [--blocks 256x256,64x256,16x256,256x128] [--iterations N] [--no-compile]

From mask logits z, true masks g, malignancy logits l and labels y to

    mean(BCE(z, g)) + mean(Dice(σ(z), g)) + 0.2·mean(BCE(l, y)) + Σ c·(σ(l) − φ)² / measurable lesions

and back to z, l and the prior's weights: cross-entropy, Dice loss, the four shape features, the prior φ and the consistency
term, the block of `echograd profile --features`, here as one would write it in PyTorch. Logits and masks are stored as f32 or
bf16, everything is computed in f32 (in bf16 the moments would be useless). `--blocks` lists masks × side.

Times are between CUDA events around one forward and backward; before each the L2 cache is overwritten; the median of
`--iterations` after a warm-up. The host does not wait between iterations, so that launches overlap with the work
before them: PyTorch at its best. The copy bandwidth is that of `Tensor.copy_`, bytes read plus bytes written.

Before anything is timed the block is checked: the features of a disc, a flat and a steep ellipse against known values, and the loss and
gradients of each variant against the same block in f64. A failure is under "errors", and the exit status is 1. Who ends this by
SIGTERM gets the document with what was measured until then.
`--device cpu` does all that without a GPU, with times of the wall clock.
"""

import argparse
import contextlib
import json
import math
import signal
import statistics
import sys
import time

import torch
import torch.nn.functional as F

EPSILON = 1e-3
KAPPA = 3.0
# Mean, standard deviation and weight of each feature, and the bias: a fit to the masks of a data set.
MEAN = (0.1814, -0.3150, 0.0425, 0.8628)
SD = (0.1141, 0.3031, 0.0454, 0.1245)
WEIGHT = (0.0, 0.233, 1.265, 0.419)
BIAS = -0.486
# |x − exact| ≤ TOLERANCE·max|exact|: f32 arithmetic; bf16 stores gradients with 8 bits.
TOLERANCE = {"f32": 1e-4, "bf16": 2.0**-8}
CLASSIFICATION = 0.2
WARM_UP = 10


def parse_blocks(text):
    try:
        blocks = [tuple(int(n) for n in word.split("x")) for word in text.split(",")]
        if all(len(block) == 2 and min(block) > 0 for block in blocks):
            return blocks
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected MASKSxSIDE,..., found {text!r}")


def constants(side, device, dtype):
    """Pixel coordinates from the image's centre, and Sobel's two kernels / 8."""
    axis = torch.arange(side, device=device, dtype=dtype) - (side - 1) / 2
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=device, dtype=dtype) / 8
    return axis, torch.stack([sobel, sobel.T])[:, None]


def shape_features(m, axis, sobel):
    """Features N×4, whether each lesion is measurable, and how decided its mask is; of soft masks N×H×W."""
    columns, rows = m.sum(1), m.sum(2)
    s0, s2 = rows.sum(1), (m * m).sum((1, 2))
    measurable = s0 >= 32
    area = torch.where(measurable, s0, 32.0)
    cx, cy = columns @ axis / area, rows @ axis / area
    xx = columns @ axis**2 / area - cx**2 + 1 / 12
    yy = rows @ axis**2 / area - cy**2 + 1 / 12
    xy = (m @ axis * axis).sum(1) / area - cx * cy
    g = F.conv2d(m[:, None], sobel, padding=2)
    p = (torch.sqrt((g * g).sum(1) + EPSILON**2) - EPSILON).sum((1, 2))
    trace = xx + yy
    rho = 2 * torch.sqrt(xx * yy - xy * xy) / trace
    h = (1 - rho) / (1 + rho)
    ellipse = 2 * math.pi * torch.sqrt(trace * (1 + rho)) * (1 + 3 * h / (10 + torch.sqrt(4 - 3 * h)))
    disc = 4 * math.pi * s2
    irregularity = (p * p - disc) / (p * p + disc)
    features = torch.stack([irregularity, (yy - xx) / trace, (p - ellipse) / (p + ellipse), rho], 1)
    return features, measurable, torch.relu(2 * s2 / area - 1).detach()


def loss(z, g, malignancy, weight, bias, mean, sd, labels, axis, sobel):
    z, g = z.to(axis.dtype), g.to(axis.dtype)
    entropy = F.binary_cross_entropy_with_logits(z, g)
    s = torch.sigmoid(z)
    dice = 1 - (2 * (s * g).sum((1, 2)) + 1) / (s.sum((1, 2)) + g.sum((1, 2)) + 1)
    features, measurable, decided = shape_features(torch.sigmoid(KAPPA * z), axis, sobel)
    phi = torch.sigmoid(bias + ((features - mean) / sd) @ weight)
    squares = decided * (torch.sigmoid(malignancy) - phi) ** 2
    consistency = torch.where(measurable, squares, 0.0).sum() / measurable.sum().clamp(min=1)
    classification = CLASSIFICATION * F.binary_cross_entropy_with_logits(malignancy, labels)
    return entropy + dice.mean() + classification + consistency


def inputs(masks, side, device, storage, dtype):
    """Soft ellipses of different sizes, places and directions; the same whatever the device and type."""
    axis, sobel = constants(side, "cpu", torch.float64)
    image = torch.arange(masks, dtype=torch.float64)[:, None, None]
    x, y = axis[None, None, :], axis[None, :, None]
    x = x - side * 0.1 * torch.sin(image)
    y = y - side * 0.1 * torch.cos(2 * image)
    a, b = side * (0.2 + 0.08 * torch.sin(3 * image)), side * (0.2 + 0.08 * torch.cos(image))
    turn = 0.7 * image
    u, v = x * torch.cos(turn) + y * torch.sin(turn), y * torch.cos(turn) - x * torch.sin(turn)
    radius = torch.sqrt((u / a) ** 2 + (v / b) ** 2)
    wave = 0.1 * torch.sin(7 * torch.atan2(v, u))
    # Rounded first, so that the block in f64 has the same logits.
    stored = torch.float64 if dtype == torch.float64 else storage
    z = ((1 + wave - radius) * side / 16).to(torch.float32).to(storage)
    z, g = z.to(stored), (radius < 1).to(stored)
    labels = (torch.arange(masks) % 2).to(dtype)
    malignancy = torch.linspace(-2, 2, masks, dtype=torch.float64).to(dtype)
    prior = [torch.tensor(values, dtype=torch.float64).to(dtype) for values in (WEIGHT, BIAS, MEAN, SD)]
    values = [tensor.to(device) for tensor in (z, g, malignancy, *prior, labels)]
    for i in (0, 2, 3, 4):
        values[i].requires_grad_()
    return [*values, axis.to(device, dtype), sobel.to(device, dtype)]


def step(function, values):
    """The loss, and its gradients by mask logits, malignancy logits, the prior's weights and bias."""
    total = function(*values)
    return total, torch.autograd.grad(total, (values[0], values[2], values[3], values[4]))


def differences(found, exact):
    """The largest difference of each result, relative to its largest value."""

    def results(total, gradients):
        z, malignancy, weight, bias = (gradient.double() for gradient in gradients)
        prior = torch.cat([weight, bias[None]])
        return {"loss": total.double(), "mask logits": z, "malignancy logits": malignancy, "prior": prior}

    found, exact = results(*found), results(*exact)
    return {name: ((found[name] - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for name, b in exact.items()}


def check_features(device):
    """Area, irregularity, orientation, margin and roundness of three hard masks, to the last known digit."""
    axis, sobel = constants(256, device, torch.float64)
    x, y = axis[None, :], axis[:, None]
    known = [
        (x**2 + y**2 < 3600, (11304, 0.0163, 0.0, 0.0081, 1.0)),
        ((x / 80) ** 2 + (y / 40) ** 2 < 1, (10068, 0.1039, -0.5994, 0.0090, 0.8004)),
        ((x / 40) ** 2 + (y / 80) ** 2 < 1, (10068, 0.1039, 0.5994, 0.0090, 0.8004)),
    ]
    errors = []
    for mask, expected in known:
        mask = mask.double()
        features = shape_features(mask[None], axis, sobel)[0][0].tolist()
        found = [mask.sum().item(), *features]
        if any(abs(a - b) > 1e-4 for a, b in zip(found, expected)):
            errors.append(f"features of a hard mask: expected {expected}, found {found}")
    return errors


class Clock:
    """Milliseconds of a call, by CUDA events, or by the wall clock where there is no GPU."""

    def __init__(self, device, iterations):
        self.cuda = device == "cuda"
        self.iterations = iterations
        if self.cuda:
            cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
            self.flush = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def median(self, call, flush=True):
        """Before each call the L2 cache is overwritten, unless told otherwise."""
        for _ in range(min(WARM_UP, self.iterations)):
            call()
        if not self.cuda:
            times = []
            for _ in range(self.iterations):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
            return statistics.median(times)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.iterations)]
        torch.cuda.synchronize()
        for start, end in events:
            if flush:
                self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)


def copy_bandwidth(clock, device):
    count = (1 << 28) if device == "cuda" else (1 << 20)
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    milliseconds = clock.median(lambda: target.copy_(source))
    size = source.numel() * source.element_size()
    return {"bytes": 2 * size, "ms": milliseconds, "gb_per_s": 2 * size / milliseconds / 1e6}


def measure(masks, side, name, args, clock):
    """One row of the result, and what is wrong with it."""
    storage = torch.float32 if name == "f32" else torch.bfloat16
    values = inputs(masks, side, args.device, storage, torch.float32)
    exact_values = inputs(masks, side, args.device, storage, torch.float64)
    exact = step(loss, exact_values)
    del exact_values
    row = {"masks": masks, "side": side, "dtype": name, "loss": exact[0].item()}
    variants = {"eager": loss}
    if not args.no_compile:
        torch.compiler.reset()
        variants["compile"] = torch.compile(loss, dynamic=False)
    errors = []
    for variant, function in variants.items():
        worst = differences(step(function, values), exact)
        row[f"{variant}_error"] = worst
        for what, difference in worst.items():
            # Only the gradient by the mask logits is stored as bf16.
            tolerance = TOLERANCE[name if what == "mask logits" else "f32"]
            if not difference <= tolerance:
                where = f"{masks} masks of {side}², {name}, {variant}"
                errors.append(f"{where}: {what} is {difference:.1e} from f64, tolerance {tolerance:.1e}")
        row[f"{variant}_ms"] = clock.median(lambda: step(function, values))
    return row, errors


@contextlib.contextmanager
def printed(document):
    """Prints what is in the document at the end, also if that is a SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        json.dump(document, sys.stdout, indent=1)
        print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--blocks", type=parse_blocks, default="256x256,64x256,16x256,256x128", metavar="MASKSxSIDE,..."
    )
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if args.iterations < 1:
        parser.error(f"--iterations: expected at least 1, found {args.iterations}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch finds no GPU; --device cpu checks the block without one", file=sys.stderr)
        return 2
    # The block has no large product, but a convolution that TF32 would round to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    clock = Clock(args.device, args.iterations)
    errors, rows = check_features(args.device), []
    document = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(0) if args.device == "cuda" else "cpu",
        "iterations": args.iterations,
        "copy": copy_bandwidth(clock, args.device),
        "blocks": rows,
        "errors": errors,
    }
    with printed(document):
        for masks, side in args.blocks:
            for name in ("f32", "bf16"):
                row, wrong = measure(masks, side, name, args, clock)
                rows.append(row)
                errors += wrong
                print(json.dumps(row), file=sys.stderr, flush=True)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
