"""Scoring and training of ResNet-18 (tiny: one convolution): plain, weighted, in bf16, with channels last, compiled.

In: random images. Out: images per second, and peak memory. Next: `language.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from flow_lightning.method.losses import cross_entropy
from tests.benchmarks.gpu.rows import Row, memory_row, passes, row, skipped, timed


def vision(device: str, tiny: bool) -> Iterator[Row]:
    """Measure each way to run it."""
    yield from _measured("fp32", device, tiny)
    yield from _measured("bf16", device, tiny, half=True)
    yield from _measured("bf16, channels_last", device, tiny, half=True, channels_last=True)
    name = "bf16, channels_last, compiled"
    if tiny:
        yield skipped(name, "compiling takes longer than the tiny mode")
    else:
        yield from _measured(name, device, tiny, half=True, channels_last=True, compiled=True)


def _measured(
    name: str, device: str, tiny: bool, half: bool = False, channels_last: bool = False, compiled: bool = False
) -> Iterator[Row]:
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

    for what, each in passes(losses, optimizer, weights).items():
        model.train(what != "scoring")
        yield row(f"{what}, {name}", shape[0] / timed(each, device, tiny), "images/s")
        yield memory_row(f"{what}, {name}", device)
