"""Scoring and training of ResNet-18 (tiny: one convolution) in each way, and a whole fit.

In: random images. Out: images per second, and peak memory. Next: `language.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torchvision.models import resnet18

import flow_lightning as fl
from flow_lightning.method.losses import cross_entropy
from tests.benchmarks.gpu.rows import Row, memory_row, passes, row, skipped, timed
from tests.benchmarks.measure import Clock, now
from tests.images import PictureData, tiny_module


def vision(device: str, tiny: bool) -> Iterator[Row]:
    """Measure each way to run it, then a short fit with scoring."""
    torch.backends.cudnn.allow_tf32 = False  # by default convolutions take it for fp32
    yield from _measured("fp32", device, tiny)
    torch.backends.cudnn.allow_tf32 = True
    if device == "cuda":
        yield from _measured("TF32", device, tiny)
    yield from _measured("bf16", device, tiny, half=True)
    yield from _measured("bf16, channels_last", device, tiny, half=True, channels_last=True)
    name = "bf16, channels_last, compiled"
    if tiny:
        yield skipped(name, "compiling takes longer than the tiny mode")
    else:
        yield from _measured(name, device, tiny, half=True, channels_last=True, compiled=True)
    yield from _recipe(device, tiny)


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


def _recipe(device: str, tiny: bool) -> Iterator[Row]:
    """Time a fit of five epochs with its probe, weights and solved head, in bf16 on a GPU."""
    samples, size, epochs = (30, 32, 1) if tiny else (1024, 224, 5)
    module = tiny_module() if tiny else tiny_module("resnet18")
    clock, quiet = Clock(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [clock, fl.LinearProbeCallback(), fl.FlowWeightingCallback()]
    precision = "32-true" if device == "cpu" else "bf16-mixed"
    settings: dict[str, Any] = {"accelerator": device, "devices": 1, "precision": precision, **quiet}
    trainer = Trainer(max_epochs=epochs, enable_model_summary=False, callbacks=callbacks, **settings)
    started = now()
    trainer.fit(module, PictureData(samples, size, batch_size=8 if tiny else 128))
    after = now() - started - clock.before - clock.seconds
    yield row("recipe: training", epochs * samples / clock.seconds, "images/s")
    yield row("recipe: probe and scoring, of an epoch", epochs * clock.before / clock.seconds, "share")
    yield row("recipe: solved head, of an epoch", epochs * after / clock.seconds, "share")
