"""The processor time of a weighted step of a module that knows nothing of FLOW, against its own step, in turn in a fit.

    python -m tests.benchmarks.unchanged_step [--steps 200] [--devices 2] [--compiled true] [--network Language]
    python -m tests.benchmarks.unchanged_step --memory true [--network LanguageSmall] [--steps 3]

A step is the look-up of its weights, `training_step`, backward pass and optimizer. The first ten are left out. A
weighted step is compared with the mean of the plain steps before and after it, so that a drift cancels. It is the time
of the processor, not the clock's, as other programs disturb that less. With `memory` it is instead the peak of memory
of whole fits, plain and weighted, each in a process of its own.
"""

import statistics
import time
from typing import Any, Literal

import timm
import torch
from jsonargparse import auto_cli
from lightning import LightningModule
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import flow_lightning as fl
from tests.benchmarks.measure import apart
from tests.benchmarks.measure import memory as memory_of
from tests.examples import make_trainer


class Network(LightningModule):
    """ResNet-18 on small random images."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("resnet18", num_classes=10)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Language(Network):
    """GPT-2 with four layers on random tokens; the loss is made inside of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_layer=4, n_embd=128, n_head=4, n_positions=64))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss


class LanguageSmall(Language):
    """GPT-2 in its published size of 12 layers and 124 million parameters, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(GPT2Config())


_FOLDER = "runs/benchmark_unchanged_step"
NETWORKS = {each.__name__: each for each in (Network, Language, LanguageSmall)}


class Alternate(fl.FlowWeightingCallback):
    """Weighs every other step, and times each."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.steps = [type(pl_module).training_step.__get__(pl_module), vars(pl_module)["training_step"]]
        self.seconds: list[list[float]] = [[], []]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        before = time.process_time()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        vars(pl_module)["training_step"] = self.steps[batch_idx % 2]
        self.started = before if batch_idx % 2 else time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds[batch_idx % 2].append(time.process_time() - self.started)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the median ratio of neighbours, and its quartiles, in the process that has them."""
        if trainer.is_global_zero:
            plain, weighted = (seconds[5:] for seconds in self.seconds)
            ratios = [2 * w / (before + after) for before, w, after in zip(plain, weighted, plain[1:])]
            low, middle, high = statistics.quantiles(ratios, n=4)
            milliseconds = 1000 * statistics.median(plain)
            extra = 1000 * statistics.median(w - p for p, w in zip(plain, weighted))
            print(
                f"{middle:.4f} of {milliseconds:.0f} ms, quartiles {low:.3f} to {high:.3f}, {len(ratios)} pairs, "
                f"{extra:+.2f} ms",
                flush=True,
            )


def peak_memory(network: str, steps: int, is_weighted: bool) -> float:
    """Fit one network and return the peak of the process's memory, in MB."""
    torch.set_num_threads(1)
    callbacks = [fl.FlowWeightingCallback()] if is_weighted else []
    make_trainer(*callbacks, max_epochs=-1, max_steps=steps, default_root_dir=_FOLDER).fit(
        NETWORKS[network](), _loader(network)
    )
    return memory_of("VmHWM")


def main(
    steps: int = 200,
    devices: int = 1,
    compiled: bool = False,
    network: Literal["Network", "Language", "LanguageSmall"] = "Network",
    memory: bool = False,
) -> None:
    """Fit one network."""
    if memory:
        plain, weighted = (apart(peak_memory, network, steps, is_weighted) for is_weighted in (False, True))
        print(f"{network}: peak of a plain fit {plain:,.0f} MB, of a weighted one {weighted:,.0f} MB")
        return
    how = f"{network}, {devices} process(es), {'compiled' if compiled else 'eager'}: "
    print(how, end="", flush=True)
    torch.set_num_threads(1)
    module = NETWORKS[network]()
    if compiled:
        module.model.compile()
    settings: dict[str, Any] = {"strategy": "ddp_fork", "devices": devices} if devices > 1 else {}
    make_trainer(Alternate(), max_epochs=-1, max_steps=2 * steps, default_root_dir=_FOLDER, **settings).fit(
        module, _loader(network)
    )


def _loader(network: str) -> DataLoader[Any]:
    if network == "Network":
        return DataLoader(TensorDataset(torch.randn(640, 3, 64, 64), torch.randint(10, (640,))), 16)
    if network == "Language":
        return DataLoader(TensorDataset(torch.randint(500, (640, 64))), 8)
    return DataLoader(TensorDataset(torch.randint(50_257, (64, 128))), 2)


if __name__ == "__main__":
    auto_cli(main)
