"""A training step against PyTorch (eager, channels_last), in one interleaved run.

    cargo bench --bench training_step --no-run
    python benches/peers/training_step.py target/release/deps/training_step-<hash> [rounds] [preset size batch widths...]

The presets are `unet` and `efficientnet-b1`.

Same network, loss, clipping and AdamW on both sides, same number of threads; the least and the median of all
rounds count. Peak memory is the resident set above that before the network was built.
"""

import os
import subprocess
import sys
import time

THREADS = os.environ.setdefault("RAYON_NUM_THREADS", "2")
import torch  # noqa: E402  (after the environment is set)
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from attention_unet import AttentionUNet  # noqa: E402

torch.set_num_threads(int(THREADS))


def block(c, width):
    layers = []
    for _ in range(2):
        layers += [nn.Conv2d(c, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        c = width
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.encoder = nn.ModuleList(block(c, w) for c, w in zip([1, *widths], widths))
        self.decoder = nn.ModuleList(block(c + w, w) for c, w in zip(widths[1:], widths))
        self.mask = nn.Conv2d(widths[0], 1, 1)
        self.malignancy = nn.Linear(widths[-1], 1)

    def forward(self, x):
        skips = []
        for level, encoder in enumerate(self.encoder):
            if level:
                skips.append(x)
                x = F.max_pool2d(x, 2)
            x = encoder(x)
        malignancy = self.malignancy(F.dropout(x.mean((2, 3)), 0.2, self.training))
        for skip, decoder in zip(reversed(skips), reversed(self.decoder)):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = decoder(torch.cat([skip, x], 1))
        return self.mask(x), malignancy


def memory(pid, key):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def main():
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    preset, *numbers = sys.argv[3:] or ["unet"]
    size, batch, *widths = [int(x) for x in numbers] or [256, 4, 32, 64, 128, 256, 512]
    widths = widths or [16, 32, 64, 128, 256]

    server = subprocess.Popen([sys.argv[1], "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(*words):
        print(*words, file=server.stdin, flush=True)
        return server.stdout.readline()

    ours_before = memory(server.pid, "VmRSS")
    ask(preset, size, batch, *widths)

    peer_before = memory("self", "VmRSS")
    net = {"unet": UNet, "efficientnet-b1": AttentionUNet}[preset](widths).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, foreach=True)
    x = torch.rand(batch, 1, size, size).contiguous(memory_format=torch.channels_last)
    g = (torch.rand(batch, 1, size, size) > 0.7).float()
    labels = torch.arange(batch).remainder(2).float()[:, None]

    def step():
        z, malignancy = net(x)
        m = torch.sigmoid(z)
        dice = 1 - (2 * (m * g).sum((1, 2, 3)) + 1) / (m.sum((1, 2, 3)) + g.sum((1, 2, 3)) + 1)
        loss = F.binary_cross_entropy_with_logits(z, g) + dice.mean()
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(malignancy, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    step()
    ours, peer = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        peer.append((time.perf_counter() - start) * 1e3)
        ours.append(float(ask(1)))
    peaks = memory(server.pid, "VmHWM") - ours_before, memory("self", "VmHWM") - peer_before

    def median(values):
        return sorted(values)[len(values) // 2]

    print(f"PyTorch {torch.__version__}, {THREADS} threads, {preset} {widths}, {size}², batch {batch}, {rounds} rounds")
    for name, of in [("least", min), ("median", median)]:
        print(f"{name:>8}: ours {of(ours):8.1f} ms, PyTorch {of(peer):8.1f} ms, ratio {of(ours) / of(peer):.2f}")
    print(f"  memory: ours {peaks[0]:8.0f} MiB, PyTorch {peaks[1]:8.0f} MiB, ratio {peaks[0] / peaks[1]:.2f}")


if __name__ == "__main__":
    main()
