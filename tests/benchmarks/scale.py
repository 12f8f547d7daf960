"""Ten million samples over two processes: what gathering losses, median and weights take, and a resumed start.

    python tests/benchmarks/scale.py weights
    python tests/benchmarks/scale.py resume
    python tests/benchmarks/scale.py order --samples 100000000
    python tests/benchmarks/scale.py workers

`weights` gathers losses that are there already, in blocks as scoring does, and then computes temperature and weights;
it prints seconds and the memory of rank 0 above what it had before. `resume` compares the start of a resumed fit, from
its beginning to its first batch, with and without the callback, in alternation. `order` computes, as one of 64
processes, median, weights and the order of an epoch; `workers` compares the first batch of a loader with one worker for
many samples and for a thousand.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median

import torch
from lightning import Callback, LightningModule
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import flow_lightning as fl  # noqa: E402
from flow_lightning.distributed import gather as gather_values  # noqa: E402
from flow_lightning.resume import ResumableSampler  # noqa: E402
from flow_lightning.run import RunCallback  # noqa: E402
from tests.examples import make_trainer  # noqa: E402
from tests.processes import launch  # noqa: E402


def memory(name: str) -> float:
    """Return VmRSS or VmHWM of this process, in MB of a million bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


class Gather(Callback):
    """Gathers what each rank has, block by block, and makes weights of it."""

    def __init__(self, count: int, block: int) -> None:
        self.count, self.block = count, block

    def on_fit_start(self, trainer, pl_module: LightningModule) -> None:
        rank, world = trainer.global_rank, trainer.world_size
        mine = torch.rand(self.count // world, generator=torch.Generator().manual_seed(rank))
        gather_values(trainer, [(torch.zeros(1, dtype=torch.long), torch.zeros(1))])  # connect
        Path("/proc/self/clear_refs").write_text("5")
        before, started = memory("VmRSS"), time.perf_counter()
        losses = torch.zeros(self.count)
        for start in range(0, len(mine), self.block):
            index = torch.arange(start, min(start + self.block, len(mine))) * world + rank
            index, values = gather_values(trainer, [(index, mine[start : start + self.block])])
            losses[index] = values
        gathered = time.perf_counter() - started
        weights = fl.SampleWeights.from_losses(losses)
        seconds = time.perf_counter() - started
        if trainer.is_global_zero:
            used = memory("VmHWM") - before
            kept = (losses.nbytes + weights.weights.nbytes) / 1e6
            print(
                f"{self.count:,} samples, {world} processes: gather {gathered:.2f} s, median and weights "
                f"{seconds - gathered:.2f} s, in all {seconds:.2f} s; peak {used:.0f} MB, of which {kept:.0f} MB stay"
            )


def gather(count: int, block: int) -> None:
    torch.set_num_threads(1)
    make_trainer(Gather(count, block), devices=2, strategy="ddp", max_epochs=0).fit(Tiny(1000))


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


def start_of_fit(callbacks: list[Callback], checkpoint: str | None, samples: int, limit: int) -> float:
    first = FirstBatch()
    trainer = make_trainer(
        *callbacks, first, enable_checkpointing=False, max_epochs=-1, limit_train_batches=limit, min_steps=0
    )
    first.started = time.perf_counter()
    trainer.fit(Tiny(samples), ckpt_path=checkpoint)
    return first.seconds


def resume(samples: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        losses = torch.rand(samples)
        for name, flow in (("plain", []), ("flow", [GivenLosses(losses), fl.FlowWeightingCallback()])):
            trainer = make_trainer(*flow, max_steps=1, limit_train_batches=1)
            trainer.fit(Tiny(samples))
            trainer.save_checkpoint(f"{name}.ckpt")
            print(f"{name}: checkpoint of {Path(f'{name}.ckpt').stat().st_size / 1e6:.1f} MB")
        found: dict[str, list[float]] = {"plain": [], "flow": []}
        for i in range(rounds):
            for name in ("plain", "flow") if i % 2 else ("flow", "plain"):
                callbacks = [fl.FlowWeightingCallback()] if name == "flow" else []
                found[name].append(start_of_fit(callbacks, f"{name}.ckpt", samples, 2))
        later = [flow - plain for flow, plain in zip(found["flow"], found["plain"])]
        print(json.dumps({name: [round(value, 3) for value in values] for name, values in found.items()}))
        print(f"{samples:,} samples: a resumed fit starts later by {sorted(later)[len(later) // 2]:.2f} s "
              f"({min(later):.2f} to {max(later):.2f})")  # fmt: skip


def alone(count: int, processes: int = 64) -> None:
    """What each rank does by itself, once it has all losses."""
    torch.set_num_threads(1)
    losses = torch.rand(count)
    for what, function in (
        ("median and weights", lambda: fl.SampleWeights.from_losses(losses)),
        ("order of an epoch", lambda: list(ResumableSampler(range(count), processes))),
    ):
        Path("/proc/self/clear_refs").write_text("5")
        before, started = memory("VmRSS"), time.perf_counter()
        kept = function()
        seconds = time.perf_counter() - started
        print(f"{count:,} samples, {what}: {seconds:.2f} s, peak {memory('VmHWM') - before:.0f} MB", flush=True)
        del kept


def workers(count: int, rounds: int) -> None:
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for method, samples in product(("fork", "spawn"), (1000, count)):
            dataset = fl.IndexedDataset(Samples(samples))
            loader = DataLoader(dataset, batch_size=32, num_workers=1, multiprocessing_context=method)
            started = time.perf_counter()
            next(iter(loader))
            found.setdefault((method, samples), []).append(time.perf_counter() - started)
    for (method, samples), seconds in found.items():
        print(f"{method}, {samples:,} samples: first batch after {median(seconds):.2f} s "
              f"({min(seconds):.2f} to {max(seconds):.2f})")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["weights", "resume", "order", "workers"])
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--block", type=int, default=100_000, help="samples per rank and block")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    if args.what == "weights":
        launch(gather, args.samples, args.block)
    elif args.what == "resume":
        resume(args.samples, args.rounds)
    elif args.what == "order":
        alone(args.samples)
    else:
        workers(args.samples, args.rounds)
