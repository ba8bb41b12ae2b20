"""Writes letterbox.json: what Pillow makes of small images, letterboxed, and PyTorch of the way back.

The images are given by a formula, so that only results are stored: pixel (x, y) = (7x + 13y + 3xy) mod 256.
"""

import json
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image


def image(width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return ((7 * x + 13 * y + 3 * x * y) % 256).astype(np.uint8)


def letterbox(img, size):
    scale = size / max(img.size)
    content = tuple(max(1, int(np.floor(side * scale + 0.5))) for side in img.size)
    left, top = ((size - side) // 2 for side in content)
    square = Image.new(img.mode, (size, size))
    square.paste(img.resize(content, Image.Resampling.BILINEAR), (left, top))
    return np.asarray(square), (left, top, *content)


cases = []
for width, height, size in [(37, 23, 16), (23, 40, 16), (7, 5, 16), (3, 64, 12), (16, 16, 16)]:
    pixels = image(width, height)
    unit = Image.fromarray(pixels.astype(np.float32) / np.float32(255))
    square, (left, top, w, h) = letterbox(unit, size)
    bytes_, _ = letterbox(Image.fromarray(pixels), size)
    content = torch.from_numpy(square[top : top + h, left : left + w].copy())[None, None]
    back = torch.nn.functional.interpolate(
        content, size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )
    cases.append(
        {
            "width": width,
            "height": height,
            "size": size,
            "content": [left, top, w, h],
            "square": [round(float(v), 7) for v in square.ravel()],
            "bytes": bytes_.ravel().tolist(),
            "back": [round(float(v), 6) for v in back.numpy().ravel()],
        }
    )

out = {"pillow": PIL.__version__, "torch": torch.__version__, "cases": cases}
Path(__file__).with_name("letterbox.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
