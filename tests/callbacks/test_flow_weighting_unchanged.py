"""What other people's fits have beside: each with the callback equals the same fit with the weights by hand."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import flow_lightning as fl
from flow_lightning.method.probe import fit_probe
from tests.examples import slow
from tests.processes import launch
from tests.unchanged import Classifier, data, fit, weights

DATA = data()


class Validated(Classifier):
    """A validation, too."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class ByHand(Validated):
    """The same module, whose batches carry their weights."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, weights = batch
        loss = (weights * F.cross_entropy(self.net(x), y, reduction="none")).mean()
        self.log("train/loss", loss)
        return loss


#: Callbacks by what makes them, and flags of the Trainer.
CALLBACKS: dict[str, Any] = {
    "SWA": lambda: of_lightning.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    "EarlyStopping": lambda: of_lightning.EarlyStopping("val/loss", patience=0),
    "GradientAccumulationScheduler": lambda: of_lightning.GradientAccumulationScheduler({0: 1, 1: 2}),
    "BackboneFinetuning": lambda: of_lightning.BackboneFinetuning(unfreeze_backbone_at_epoch=1),
    "ModelPruning": lambda: of_lightning.ModelPruning("l1_unstructured", amount=0.2),
    "Timer": of_lightning.Timer,
    "WeightAveraging": of_lightning.WeightAveraging,
    "EMAWeightAveraging": lambda: of_lightning.EMAWeightAveraging(decay=0.9),
    "ThroughputMonitor": lambda: of_lightning.ThroughputMonitor(lambda batch: len(batch[0]), window_size=2),
    "LearningRateMonitor": of_lightning.LearningRateMonitor,
    "RichProgressBar": of_lightning.RichProgressBar,
    "OnExceptionCheckpoint": lambda: of_lightning.OnExceptionCheckpoint("."),
    "LearningRateFinder": lambda: of_lightning.LearningRateFinder(num_training_steps=5, early_stop_threshold=None),
    "BatchSizeFinder": lambda: of_lightning.BatchSizeFinder(max_trials=1, init_val=4),
}
FLAGS: dict[str, dict[str, Any]] = {
    "ThroughputMonitor": {"logger": True, "log_every_n_steps": 2},
    "LearningRateMonitor": {"logger": True},
    "RichProgressBar": {"enable_progress_bar": True},
    "OnExceptionCheckpoint": {"enable_checkpointing": True},
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.1},
    "fast_dev_run": {"fast_dev_run": 3},
    "overfit_batches": {"overfit_batches": 2},
    "limit_train_batches": {"limit_train_batches": 3},
    "val_check_interval": {"val_check_interval": 2},
    "profiler": {"profiler": "simple"},
    "barebones": {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None},
    "reload": {"reload_dataloaders_every_n_epochs": 1},
    "deterministic": {"deterministic": True},
    "no inference mode": {"inference_mode": False},
    "detect_anomaly": {"detect_anomaly": True},
    "max_steps": {"max_steps": 7, "max_epochs": -1},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
}


@pytest.mark.parametrize("name", dict.fromkeys([*CALLBACKS, *FLAGS]))
def test_other_callbacks_and_flags_do_as_with_weights_by_hand(name: str, monkeypatch: Any) -> None:
    modules = [Validated(), ByHand()]
    batches = [DATA, TensorDataset(*DATA.tensors, weights())]
    for module, dataset, own in zip(modules, batches, ([fl.FlowWeightingCallback()], [])):
        module.learning_rate, module.batch_size, module.backbone = 0.1, 4, module.net[0]
        loader = DataLoader(dataset, 5, shuffle=name != "overfit_batches", generator=torch.Generator().manual_seed(3))
        validation = DataLoader(DATA, 5, generator=torch.Generator())
        callbacks = [CALLBACKS[name]()] if name in CALLBACKS else []
        settings = {"loader": loader, "val_dataloaders": validation} | FLAGS.get(name, {})
        if name.endswith("Finder"):  # they look for attributes of a module that brings its own loaders
            module.train_dataloader = lambda loader=loader, m=module: DataLoader(
                loader.dataset, m.batch_size, generator=torch.Generator()
            )
            settings |= {"loader": None, "val_dataloaders": None}
            module.val_dataloader = lambda validation=validation: validation
        fit(module, dataset, *callbacks, *own, **settings)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if name == "bf16-mixed" else {"rtol": 1e-5, "atol": 1e-6}
    for (key, mine), theirs in zip(modules[0].state_dict().items(), modules[1].state_dict().values()):
        torch.testing.assert_close(mine, theirs, msg=lambda m, key=key: f"{key}: {m}", **tolerance)


def _two_processes(module: Any, dataset: Any, callbacks: list[Any]) -> None:
    loader = DataLoader(dataset, 5, shuffle=True, generator=torch.Generator())
    fit(module, dataset, *callbacks, loader=loader, strategy="ddp", devices=2)
    if module.global_rank == 0:
        torch.save(module.state_dict(), f"{type(module).__name__}.pt")
        torch.save([callback.weights.weights for callback in callbacks], f"{type(module).__name__}-weights.pt")


def test_two_processes_do_as_with_weights_by_hand() -> None:
    flow = fl.FlowWeightingCallback()
    launch(_two_processes, Classifier(), DATA, [flow])
    launch(_two_processes, ByHand(), TensorDataset(*DATA.tensors, weights()), [])
    mine, theirs = torch.load("Classifier.pt"), torch.load("ByHand.pt")
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.load("Classifier-weights.pt")[0], weights())


@pytest.mark.parametrize(("part", "backend"), [("net", "eager"), slow("module", "aot_eager")])
def test_a_compiled_network_or_module_is_weighted(part: str, backend: str) -> None:
    torch._dynamo.reset()
    modules = [Classifier(), Classifier()]
    for module in modules:
        module.net[3] = nn.Identity()  # compiled dropout draws other numbers
    fit(modules[0], DATA, fl.FlowWeightingCallback())
    if part == "net":
        modules[1].net.compile(backend=backend)
        compiled = modules[1]
    else:
        compiled = torch.compile(modules[1], backend=backend)
    fit(compiled, DATA, fl.FlowWeightingCallback())
    torch.testing.assert_close(modules[1].state_dict(), modules[0].state_dict(), rtol=1e-5, atol=1e-6)


def test_a_probe_finds_the_head_of_an_unchanged_module() -> None:
    module, probe, flow = Classifier(), fl.LinearProbeCallback(refit=False), fl.FlowWeightingCallback()
    body = copy.deepcopy(module).eval().net[:-1]
    with torch.no_grad():
        expected = fit_probe(body(DATA.tensors[0]), DATA.tensors[1], 3)
    fit(module, DATA, flow, probe, max_steps=0)
    torch.testing.assert_close(module.net[-1].weight, expected.head.weight)
    torch.testing.assert_close(flow.weights.losses, expected.losses)


def test_losses_at_chance_level_ask_for_a_probe() -> None:
    module = Classifier()
    module.net[-1].weight.data.mul_(0.01)
    with pytest.warns(UserWarning, match=r"no better than chance.*LinearProbeCallback\(\)"):
        fit(module, DATA, fl.FlowWeightingCallback(), max_steps=1)


class Joint(Classifier):
    """Learns from two loaders: labelled samples, and others that have no weight."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labelled, others = (batch["labelled"], batch["others"]) if isinstance(batch, dict) else batch
        loss = 0.0 if labelled is None else self.supervised(labelled)
        return loss if others is None else loss + F.mse_loss(self.net(others[0]), torch.zeros(len(others[0]), 3))

    def supervised(self, labelled: Any) -> Tensor:
        return F.cross_entropy(self.net(labelled[0]), labelled[1])


class JointByHand(Joint):
    """The same, with weights in the batches."""

    def supervised(self, labelled: Any) -> Tensor:
        return (labelled[2] * F.cross_entropy(self.net(labelled[0]), labelled[1], reduction="none")).mean()


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
@pytest.mark.parametrize(("key", "size"), [("labelled", 4), (0, 9)])
def test_one_of_several_loaders_is_weighted(mode: str, key: Any, size: int) -> None:
    """Beside a longer loader the labelled one begins anew, or is over."""
    modules = [Joint(), JointByHand()]
    batches = [DATA, TensorDataset(*DATA.tensors, weights())]
    for module, dataset, callbacks in zip(modules, batches, ([fl.FlowWeightingCallback(loader=key)], [])):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        loaders = [
            DataLoader(dataset, 5, shuffle=True, generator=generators[0]),
            DataLoader(data(n=4 * size), 4, shuffle=True, generator=generators[1]),
        ]
        joined = CombinedLoader(loaders if key == 0 else dict(zip(("labelled", "others"), loaders)), mode)
        fit(module, dataset, *callbacks, loader=joined)
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict(), rtol=1e-5, atol=1e-6)


class Augmented(torch.utils.data.Dataset):
    """Noise on each reading."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, position: int) -> Any:
        x, y = DATA[position]
        return x + self.noise * torch.randn(4), y


def test_augmented_samples_are_scored_in_a_plain_view_that_is_offered() -> None:
    with pytest.warns(UserWarning, match=r"Two readings .*scoring_dataset="):
        fit(Classifier(), Augmented(1.0), fl.FlowWeightingCallback(), max_steps=1)
    flow = fl.FlowWeightingCallback(scoring_dataset=Augmented(0.0))
    fit(Classifier(), Augmented(1.0), flow, max_steps=1)
    torch.testing.assert_close(flow.weights.weights, weights())


def a_sample_short(samples: list[Any]) -> Any:
    """Lose a sample of the last batch, of which no other does."""
    kept = samples[1:] if len(samples) == 3 else samples
    return tuple(map(torch.stack, zip(*kept)))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, RuntimeError, r"batch has 3 samples, but its losses are cross_entropy of shape \[2\]"),
        (
            {"sample_losses": lambda m, batch: F.cross_entropy(m.net(batch[0]), batch[1], reduction="none")},
            ValueError,
            r"losses have shape \(2,\) but weights \(3,\)",
        ),
    ],
)
def test_a_batch_that_is_not_the_size_of_its_list_of_indices_is_refused(
    settings: Any, error: Any, message: str
) -> None:
    flow = fl.FlowWeightingCallback(scoring_dataset=DataLoader(DATA, 5), **settings)
    module = Classifier()
    with pytest.raises(error, match=message):
        fit(module, DATA, flow, loader=DataLoader(DATA, 5, collate_fn=a_sample_short))
    assert len(module.seen) in (0, 5) and not hasattr(module, "sample_weights"), "four steps and the refused one"


def test_the_step_of_a_module_after_the_fit_is_its_own_bit_for_bit() -> None:
    weighted, twin, batch = Classifier(), Classifier(), DATA[:4]
    fit(weighted, DATA, fl.FlowWeightingCallback())
    twin.load_state_dict(weighted.state_dict())
    for module in (weighted, twin):
        module.trainer, module.log = None, lambda *_: None
        module.eval().zero_grad()
        module.training_step(batch, 0).backward()
    assert weighted.seen[-1] == twin.seen[-1]
    assert all(torch.equal(mine.grad, its.grad) for mine, its in zip(weighted.parameters(), twin.parameters()))
