"""Fine-tuning an image network by timm's own parts and by this library, whole runs on the same images in turns.

    python -m tests.benchmarks.timm_training [--images FOLDER --model tf_efficientnet_lite0 --size 96 --epochs 20]

timm's training script is no part of its package. So its epochs are put together here as that script does by default:
its data set, loader, transforms, optimizer, schedule and meter. Both resize and flip, in one process, in float32, and
take the same SGD. timm leaves the last batch of an epoch out if it is not full, so times are those of an image. Ours
also scores all images, and solves the head before and after: that is in its total. By default the images are noise that
is made first.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from jsonargparse import auto_cli
from lightning import seed_everything
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter

import flow_lightning as fl
from tests.benchmarks.measure import Clock, spread
from tests.examples import make_trainer

RATE, BATCH, LOG, HALF = 0.003, 64, 50, [0.5, 0.5, 0.5]


def write_noise(folder: Path, per_class: int = 64, classes: int = 10) -> None:
    """Write images of 32 pixels as `train/<class>` and `test/<class>`."""
    draw = np.random.default_rng(0)
    for split, count in (("train", per_class), ("test", 1)):
        for label in range(classes):
            (place := folder / split / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")


def timm_run(images: Path, model: str, size: int, epochs: int, channels_last: bool) -> dict[str, float]:
    """Train by timm's parts; return seconds per image and epoch, of the epochs alone and of all."""
    started = time.perf_counter()
    dataset = create_dataset("", root=str(images), split="train", is_training=True)
    no_crop: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "color_jitter": None}
    settings: dict[str, Any] = {"mean": HALF, "std": HALF, "interpolation": "bilinear", "use_prefetcher": False}
    settings |= {"num_workers": 0, "persistent_workers": False, "pin_memory": False, "device": torch.device("cpu")}
    loader = create_loader(dataset, (3, size, size), BATCH, is_training=True, **no_crop, **settings)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = timm.create_model(model, num_classes=len(dataset.reader.class_to_idx)).to(memory_format=layout)
    optimizer = create_optimizer_v2(
        network, "momentum", lr=RATE, weight_decay=5e-4, momentum=0.9, filter_bias_and_bn=False
    )
    schedule, _ = create_scheduler_v2(optimizer, "cosine", epochs, warmup_epochs=0, updates_per_epoch=len(loader))
    loss_of, meter, updates, seen = torch.nn.CrossEntropyLoss(), AverageMeter(), 0, 0
    training = time.perf_counter()
    for epoch in range(epochs):
        network.train()
        for batch, (pixels, targets) in enumerate(loader):
            loss = loss_of(network(pixels.contiguous(memory_format=layout)), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            updates, seen = updates + 1, seen + len(pixels)
            if batch % LOG == 0:
                meter.update(loss.item(), len(pixels))
            schedule.step_update(updates, metric=meter.avg)
        schedule.step(epoch + 1)
    ended = time.perf_counter()
    return {"training": (ended - training) / seen, "total": (ended - started) / seen}


def our_run(images: Path, model: str, size: int, epochs: int, weighted: bool, **settings: Any) -> dict[str, float]:
    """Fit by this library; return seconds per image and epoch, of the epochs alone and of all."""
    started, clock = time.perf_counter(), Clock()
    data = {"image_size": size, "batch_size": BATCH, "num_workers": 0, "mean": HALF, "std": HALF}
    module = fl.ImageDataModule("folder", images, transforms="resize_flip", validation_fraction=0, **data)
    network = fl.ImageClassificationModule(model, module.num_classes, pretrained=False, learning_rate=RATE, **settings)
    flow = [fl.LinearProbeCallback(), fl.FlowWeightingCallback()] if weighted else []
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_epochs": epochs, "limit_val_batches": 0, "default_root_dir": folder}
        make_trainer(clock, *flow, **options).fit(network, datamodule=module)
    seen = epochs * len(module.train_set)
    return {"training": clock.seconds / seen, "total": (time.perf_counter() - started) / seen}


def main(
    images: Path | None = None, model: str = "tf_efficientnet_lite0", size: int = 96, epochs: int = 3, rounds: int = 3
) -> None:
    """Run all in turns; `images` holds `train/<class>` and `test/<class>`. The networks' weights are random."""
    with tempfile.TemporaryDirectory() as folder:
        if images is None:
            write_noise(images := Path(folder))
        given = (images, model, size, epochs)
        runs = {
            "timm": lambda: timm_run(*given, channels_last=False),
            "timm, channels_last": lambda: timm_run(*given, channels_last=True),
            "ours, plain": lambda: our_run(*given, weighted=False, batch_norm="train"),
            "ours, weighted": lambda: our_run(*given, weighted=True, batch_norm="train"),
            "ours, weighted, frozen BatchNorm": lambda: our_run(*given, weighted=True),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for round_ in range(rounds):
            order = [*runs][round_ % len(runs) :] + [*runs][: round_ % len(runs)]
            for name in order:
                seed_everything(round_, verbose=False)
                found[name].append(runs[name]())
    print("| | training, timm's time over it | total, timm's time over it | ms of training |")
    print("|---|---:|---:|---:|")
    for name, ours in found.items():
        faster = (spread([a[part] / b[part] for a, b in zip(found["timm"], ours)]) for part in ("training", "total"))
        print(f"| {name} | {' | '.join(faster)} | {spread([1000 * each['training'] for each in ours], 1)} |")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
