"""A whole training step in PyTorch on a GPU: eager and torch.compile (max-autotune, CUDA graphs), as one JSON document.

    python benches/peers/step_gpu.py [--steps unet:16,unet:64,efficientnet-b1:16,efficientnet-b1:64] [--size 256]
        [--dtype bf16|f32] [--iterations N] [--no-compile]

The networks of echograd's presets (`unet`: U-Net of 16 to 256 channels; `efficientnet-b1`: EfficientNet-B1 encoder, U-Net
decoder with attention gates), channels_last, under AMP in bf16 unless `--dtype f32`; the loss of its consistency arm as in
features_gpu.py, in f32; clipping by norm, fused AdamW, moving averages of the weights: what one step of `echograd profile
--step` does. Images and masks stay on the GPU.

Times are between CUDA events, the median of `--iterations` steps after a warm-up, while the host runs ahead. Memory is
the most that was allocated and reserved in the timed steps, weights and optimizer included, and not what the search for the fastest
algorithms took before. `--device cpu` runs the same without a GPU, with times of the
wall clock: for trying this out.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from features_gpu import BIAS, MEAN, SD, WEIGHT, constants, loss, printed

WIDTHS = (16, 32, 64, 128, 256)
# Expansion, kernel, stride, channels, blocks of EfficientNet-B1's stages.
STAGES = [
    (1, 3, 1, 16, 2),
    (6, 3, 2, 24, 3),
    (6, 5, 2, 40, 3),
    (6, 3, 2, 80, 4),
    (6, 5, 1, 112, 4),
    (6, 5, 2, 192, 5),
    (6, 3, 1, 320, 2),
]
DROPOUT, STOCHASTIC_DEPTH, AVERAGE = 0.2, 0.2, 0.98
WARM_UP = 5


def parse_steps(text):
    try:
        steps = [(name, int(batch)) for name, batch in (word.split(":") for word in text.split(","))]
        if all(name in NETWORKS and batch > 0 for name, batch in steps):
            return steps
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected NETWORK:BATCH,... with networks {', '.join(NETWORKS)}, found {text!r}")


def norm_act(channels, activation):
    layers = [nn.BatchNorm2d(channels)]
    return layers + ([activation(inplace=True)] if activation else [])


def conv(c, width, kernel, activation, stride=1, groups=1):
    layer = nn.Conv2d(c, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, *norm_act(width, activation))


def block(c, width):
    return nn.Sequential(conv(c, width, 3, nn.ReLU), conv(width, width, 3, nn.ReLU))


def upsampled(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Heads(nn.Module):
    def __init__(self, bottom, top):
        super().__init__()
        self.mask, self.malignancy = nn.Conv2d(top, 1, 1), nn.Linear(bottom, 1)

    def classify(self, x):
        return self.malignancy(F.dropout(x.mean((2, 3)), DROPOUT, self.training))[:, 0]


class UNet(Heads):
    def __init__(self, widths=WIDTHS):
        super().__init__(widths[-1], widths[0])
        self.encoder = nn.ModuleList(block(c, w) for c, w in zip([1, *widths], widths))
        self.decoder = nn.ModuleList(block(c + w, w) for c, w in zip(widths[1:], widths))

    def forward(self, x):
        skips = []
        for level, encoder in enumerate(self.encoder):
            if level:
                skips.append(x)
                x = F.max_pool2d(x, 2)
            x = encoder(x)
        malignancy = self.classify(x)
        for skip, decoder in zip(reversed(skips), reversed(self.decoder)):
            x = decoder(torch.cat([skip, upsampled(x)], 1))
        return self.mask(x)[:, 0], malignancy


class Inverted(nn.Module):
    """An inverted residual block with squeeze-and-excite and stochastic depth."""

    def __init__(self, c, expansion, kernel, stride, channels, drop):
        super().__init__()
        inner, squeezed = c * expansion, max(1, c // 4)
        self.expand = conv(c, inner, 1, nn.SiLU) if expansion > 1 else nn.Identity()
        self.depthwise = conv(inner, inner, kernel, nn.SiLU, stride, inner)
        self.squeeze, self.excite = nn.Conv2d(inner, squeezed, 1), nn.Conv2d(squeezed, inner, 1)
        self.project = conv(inner, channels, 1, None)
        self.residual, self.drop = stride == 1 and c == channels, drop

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True))))
        y = self.project(y * torch.sigmoid(gate))
        if not self.residual:
            return y
        if self.training and self.drop > 0:
            keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop
            y = y * (keep / (1 - self.drop)).to(y.dtype)
        return x + y


class Gate(nn.Module):
    def __init__(self, skip, below):
        super().__init__()
        between = max(1, skip // 2)
        self.x, self.g = nn.Conv2d(skip, between, 1, bias=False), nn.Conv2d(below, between, 1)
        self.psi = nn.Conv2d(between, 1, 1)

    def forward(self, x, g):
        return x * torch.sigmoid(self.psi(F.relu(self.x(x) + upsampled(self.g(g)))))


class AttentionUNet(Heads):
    def __init__(self, widths=WIDTHS, stages=STAGES, stem=32):
        super().__init__(stages[-1][3], widths[0])
        self.stem = conv(1, stem, 3, nn.SiLU, 2)
        self.stages, c, index = nn.ModuleList(), stem, 0
        total = sum(blocks for *_, blocks in stages)
        # Channels of the last map of each resolution; the stages that end one.
        maps, self.ends = [stem], []
        for expansion, kernel, stride, channels, blocks in stages:
            stage = []
            for b in range(blocks):
                drop = STOCHASTIC_DEPTH * index / total
                stage.append(Inverted(c, expansion, kernel, stride if b == 0 else 1, channels, drop))
                c, index = channels, index + 1
            if stride == 2:
                self.ends.append(len(self.stages))
                maps.append(channels)
            maps[-1] = channels
            self.stages.append(nn.Sequential(*stage))
        skips, below = maps[:-1], [*widths[1:], maps[-1]]
        self.gates = nn.ModuleList(Gate(skip, g) for skip, g in zip(skips, below[1:]))
        self.decoder = nn.ModuleList(block(g + skip, w) for g, skip, w in zip(below, [0, *skips], widths))

    def forward(self, x):
        x, maps = self.stem(x), []
        for i, stage in enumerate(self.stages):
            if i in self.ends:
                maps.append(x)
            x = stage(x)
        malignancy = self.classify(x)
        for level in reversed(range(len(self.decoder))):
            up = upsampled(x)
            if level:
                up = torch.cat([self.gates[level - 1](maps[level - 1], x), up], 1)
            x = self.decoder[level](up)
        return self.mask(x)[:, 0], malignancy


NETWORKS = {"unet": UNet, "efficientnet-b1": AttentionUNet}


class Step:
    """One training step with everything on the device."""

    def __init__(self, name, batch, size, dtype, device, compiled):
        torch.manual_seed(0)
        self.device, self.amp = device, dtype == "bf16"
        self.net = NETWORKS[name]().to(device, memory_format=torch.channels_last).train()
        self.prior = [torch.tensor(v, device=device, requires_grad=i < 2) for i, v in enumerate((WEIGHT, BIAS, MEAN, SD))]
        self.learned = [*self.net.parameters(), *self.prior[:2]]
        self.averages = [p.detach().clone() for p in self.learned]
        fused = device == "cuda"
        self.optimizer = torch.optim.AdamW(self.learned, lr=1e-3, weight_decay=0.01, fused=fused)
        self.axis, self.sobel = constants(size, device, torch.float32)
        images = torch.rand(batch, 1, size, size, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        x, y = self.axis[None, None, :], self.axis[None, :, None]
        radius = size * (0.15 + 0.1 * torch.rand(batch, 1, 1, device=device))
        self.masks = (x * x + y * y < radius**2).float()
        self.labels = torch.arange(batch, device=device).remainder(2).float()
        self.forward = torch.compile(self.total, mode="max-autotune") if compiled else self.total

    def total(self, images, masks, labels):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            z, malignancy = self.net(images)
        weight, bias, mean, sd = self.prior
        return loss(z.float(), masks, malignancy.float(), weight, bias, mean, sd, labels, self.axis, self.sobel)

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        total = self.forward(self.images, self.masks, self.labels)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.prior[0].clamp_(min=0)
            torch._foreach_lerp_(self.averages, self.learned, 1 - AVERAGE)
        return total.detach()


def measure(name, batch, args, compiled):
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    torch.compiler.reset()
    step = Step(name, batch, args.size, args.dtype, args.device, compiled)
    first = step().item()
    for _ in range(min(WARM_UP, args.iterations)):
        step()
    if cuda:
        # What cuDNN and torch.compile tried out is no need of the network.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(args.iterations + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            last = step()
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(events, events[1:])]
    else:
        times = []
        for _ in range(args.iterations):
            start = time.perf_counter()
            last = step()
            times.append((time.perf_counter() - start) * 1e3)
    row = {
        "ms": statistics.median(times),
        "first_loss": first,
        "last_loss": last.item(),
        "parameters": sum(p.numel() for p in step.net.parameters()),
    }
    if cuda:
        row["allocated_bytes"] = torch.cuda.max_memory_allocated()
        row["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    steps = "unet:16,unet:64,efficientnet-b1:16,efficientnet-b1:64"
    parser.add_argument("--steps", type=parse_steps, default=steps, metavar="NETWORK:BATCH,...")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if args.iterations < 1:
        parser.error(f"--iterations: expected at least 1, found {args.iterations}")
    if args.size % 32:
        parser.error(f"--size: expected a multiple of 32, found {args.size}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch finds no GPU", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows, errors = [], []
    document = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "device": torch.cuda.get_device_name(0) if args.device == "cuda" else "cpu",
        "iterations": args.iterations,
        "steps": rows,
        "errors": errors,
    }
    with printed(document):
        for name, batch in args.steps:
            row = {"network": name, "batch": batch, "size": args.size, "dtype": args.dtype}
            rows.append(row)
            for variant in ["eager"] if args.no_compile else ["eager", "compile"]:
                try:
                    row[variant] = measure(name, batch, args, variant == "compile")
                except Exception as error:  # One that does not compile or fit must not cost the others.
                    errors.append(f"{name}, batch {batch}, {variant}: {type(error).__name__}: {str(error)[:300]}")
                    continue
                if not row[variant]["last_loss"] < row[variant]["first_loss"]:
                    errors.append(f"{name}, batch {batch}, {variant}: the loss does not fall: {row[variant]}")
            print(json.dumps(row), file=sys.stderr, flush=True)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
