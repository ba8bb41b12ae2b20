"""Writes efficientnet.json, torchvision's EfficientNet-B1 on formula weights, for tests/network.rs.

    pip install torch torchvision numpy
    python tests/goldens/make_network.py

Weights and images come from an integer hash keyed by their names, which the test computes too. PyTorch computes
in f64. Kept are some elements of the last feature map, in evaluation and in training (without stochastic depth), of
the last map of each resolution in evaluation, and for the gradient of every parameter its norm and its product with a tensor of hashed numbers.
"""

import json
import math
from pathlib import Path

import torch
import torchvision

from make_ops import nchw, nhwc, numbers

IMAGES = (2, 64, 64, 3)
EVERY = 97
# The last modules of each resolution, the head left out.
MAPS = [1, 2, 3, 5, 7]


def named(name, shape, low, high):
    key = 0x811C9DC5
    for byte in name.encode():
        key = (key ^ byte) * 0x01000193 & 0xFFFFFFFF
    return torch.from_numpy(numbers(key, shape, low, high))


def crate(x):
    """The order of the crate: convolution weights out-kh-kw-in, everything else as it is."""
    return nhwc(x) if x.dim() == 4 else x


def start(name, value):
    shape = crate(value).shape
    if value.dim() == 4:
        limit = math.sqrt(6 / math.prod(shape[1:]))
        return nchw(named(name, shape, -limit, limit))
    low, high = {"weight": (0.5, 1.5), "running_var": (0.5, 1.5)}.get(name.split(".")[-1], (-0.5, 0.5))
    return named(name, shape, low, high)


def sample(x):
    return [float(f"{v:.12g}") for v in nhwc(x).flatten()[::EVERY].tolist()]


def main():
    torch.set_num_threads(1)
    model = torchvision.models.efficientnet_b1(stochastic_depth_prob=0.0).features.double()
    state = {"features." + k: v for k, v in model.state_dict().items() if v.dim() > 0}
    for name, value in state.items():
        value.copy_(start(name, value))
    images = nchw(named("images", IMAGES, 0.0, 1.0))
    maps, x = [], images
    with torch.no_grad():
        for i, module in enumerate(model.eval()):
            x = module(x)
            maps += [sample(x)] if i in MAPS else []
    evaluation = model.eval()(images)
    training = model.train()(images)
    training.backward(nchw(named("gradient", nhwc(training).shape, -1.0, 1.0)))
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = crate(parameter.grad)
        probe = named("probe.features." + name, gradient.shape, -1.0, 1.0)
        kept = [gradient.norm(), (gradient * probe).sum()]
        gradients["features." + name] = [float(f"{v.item():.12g}") for v in kept]
    golden = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "images": IMAGES,
        "every": EVERY,
        "maps": maps,
        "evaluation": sample(evaluation),
        "training": sample(training),
        "gradients": gradients,
    }
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in golden.items()]
    Path(__file__).with_name("efficientnet.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
