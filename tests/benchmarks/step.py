"""What FLOW adds: forward passes of scoring, and the time of a weighted training step, against plain Lightning.

    python tests/benchmarks/step.py [--accelerator gpu --precision bf16-mixed --model resnet50 --size 224 --batch 128]

Plain and weighted fits alternate in short rounds within one process; the ratio is taken round by round. The images are
random: only time is measured.
"""

import argparse
import statistics
import time
import timeit
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Dataset

import flow_lightning as fl


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


class StepTimes(Callback):
    """Time every training step, from the start of one to the start of the next."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def median(self) -> float:
        steps = [later - earlier for earlier, later in zip(self.marks, self.marks[1:])]
        return statistics.median(steps[2:])


class CountForwards(Callback):
    """Count the images that pass the model before training."""

    images = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.model.register_forward_pre_hook(lambda module, inputs: self.count(len(inputs[0])))

    def count(self, images: int) -> None:
        self.images += images

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before_training = self.images


def fit(flow: bool, a: argparse.Namespace) -> tuple[float, int, float]:
    seed_everything(0, verbose=False)
    module = fl.ImageClassificationModule(a.model, 10, pretrained=False, learning_rate=1e-4)
    times, counter = StepTimes(), CountForwards()
    weighting = fl.FlowWeightingCallback()
    trainer = Trainer(
        accelerator=a.accelerator,
        devices=1,
        precision=a.precision,
        max_epochs=1,
        callbacks=[*([weighting] if flow else []), times, counter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir="runs/benchmark_step",
    )
    started = time.perf_counter()
    trainer.fit(module, datamodule=Data(a.batch * a.steps, a.size, a.batch, a.workers))
    return times.median(), counter.before_training, times.marks[0] - started


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    a = parser.parse_args()
    ratios, n = [], a.batch * a.steps
    for round_ in range(a.rounds):
        order = (False, True) if round_ % 2 else (True, False)
        results = {flow: fit(flow, a) for flow in order}
        ratios.append(results[True][0] / results[False][0])
        scoring = results[True][2] - results[False][2]
        print(
            f"round {round_}: plain {a.batch / results[False][0]:.0f} images/s, "
            f"weighted {a.batch / results[True][0]:.0f} images/s, "
            f"ratio of step times {ratios[-1]:.3f}, scoring {n / scoring:.0f} images/s",
            flush=True,
        )
    print(f"forward passes of scoring: {results[True][1] / n:.2f} per sample")
    print(f"weighted / plain step: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"look-up and weighting alone: {added_microseconds():.0f} microseconds a step")


if __name__ == "__main__":
    main()
