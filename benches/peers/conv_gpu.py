"""The convolutions of a profiled training step in PyTorch on a GPU (cuDNN, NHWC, benchmark mode), as one JSON document.

    echograd profile --step --device cuda --dtype bf16 --size 256 --json > step.json
    python benches/peers/conv_gpu.py step.json [--iterations N]

Every distinct convolution, input gradient and weight gradient of the step, depthwise ones too, is timed with the same
extents and storage, channels_last. Times are between CUDA events, the median of `--iterations` after a warm-up, one call
right behind the other, so that a layer finds its tensors in the L2 cache as far as they fit. Beside each stands the mean
of the profile's times of the steps that are that layer, which find there what the steps before them left, and no more;
what a step of ours does besides (bias, statistics, activation) is in its time alone.

`--device cpu` runs the same without a GPU, with times of the wall clock: for trying this out.
"""

import argparse
import json
import sys

import torch

from features_gpu import Clock, printed

KINDS = {"input_gradient": (True, False, False), "weight_gradient": (False, True, False)}


def layers(profile):
    """{(kind, x, w, y, groups): seconds of each such step}, extents as NHWC, weights out-kh-kw-in."""
    found = {}
    for row in profile["rows"]:
        name = row["operation"]
        depthwise = name.startswith("depthwise_conv2d")
        if not depthwise and not name.startswith("conv2d"):
            continue
        kind = next((kind for kind in KINDS if name.endswith(kind)), "forward")
        # The order of the operations' inputs: x, w; w, dy (depthwise: dy, w); x, dy.
        if kind == "forward":
            x, w, y = row["inputs"][0], row["inputs"][1], row["outputs"][0]
        elif kind == "input_gradient":
            w, y = reversed(row["inputs"]) if depthwise else row["inputs"]
            x = row["outputs"][0]
        else:
            x, w, y = row["inputs"][0], row["outputs"][0], row["inputs"][1]
        groups = x[3] if depthwise else 1
        fits = w[0] == y[3] and w[3] * groups == x[3] and w[1] % 2 and x[0] == y[0]
        if not fits:
            raise ValueError(f"step {row['step']}, {name}: no convolution from {x} by {w} to {y}")
        found.setdefault((kind, tuple(x), tuple(w), tuple(y), groups), []).append(row["seconds"])
    return found


def measure(layer, dtype, device, clock):
    """Milliseconds of PyTorch."""
    kind, x, w, y, groups = layer

    def tensor(shape):
        n, h, width, c = shape
        values = torch.rand(n, c, h, width, device=device, dtype=dtype)
        return values.to(memory_format=torch.channels_last)

    stride, padding = -(-x[1] // y[1]), w[1] // 2
    x, w, dy = tensor(x), tensor(w), tensor(y)
    strides, paddings, zeros, ones = [stride] * 2, [padding] * 2, [0, 0], [1, 1]
    if kind == "forward":
        run = lambda: torch.ops.aten.convolution(x, w, None, strides, paddings, ones, False, zeros, groups)
        assert run().shape == dy.shape
    else:
        run = lambda: torch.ops.aten.convolution_backward(
            dy, x, w, None, strides, paddings, ones, False, zeros, groups, KINDS[kind]
        )
        assert run()[0 if kind == "input_gradient" else 1].shape == (x if kind == "input_gradient" else w).shape
    return clock.median(run, flush=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", help="what `echograd profile --step --json` printed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--iterations", type=int, default=30)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch finds no GPU", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    # Our f32 is f32.
    torch.backends.cudnn.allow_tf32 = False
    with open(args.profile, encoding="utf-8") as file:
        document = json.load(file)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[document["dtype"]]
    clock = Clock(args.device, args.iterations)
    rows = []
    result = {
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "device": torch.cuda.get_device_name(0) if args.device == "cuda" else "cpu",
        "title": document["profiles"][0]["title"],
        "dtype": document["dtype"],
        "iterations": args.iterations,
        "layers": rows,
    }
    with printed(result):
        for layer, seconds in layers(document["profiles"][0]).items():
            kind, x, w, y, groups = layer
            row = {"kind": kind, "x": x, "w": w, "y": y, "groups": groups, "steps": len(seconds)}
            row["flops"] = 2 * y[0] * y[1] * y[2] * w[0] * w[1] * w[2] * w[3]
            if None not in seconds:
                row["ours_ms"] = 1e3 * sum(seconds) / len(seconds)
            row["cudnn_ms"] = measure(layer, dtype, args.device, clock)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
