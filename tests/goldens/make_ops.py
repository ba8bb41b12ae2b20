"""Writes ops.json, PyTorch's outputs and gradients of the operations it has, for tests/goldens_ops.rs.

    pip install torch numpy
    python tests/goldens/make_ops.py

Inputs are f32 numbers from an integer hash, which the test computes too, so only results are stored. PyTorch
computes in f64. All tensors are written in the crate's order: NHWC, convolution weights out-kh-kw-in.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def numbers(seed, shape, low, high):
    x = np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(2654435761) + np.uint64(seed * 40503)
    for shift, factor in [(15, 2246822519), (13, 3266489917)]:
        x &= np.uint64(0xFFFFFFFF)
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x &= np.uint64(0xFFFFFFFF)
    unit = (x >> np.uint64(8)).astype(np.float64) / 2**24
    return (low + (high - low) * unit).astype(np.float32).astype(np.float64).reshape(shape)


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def vector(x):
    return x.reshape(-1)


def per_image(x):
    return x.flatten(1).mean(1).reshape(-1, 1, 1, 1)


def batch_norm(p, x, gamma, beta):
    y = F.batch_norm(x, None, None, vector(gamma), vector(beta), training=True, eps=p["eps"])
    return ACTIVATIONS[p["activation"]](y)


def normalize(p, x, gamma, beta, mean, var):
    y = F.batch_norm(x, vector(mean), vector(var), vector(gamma), vector(beta), eps=p["eps"])
    return ACTIVATIONS[p["activation"]](y)


def group_norm(p, x, gamma, beta):
    y = F.group_norm(x, p["groups"], vector(gamma), vector(beta), eps=p["eps"])
    return ACTIVATIONS[p["activation"]](y)


def running_statistics(p, x):
    mean, var = (torch.zeros(x.shape[1], dtype=x.dtype) for _ in range(2))
    F.batch_norm(x, mean, var, training=True, momentum=p["momentum"])
    return [mean.reshape(1, -1, 1, 1), var.reshape(1, -1, 1, 1)]


def bce(p, z, g):
    return per_image(F.binary_cross_entropy_with_logits(z, g, reduction="none"))


ACTIVATIONS = {"identity": lambda x: x, "relu": F.relu, "silu": F.silu}
POOL = ["kernel", "stride", "padding"]
OPS = {
    "conv2d": lambda p, x, w: F.conv2d(x, w, stride=p["stride"], padding=p["padding"]),
    "linear": lambda p, x, w: F.linear(x.flatten(1), w.flatten(1))[:, :, None, None],
    "bias_add": lambda p, x, b: x + b,
    "batch_norm": batch_norm,
    "normalize": normalize,
    "running_statistics": running_statistics,
    "group_norm": group_norm,
    "max_pool2d": lambda p, x: F.max_pool2d(x, *(p[k] for k in POOL)),
    "avg_pool2d": lambda p, x: F.avg_pool2d(x, *(p[k] for k in POOL)),
    "global_avg_pool": lambda p, x: F.adaptive_avg_pool2d(x, 1),
    "upsample2x": lambda p, x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "concat": lambda p, *x: torch.cat(x, 1),
    "add": lambda p, a, b: a + b,
    "mul": lambda p, a, b: a * b,
    "relu": lambda p, x: F.relu(x),
    "silu": lambda p, x: F.silu(x),
    "sigmoid": lambda p, x: torch.sigmoid(x),
    "bce_with_logits": bce,
    "mse": lambda p, a, b: per_image(F.mse_loss(a, b, reduction="none")),
}

CASES = []


def case(op, inputs, constants=(), **params):
    """An input is (name, shape) or (name, shape, low, high); `constants` names those without a gradient."""
    seed = 100 * (len(CASES) + 1)
    described, tensors = [], []
    for i, (name, shape, *bounds) in enumerate(inputs):
        low, high = bounds or (-2.0, 2.0)
        x = torch.from_numpy(numbers(seed + i, shape, low, high))
        x.requires_grad_(name not in constants)
        tensors.append(x)
        described.append({"name": name, "shape": shape, "low": low, "high": high, "gradient": x.requires_grad})
    outputs = OPS[op](params, *map(nchw, tensors))
    outputs = [nhwc(y) for y in (outputs if isinstance(outputs, list) else [outputs])]
    if any(y.requires_grad for y in outputs):
        weights = (numbers(seed + 50 + o, tuple(y.shape), -1.0, 1.0) for o, y in enumerate(outputs))
        sum((y * torch.from_numpy(r)).sum() for y, r in zip(outputs, weights)).backward()
    listed = lambda x: [float(f"{v:.8g}") for v in x.detach().flatten().tolist()]
    CASES.append({
        "op": op,
        "params": params,
        "seed": seed,
        "inputs": described,
        "outputs": [listed(y) for y in outputs],
        "gradients": [None if x.grad is None else listed(x.grad) for x in tensors],
    })


MAP = (2, 5, 7, 3)
CHANNEL = (1, 1, 1, 3)
IMAGE = (2, 1, 1, 3)

case("conv2d", [("x", MAP), ("w", (4, 3, 3, 3))], stride=[1, 1], padding=[1, 1])
case("conv2d", [("x", (1, 9, 8, 2)), ("w", (3, 5, 4, 2))], stride=[2, 1], padding=[2, 0])
case("conv2d", [("x", MAP), ("w", (5, 1, 1, 3))], stride=[2, 3], padding=[0, 0])
case("linear", [("x", (3, 1, 1, 7)), ("w", (2, 1, 1, 7))])
case("bias_add", [("x", MAP), ("b", CHANNEL)])
for activation in ACTIVATIONS:
    affine = [("gamma", CHANNEL, 0.5, 1.5), ("beta", CHANNEL)]
    statistics = [("mean", CHANNEL, -0.5, 0.5), ("var", CHANNEL, 0.5, 2.0)]
    settings = {"eps": 1e-3, "activation": activation}
    case("batch_norm", [("x", MAP), *affine], **settings)
    case("normalize", [("x", MAP), *affine, *statistics], ["mean", "var"], **settings)
    affine = [("gamma", (1, 1, 1, 6), 0.5, 1.5), ("beta", (1, 1, 1, 6))]
    case("group_norm", [("x", (2, 3, 5, 6)), *affine], groups=3, **settings)
case("running_statistics", [("x", MAP)], ["x"], momentum=0.1)
case("max_pool2d", [("x", MAP)], kernel=[2, 2], stride=[2, 2], padding=[0, 0])
case("max_pool2d", [("x", MAP)], kernel=[3, 2], stride=[2, 1], padding=[1, 1])
case("avg_pool2d", [("x", MAP)], kernel=[2, 2], stride=[2, 2], padding=[0, 0])
case("avg_pool2d", [("x", MAP)], kernel=[3, 2], stride=[2, 1], padding=[1, 1])
case("global_avg_pool", [("x", MAP)])
case("upsample2x", [("x", MAP)])
case("concat", [("a", MAP), ("b", (2, 5, 7, 1)), ("c", (2, 5, 7, 2))])
for b in [MAP, CHANNEL, IMAGE]:
    case("add", [("a", MAP), ("b", b)])
    case("mul", [("a", MAP), ("b", b)])
case("relu", [("x", MAP)])
case("silu", [("x", MAP, -8.0, 8.0)])
case("sigmoid", [("x", MAP, -8.0, 8.0)])
case("bce_with_logits", [("z", MAP, -8.0, 8.0), ("g", MAP, 0.0, 1.0)], ["g"])
case("mse", [("a", MAP), ("b", MAP)])

lines = ",\n".join(json.dumps(c, separators=(",", ":")) for c in CASES)
Path(__file__).with_name("ops.json").write_text(f"[\n{lines}\n]\n")
