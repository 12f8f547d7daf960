"""Unchanged loaders: the weights of a batch are those of its samples, however the loader draws and joins them."""

import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import BatchSampler, DataLoader, Dataset, SubsetRandomSampler

import flow_lightning as fl
from tests.examples import LinearRegression, expected_losses, make_trainer, regression_data, slow


class Plain(LinearRegression):
    """Knows nothing of an index: batches are as the loader makes them."""

    def __init__(self):
        super().__init__()
        self.checked = 0

    def sample_losses(self, batch):
        x, y = batch
        return (self(x) - y).square()

    def training_step(self, batch, batch_idx):
        """Before training, look each sample of the batch up by its content, independently of the library."""
        if self.sample_weights is not None:
            _, y = batch
            position = (regression_data().tensors[1][None] == y[:, None]).long().argmax(1)
            assert torch.equal(self.training_weights(batch), self.sample_weights.weights[position])
            self.checked += len(y)
        return fl.WeightedLossModule.training_step(self, batch, batch_idx)


DATA = regression_data()
LOADERS = {
    "in order": {"batch_size": 4},
    "workers": {"batch_size": 4, "shuffle": True, "num_workers": 2, "prefetch_factor": 3},
    "subset": {"batch_size": 4, "sampler": SubsetRandomSampler([1, 5, 20, 8, 3, 2])},
    "batch sampler": {"batch_sampler": BatchSampler(range(22, -1, -1), 5, False)},
}


@pytest.mark.parametrize("name", LOADERS)
def test_an_unchanged_loader_is_weighted(name):
    flow, module, loader = fl.FlowWeightingCallback(), Plain(), DataLoader(DATA, **LOADERS[name])
    own = loader.batch_sampler
    make_trainer(flow, max_epochs=2).fit(module, loader)
    np.testing.assert_allclose(flow.weights.losses.numpy(), expected_losses(DATA), rtol=1e-4)
    assert module.checked == 2 * sum(len(batch) for batch in list(own)) and flow.weights.lookups > 0
    assert loader.batch_sampler is own and module.batch_samples is None


class Sampled(Plain):
    """Trains on samples drawn with probability w."""

    def __init__(self):
        super().__init__()
        self.reduction = "sampling"
        self.body[1].eval()


class Scheduled(Plain):
    """Asks for the number of steps, which makes Lightning build the loader before on_fit_start."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 12
        return super().configure_optimizers()


@pytest.mark.parametrize("make", [Sampled, Scheduled])
def test_hooks_and_reduction_of_the_module_change_nothing(make):
    flow, module = fl.FlowWeightingCallback(), make()
    trainer = make_trainer(flow, max_epochs=2)
    trainer.fit(module, DataLoader(DATA, 4, True))
    assert module.checked == 46
    # One of the two is this test's own; the one before the first step asks whether the module looks up by itself.
    assert flow.weights.lookups == 2 * (trainer.fit_loop.total_batch_idx + 1) + 1


def test_a_resumed_run_has_the_weights_of_its_batches():
    checkpoint = ModelCheckpoint("ckpt", filename="mid", every_n_train_steps=4)
    trainer = make_trainer(fl.FlowWeightingCallback(), checkpoint, max_steps=4, enable_checkpointing=True)
    trainer.fit(Plain(), DataLoader(DATA, 4, True))
    module = Plain()
    trainer = make_trainer(fl.FlowWeightingCallback(), max_epochs=2)
    trainer.fit(module, DataLoader(DATA, 4, True), ckpt_path="ckpt/mid.ckpt")
    assert module.checked > 23


BATCHES = list(zip(*(part.split(4) for part in DATA.tensors)))


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (DataLoader(DATA, 4, num_workers=1, in_order=False), ValueError, "in_order=True"),
        (DataLoader(BATCHES, batch_size=None), TypeError, r"batch_size=None.*IndexedDataset"),
    ],
)
def test_loaders_that_cannot_be_followed_name_the_fix(loader, error, message):
    with pytest.raises(error, match=message):
        make_trainer(fl.FlowWeightingCallback()).fit(Plain(), loader)


class Wrapped(Dataset):
    """Takes any position, and pairs."""

    def __init__(self):
        self.length = len(DATA)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return DATA[(index[0] if isinstance(index, tuple) else index) % len(DATA)]


@pytest.mark.parametrize(
    ("drawn", "error", "message"),
    [
        ([3, 23], ValueError, "drew sample 23, but 23 samples were scored"),
        ([3, -24], ValueError, "drew sample -24, but 23 samples were scored"),
        ([(3, 0), (4, 0)], TypeError, r"yields \(3, 0\), which is no position in a data set"),
    ],
)
def test_positions_that_were_not_scored_are_named_and_nothing_is_trained(drawn, error, message):
    module = Plain()
    before = module.state_dict()["head.weight"].clone()
    with pytest.raises(error, match=message):
        make_trainer(fl.FlowWeightingCallback()).fit(module, DataLoader(Wrapped(), 2, sampler=drawn))
    assert torch.equal(module.state_dict()["head.weight"], before)


def test_a_data_set_that_grows_in_the_fit_is_named():
    dataset = Wrapped()
    grow = Callback()
    grow.on_train_epoch_end = lambda trainer, pl_module: setattr(dataset, "length", 24)
    with pytest.raises(ValueError, match="drew sample 23, but 23 samples were scored"):
        make_trainer(fl.FlowWeightingCallback(), grow, max_epochs=2).fit(Plain(), DataLoader(dataset, 4))


class SharedLoader(Plain):
    """Validates in the middle of an epoch on the very loader that it trains on."""

    def validation_step(self, batch, batch_idx):
        self.log("val", self.sample_losses(batch).mean())


class Peek(Callback):
    """Looks at the training loader in the middle of an epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        next(iter(trainer.train_dataloader))


@pytest.mark.parametrize(("peek", "workers"), [(True, 0), (False, 0), slow(False, 2), slow(True, 2)])
def test_whatever_else_iterates_over_the_loader_does_not_count(peek, workers):
    loader, module = DataLoader(DATA, 4, True, num_workers=workers), SharedLoader()
    callbacks = [Peek()] if peek else []
    trainer = make_trainer(fl.FlowWeightingCallback(), *callbacks, max_epochs=2, val_check_interval=2)
    trainer.fit(module, loader, None if peek else loader)
    assert module.checked == 46


class Statistics(Callback):
    """Looks at all samples before the first batch of an epoch, as for their mean."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, pl_module: list(trainer.train_dataloader))


@pytest.mark.parametrize("settings", [{}, {"num_workers": 1}])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start"])
def test_a_hook_that_looks_at_the_samples_before_the_first_batch_does_not_count(hook, settings):
    module = Plain()
    trainer = make_trainer(fl.FlowWeightingCallback(), Statistics(hook), max_epochs=2)
    trainer.fit(module, DataLoader(DATA, 4, True, **settings))
    assert module.checked == 46


def test_several_training_loaders_ask_for_a_name():
    loaders = {"new": DataLoader(DATA, 4, True), "old": DataLoader(DATA, 4, True)}
    with pytest.raises(TypeError, match=r"2 training loaders. Name the one .* FlowWeightingCallback\(loader='new'\)"):
        make_trainer(fl.FlowWeightingCallback()).fit(Plain(), loaders)
    with pytest.raises(KeyError, match=r"no training loader 'wen', but \['new', 'old'\]"):
        make_trainer(fl.FlowWeightingCallback(loader="wen")).fit(Plain(), loaders)


def skip_some(samples):
    return None if float(samples[0][1]) > 1 else torch.utils.data.default_collate(samples)


def test_a_batch_that_is_none_is_counted():
    module = Plain()
    flow = fl.FlowWeightingCallback(scoring_dataset=DataLoader(DATA, 4))
    make_trainer(flow, max_epochs=3).fit(module, DataLoader(DATA, 4, True, collate_fn=skip_some))
    assert 0 < module.checked < 69


def test_a_loader_that_was_being_iterated_before_the_fit_names_the_fix():
    loader = DataLoader(DATA, 4, True, num_workers=1, persistent_workers=True)
    next(iter(loader))
    with pytest.raises(RuntimeError, match=r"already being iterated.*IndexedDataset"):
        make_trainer(fl.FlowWeightingCallback()).fit(Plain(), loader)
