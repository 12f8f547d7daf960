"""Ten million samples over two processes: what gathering losses, median and weights take, and a resumed start.

    python -m tests.benchmarks.scale weights
    python -m tests.benchmarks.scale resume
    python -m tests.benchmarks.scale order --samples 100000000
    python -m tests.benchmarks.scale workers

It prints seconds, and the memory of a process above what it had before.
"""

import os
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from jsonargparse import auto_cli
from lightning import Callback, LightningModule
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.distributed import gather
from flow_lightning.resume import ResumableSampler
from flow_lightning.run import RunCallback
from tests.benchmarks.measure import in_turn, measured, spread
from tests.examples import make_trainer
from tests.processes import launch


class Gather(Callback):
    """Gathers what each rank has, block by block, and makes weights of it."""

    def __init__(self, samples: int, block: int) -> None:
        self.samples, self.block = samples, block

    def on_fit_start(self, trainer, pl_module: LightningModule) -> None:
        mine = torch.rand(self.samples // trainer.world_size)
        gather(trainer, [(torch.zeros(1, dtype=torch.long), torch.zeros(1))])  # connect
        (gathered, weights), seconds, peak = measured(self.weigh, trainer, mine)
        if trainer.is_global_zero:
            kept = (weights.losses.nbytes + weights.weights.nbytes) / 1e6
            print(
                f"{self.samples:,} samples, {trainer.world_size} processes: gather {gathered:.2f} s, in all "
                f"{seconds:.2f} s; peak {peak:.0f} MB, of which {kept:.0f} MB stay"
            )

    def weigh(self, trainer, mine: torch.Tensor) -> tuple[float, fl.SampleWeights]:
        """Return the seconds of gathering, and the weights."""
        started, losses = time.perf_counter(), torch.zeros(self.samples)
        for start in range(0, len(mine), self.block):
            index = torch.arange(start, min(start + self.block, len(mine))) * trainer.world_size + trainer.global_rank
            index, values = gather(trainer, [(index, mine[start : start + self.block])])
            losses[index] = values
        return time.perf_counter() - started, fl.SampleWeights.from_losses(losses)


def gather_on_each(samples: int, block: int) -> None:
    make_trainer(Gather(samples, block), devices=2, strategy="ddp", max_epochs=0).fit(Tiny(1000))


def weights(samples: int = 10_000_000, block: int = 100_000) -> None:
    """Gather losses that are there already, in blocks per rank as scoring does, and compute temperature and weights."""
    launch(gather_on_each, samples, block)


class Tiny(fl.WeightedLossModule):
    def __init__(self, samples: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 1)
        self.samples = samples

    def sample_losses(self, batch):
        return (self.linear(batch["x"]).squeeze(1) - 1).square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(self.samples), batch_size=1000)


class Samples(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return {"x": torch.full((4,), index % 7.0), "index": index}


class GivenLosses(RunCallback):
    """Puts losses in place of scoring: which ones does not matter here."""

    def __init__(self, losses: torch.Tensor) -> None:
        self.losses = losses

    def on_fit_start(self, trainer, pl_module: LightningModule) -> None:
        self.run.scoring._result = {"losses": self.losses}


class FirstBatch(Callback):
    def on_train_batch_start(self, trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        self.seconds = time.perf_counter() - self.started
        trainer.should_stop = True


def start_of_fit(callbacks: list[Callback], checkpoint: str, samples: int) -> float:
    first = FirstBatch()
    trainer = make_trainer(*callbacks, first, max_epochs=-1, limit_train_batches=2, min_steps=0)
    first.started = time.perf_counter()
    trainer.fit(Tiny(samples), ckpt_path=checkpoint)
    return first.seconds


def resume(samples: int = 10_000_000, rounds: int = 4) -> None:
    """Time a resumed fit from its beginning to its first batch, with and without the callback, in alternation."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, flow in (("plain", []), ("flow", [GivenLosses(torch.rand(samples)), fl.FlowWeightingCallback()])):
            trainer = make_trainer(*flow, max_steps=1, limit_train_batches=1)
            trainer.fit(Tiny(samples))
            trainer.save_checkpoint(f"{name}.ckpt")
            print(f"{name}: checkpoint of {Path(f'{name}.ckpt').stat().st_size / 1e6:.1f} MB")
        later = []
        for names in in_turn("plain", "flow", rounds):
            callbacks = {"plain": [], "flow": [fl.FlowWeightingCallback()]}
            seconds = {name: start_of_fit(callbacks[name], f"{name}.ckpt", samples) for name in names}
            later.append(seconds["flow"] - seconds["plain"])
        print(f"{samples:,} samples: a resumed fit starts later by {spread(later)} s")


def order(samples: int = 100_000_000, processes: int = 64) -> None:
    """Compute, as one of many processes that has all losses, median, weights and the order of an epoch."""
    torch.set_num_threads(1)
    losses = torch.rand(samples)
    for what, function in (
        ("median and weights", lambda: fl.SampleWeights.from_losses(losses)),
        ("order of an epoch", lambda: list(ResumableSampler(range(samples), processes))),
    ):
        _, seconds, peak = measured(function)
        print(f"{samples:,} samples, {what}: {seconds:.2f} s, peak {peak:.0f} MB", flush=True)


def first_batch(samples: int, method: str) -> None:
    dataset = fl.IndexedDataset(Samples(samples))
    next(iter(DataLoader(dataset, batch_size=32, num_workers=1, multiprocessing_context=method)))


def workers(samples: int = 10_000_000, rounds: int = 4) -> None:
    """Time the first batch of a loader with one worker, for many samples and for a thousand."""
    for method, count in product(("fork", "spawn"), (1000, samples)):
        seconds = [measured(first_batch, count, method)[1] for _ in range(rounds)]
        print(f"{method}, {count:,} samples: first batch after {spread(seconds)} s")


if __name__ == "__main__":
    auto_cli([weights, resume, order, workers], as_positional=False)
