"""The network of a preset on images against PyTorch (eager, channels_last, inference mode), in one interleaved run.

    cargo bench --bench inference --no-run
    python benches/peers/inference.py target/release/deps/inference-<hash> [rounds] [preset size batch]

The same network on both sides with random weights, same number of threads; the least and the median of all rounds
count. A measurement is the least of three runs in a row, after a pause, since the threads of either side go on
spinning for a while when they have nothing to do and would take the other's cores. PyTorch runs the module in evaluation as it is, and as a second peer with its own folding of batch
normalisations into convolutions.
"""

import copy
import os
import subprocess
import sys
import time

PAUSE = 0.3
RUNS = 3
THREADS = os.environ.setdefault("RAYON_NUM_THREADS", "2")
import torch  # noqa: E402  (after the environment is set)
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.utils.fusion import fuse_conv_bn_eval  # noqa: E402

from attention_unet import AttentionUNet  # noqa: E402
from training_step import UNet  # noqa: E402

torch.set_num_threads(int(THREADS))


def folded(net):
    """The network with every convolution that a batch normalisation follows in a Sequential folded with it."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.Sequential):
            names = list(module._modules)
            for first, second in zip(names, names[1:]):
                conv, norm = module[int(first)], module[int(second)]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module[int(first)] = fuse_conv_bn_eval(conv, norm)
                    module[int(second)] = nn.Identity()
    return net


def main():
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 15
    preset, size, batch = sys.argv[3:] or ["efficientnet-b1", "256", "1"]
    widths = [16, 32, 64, 128, 256]

    server = subprocess.Popen([sys.argv[1], "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(*words):
        print(*words, file=server.stdin, flush=True)
        return server.stdout.readline()

    ask(preset, size, batch)
    net = (UNet if preset == "unet" else AttentionUNet)(widths).eval()
    x = torch.rand(int(batch), 1, int(size), int(size))
    kinds = {}
    for name, of in [("PyTorch", net), ("PyTorch, folded", folded(net))]:
        for order in [torch.channels_last, torch.contiguous_format]:
            kinds[f"{name}, {str(order).split('.')[-1]}"] = (
                copy.deepcopy(of).to(memory_format=order),
                x.contiguous(memory_format=order),
            )
    times = {"ours": [], **{name: [] for name in kinds}}
    def run(model, images):
        start = time.perf_counter()
        model(images)
        return (time.perf_counter() - start) * 1e3

    with torch.inference_mode():
        for model, images in kinds.values():
            model(images)
        for _ in range(rounds):
            for name, (model, images) in kinds.items():
                time.sleep(PAUSE)
                times[name].append(min(run(model, images) for _ in range(RUNS)))
            time.sleep(PAUSE)
            times["ours"].append(float(ask(RUNS)))

    def median(values):
        return sorted(values)[len(values) // 2]

    print(f"PyTorch {torch.__version__}, {THREADS} threads, {preset}, {batch} of {size}², {rounds} rounds, ms")
    for name, all in times.items():
        least, middle = min(all), median(all)
        ratios = f"ours / this {min(times['ours']) / least:.2f} {median(times['ours']) / middle:.2f}"
        print(f"{name:>36}: least {least:8.2f}, median {middle:8.2f}, {ratios}")


if __name__ == "__main__":
    main()
