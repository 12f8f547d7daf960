"""Scoring and training of ResNet-18 (tiny: one convolution): plain, weighted, in bf16, with channels last, compiled.

In: random images. Out: images per second. Next: `language.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from flow_lightning.method.losses import cross_entropy
from tests.benchmarks.gpu.rows import Row, passes, row, skipped, timed


def vision(device: str, tiny: bool) -> list[Row]:
    """Measure each way to run it."""
    rows = _measured("fp32", device, tiny) + _measured("bf16", device, tiny, half=True)
    rows += _measured("bf16, channels_last", device, tiny, half=True, channels_last=True)
    if tiny:
        return [*rows, skipped("bf16, channels_last, compiled", "compiling takes longer than the tiny mode")]
    return rows + _measured("bf16, channels_last, compiled", device, tiny, half=True, channels_last=True, compiled=True)


def _measured(
    name: str, device: str, tiny: bool, half: bool = False, channels_last: bool = False, compiled: bool = False
) -> list[Row]:
    shape = (2, 3, 32, 32) if tiny else (256, 3, 224, 224)
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    model: Any = (small if tiny else resnet18(num_classes=10)).to(device)
    images, targets = torch.randn(shape, device=device), torch.arange(shape[0], device=device) % 10
    weights, optimizer = torch.rand(shape[0], device=device), torch.optim.SGD(model.parameters(), 0.01)
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    run = torch.compile(model) if compiled else model

    def losses() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return cross_entropy(run(images), targets)

    seconds = {}
    for what, each in passes(losses, optimizer, weights).items():
        model.train(what != "scoring")
        seconds[what] = timed(each, device, tiny)
    return [row(f"{what}, {name}", shape[0] / each, "images/s") for what, each in seconds.items()]
