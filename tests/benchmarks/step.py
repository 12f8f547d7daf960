"""What FLOW adds: forward passes of scoring, and the time of a weighted training step, against plain Lightning.

    python -m tests.benchmarks.step [--accelerator gpu --precision bf16-mixed --model resnet50 --size 224 --batch 128]

Weighted and plain steps alternate within one fit, so that a slow minute of the machine hits both alike. The images are
random: only time is measured.
"""

import statistics
import time
import timeit
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning import Callback, LightningDataModule, seed_everything
from scipy.stats import bootstrap
from torch.utils.data import DataLoader, Dataset

import flow_lightning as fl
from flow_lightning.report.metrics import read_metrics
from tests.examples import make_trainer


class RandomImages(Dataset[dict[str, Any]]):
    """`n` views of a few random images that are made once."""

    def __init__(self, n: int, size: int) -> None:
        self.images = torch.randn(16, 3, size, size)
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index % 16], "target": index % 10}


class Data(LightningDataModule):
    def __init__(self, n: int, size: int, batch: int, workers: int) -> None:
        super().__init__()
        self.data, self.batch, self.workers = fl.IndexedDataset(RandomImages(n, size)), batch, workers

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, self.batch, num_workers=self.workers, pin_memory=torch.cuda.is_available())


class Alternate(Callback):
    """Weigh every other step, and time each from its start to the start of the next."""

    def __init__(self, weighting: fl.FlowWeightingCallback) -> None:
        self.weighting = weighting
        self.marks: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pl_module.sample_weights = self.weighting.weights if batch_idx % 2 == 0 else None
        self.marks.append(time.perf_counter())

    def steps(self) -> list[tuple[float, float]]:
        """Return seconds of each weighted step and of the plain one after it, without the first ten."""
        seconds = [later - earlier for earlier, later in zip(self.marks, self.marks[1:])][10:]
        return list(zip(seconds[0::2], seconds[1::2]))


class CountForwards(Callback):
    """Count the images that pass the model before training, and time it."""

    images = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.model.register_forward_pre_hook(lambda module, inputs: self.count(len(inputs[0])))

    def count(self, images: int) -> None:
        self.images += images

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before_training = self.images


def ratio(steps: list[tuple[float, float]]) -> float:
    """Return the median time of the weighted steps over that of the plain ones."""
    return statistics.median(weighted for weighted, _ in steps) / statistics.median(plain for _, plain in steps)


def interval(steps: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the ratio, pairs of neighbours drawn with replacement."""
    settings = {"paired": True, "vectorized": False, "n_resamples": 2000, "method": "percentile", "rng": 0}
    return bootstrap(list(zip(*steps)), lambda *columns: ratio(list(zip(*columns))), **settings).confidence_interval


def fit(
    model: str, size: int, batch: int, steps: int, workers: int, **settings: str
) -> tuple[list[tuple[float, float]], float, float]:
    """Return the times of the steps, and forward passes and seconds of scoring per sample."""
    seed_everything(0, verbose=False)
    module = fl.ImageClassificationModule(model, 10, pretrained=False, learning_rate=1e-4)
    weighting, n = fl.FlowWeightingCallback(), batch * steps
    times, counter = Alternate(weighting), CountForwards()
    trainer = make_trainer(weighting, times, counter, default_root_dir="runs/benchmark_step", **settings)
    trainer.fit(module, datamodule=Data(n, size, batch, workers))
    scoring = read_metrics("runs/benchmark_step/metrics.json")["time/scoring_s"]
    return times.steps(), counter.before_training / n, scoring / n


def added_microseconds() -> float:
    """Time what the weights add to a step on their own: look-up among a million, product, and their backward pass."""
    module, batch = fl.WeightedLossModule(), {"index": torch.randint(0, 1_000_000, (64,))}
    weights = fl.SampleWeights.from_losses(torch.rand(1_000_000) + 0.01)

    def step() -> None:
        module.weighted_loss(batch, torch.rand(64, requires_grad=True)).backward()

    medians = []
    for module.sample_weights in (None, weights):
        medians.append(statistics.median(timeit.repeat(step, number=500, repeat=9)) / 500 * 1e6)
    return medians[1] - medians[0]


def main(
    model: str = "resnet18",
    size: int = 64,
    batch: int = 32,
    steps: int = 300,
    workers: int = 0,
    accelerator: str = "cpu",
    precision: str = "32-true",
) -> None:
    """Time weighted and plain steps in alternation, and scoring."""
    times, forwards, scoring = fit(model, size, batch, steps, workers, accelerator=accelerator, precision=precision)
    for name, column in zip(("weighted", "plain"), zip(*times)):
        print(f"{name}: {batch / statistics.median(column):.1f} images/s (median of {len(times)} steps)")
    print(f"scoring: {1 / scoring:.1f} images/s, {forwards:.2f} forward passes per sample")
    low, high = interval(times)
    print(f"weighted / plain step: {ratio(times):.4f} (95 % interval {low:.4f} to {high:.4f})")
    print(f"look-up and weighting alone: {added_microseconds():.0f} microseconds a step")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
