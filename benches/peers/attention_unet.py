"""The network of the preset efficientnet-b1 in PyTorch, for benchmarks: torchvision's EfficientNet-B1 as encoder, a
U-Net decoder with attention gates (src/nn/attention_unet.rs)."""

import torch
import torchvision
from torch import nn
from torch.nn import functional as F


def block(c, width):
    layers = []
    for _ in range(2):
        layers += [nn.Conv2d(c, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        c = width
    return nn.Sequential(*layers)


def up(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Gate(nn.Module):
    """x times one value per pixel, from x and the features g of half its resolution."""

    def __init__(self, c, below):
        super().__init__()
        self.x = nn.Conv2d(c, c // 2, 1, bias=False)
        self.g = nn.Conv2d(below, c // 2, 1)
        self.psi = nn.Conv2d(c // 2, 1, 1)

    def forward(self, x, g):
        joint = self.x(x) + up(self.g(g))
        return x * torch.sigmoid(self.psi(F.relu(joint, inplace=True)))


class AttentionUNet(nn.Module):
    SKIPS = [16, 24, 40, 112]

    def __init__(self, widths):
        super().__init__()
        features = torchvision.models.efficientnet_b1().features[:8]
        features[0][0] = nn.Conv2d(1, 32, 3, 2, 1, bias=False)
        self.features = features
        below = [*widths[1:], 320]
        skips = [0, *self.SKIPS]
        self.gates = nn.ModuleList(Gate(c, b) for c, b in zip(self.SKIPS, below[1:]))
        self.decoder = nn.ModuleList(block(s + b, w) for s, b, w in zip(skips, below, widths))
        self.mask = nn.Conv2d(widths[0], 1, 1)
        self.malignancy = nn.Linear(320, 1)

    def forward(self, x):
        maps = []
        for stage, layer in enumerate(self.features):
            if stage in (2, 3, 4, 6):
                maps.append(x)
            x = layer(x)
        malignancy = self.malignancy(F.dropout(x.mean((2, 3)), 0.2, self.training))
        for level in reversed(range(5)):
            y = up(x)
            if level:
                y = torch.cat([self.gates[level - 1](maps[level - 1], x), y], 1)
            x = self.decoder[level](y)
        return self.mask(x), malignancy
