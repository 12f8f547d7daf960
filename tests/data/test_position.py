"""ExactResumeCallback with plain loaders: a killed fit, resumed, ends as the unbroken one, to the last bit."""

import random
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, seed_everything
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, default_collate
from torch.utils.data import SubsetRandomSampler as Subset
from torch.utils.data import WeightedRandomSampler as Weighted

import flow_lightning as fl
from flow_lightning.data.position import LoaderPosition
from tests import examples
from tests.examples import Kill, make_trainer, regression_data, slow
from tests.processes import launch

DATA = regression_data()
BATCHES = 6  # of an epoch of 23 samples, 4 in a batch


class Plain(LightningModule):
    """Knows nothing of this library. Has dropout and momentum, and notes the samples that it sees."""

    learning_rate = 0.05

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1), nn.Flatten(0))
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(y)
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


class AsksForSteps(Plain):
    """Makes Lightning build the loader before on_fit_start, and before the loops are restored."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class Validated(Plain):
    """Validates, in the middle of an epoch, on the loader that it trains on."""

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch[0]).mean())


class Noisy(Dataset):
    """Random transforms of all kinds, in the process of the fit."""

    def __len__(self):
        return len(DATA)

    def __getitem__(self, i):
        x, y = DATA[i]
        return x + 0.1 * torch.randn(4) + random.random() + np.float32(np.random.rand()), y


class DrawsAsItGoes(Sampler):
    """A batch sampler of a user's own: draws batch by batch, from numpy, python and torch."""

    def __iter__(self):
        for _ in range(BATCHES):
            yield [np.random.randint(23), random.randrange(23), int(torch.randint(23, ()))]

    def __len__(self):
        return BATCHES


def own_generator():
    return torch.Generator().manual_seed(5)


LOADERS = {
    "shuffled": lambda: DataLoader(DATA, 4, True),
    "in order": lambda: DataLoader(DATA, 4),
    "drop_last": lambda: DataLoader(DATA, 4, True, drop_last=True),
    "own generator": lambda: DataLoader(DATA, 4, True, generator=own_generator()),
    "replacement": lambda: DataLoader(DATA, 4, sampler=RandomSampler(DATA, True, 24, own_generator())),
    "weighted": lambda: DataLoader(DATA, 4, sampler=Weighted(torch.arange(1.0, 24), 23)),
    "subset": lambda: DataLoader(DATA, 4, sampler=Subset(range(1, 23))),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, False)),
    "draws as it goes": lambda: DataLoader(DATA, batch_sampler=DrawsAsItGoes()),
    "noisy": lambda: DataLoader(Noisy(), 4, True),
    "indexed": lambda: DataLoader(fl.IndexedDataset(DATA), 4, True, collate_fn=without_index),
    "one worker": lambda: DataLoader(DATA, 4, True, num_workers=1),
    "persistent": lambda: DataLoader(DATA, 4, True, num_workers=1, persistent_workers=True, generator=own_generator()),
}


def without_index(samples):
    return default_collate([sample for sample, _ in samples])


def exact():
    return [fl.ExactResumeCallback()]


def flow_before():
    return [fl.FlowWeightingCallback(scoring_dataset=DataLoader(DATA, 4)), *exact()]


def flow_after():
    return flow_before()[::-1]


def fit(make_loader, make_callbacks, *callbacks, make=Plain, ckpt_path=None, val=False, **settings):
    """Fit from a fixed seed; a resumed fit has drawn some numbers more."""
    seed_everything(3, verbose=False)
    module, loader, drawn = make(), make_loader(), len(list(Path("ckpt").glob("*")))
    torch.rand(drawn), np.random.rand(drawn), [random.random() for _ in range(drawn)]
    checkpoint = ModelCheckpoint("ckpt", save_last=True, every_n_train_steps=1, save_top_k=0)
    settings = {"max_epochs": 3, "num_sanity_val_steps": 0} | settings
    trainer = make_trainer(*make_callbacks(), *callbacks, checkpoint, enable_checkpointing=True, **settings)
    try:
        trainer.fit(module, loader, loader if val else None, ckpt_path=ckpt_path)
    finally:
        assert type(getattr(loader, "batch_sampler", None)).__name__ != "Recorder"
    return module


def chain(make_loader, make_callbacks, *kills, **settings):
    """Fit, die, resume from the last checkpoint, and so on; return the module of the last fit."""
    return examples.chain(partial(fit, make_loader, make_callbacks, **settings), *kills)


def assert_same(found, expected, left):
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert len(found.seen) == left
    assert torch.equal(torch.cat(found.seen), torch.cat(expected.seen[len(expected.seen) - left :]))


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.filterwarnings("error:.*(resum|twice)")
def test_a_fit_that_is_killed_twice_ends_as_the_unbroken_one(name):
    """In the middle of the first epoch, and of the next."""
    expected = chain(LOADERS[name], exact)
    total = len(expected.seen)
    kills = 4, total // 3 + 1
    assert_same(chain(LOADERS[name], exact, *kills), expected, total - sum(kills))


@pytest.mark.parametrize(
    ("name", "callbacks"),
    [
        ("shuffled", flow_before),
        slow("weighted", flow_after),
        ("batch sampler", flow_before),
        slow("one worker", flow_before),
    ],
)
def test_flow_weighs_the_right_samples_after_two_kills(name, callbacks):
    expected = chain(LOADERS[name], callbacks)
    assert torch.equal(torch.cat(expected.seen), torch.cat(chain(LOADERS[name], exact).seen))
    assert_same(chain(LOADERS[name], callbacks, 4, 7), expected, 3 * BATCHES - 11)


VALIDATED = {"make": Validated, "val": True, "val_check_interval": 2}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("shuffled", {"make": AsksForSteps}),
        ("shuffled", VALIDATED),
        slow("one worker", VALIDATED),
        ("shuffled", {"reload_dataloaders_every_n_epochs": 1}),
        slow("one worker", {"reload_dataloaders_every_n_epochs": 1}),
        ("shuffled", {"limit_train_batches": 4}),
        ("shuffled", {"max_epochs": -1, "max_steps": 11}),
    ],
)
def test_flags_of_the_trainer_and_hooks_of_the_module_change_nothing(name, settings):
    settings = {"max_epochs": 2} | settings
    expected = chain(LOADERS[name], flow_after, **settings)
    assert_same(chain(LOADERS[name], flow_after, 3, 4, **settings), expected, len(expected.seen) - 7)


def test_accumulation_goes_on_after_the_last_step():
    expected = chain(LOADERS["shuffled"], exact, accumulate_grad_batches=4)
    for kills, left in (((3,), 18), ((9, 1), 12)):
        assert_same(chain(LOADERS["shuffled"], exact, *kills, accumulate_grad_batches=4), expected, left)


def test_a_tuner_in_a_resumed_fit_changes_nothing():
    def tuned():
        return [LearningRateFinder(num_training_steps=3, update_attr=False), *exact()]

    expected, found = chain(LOADERS["shuffled"], tuned), chain(LOADERS["shuffled"], tuned, 8)
    assert torch.equal(torch.cat(found.seen[-10:]), torch.cat(expected.seen[-10:]))


def chain_on_two_processes(name, kills) -> None:
    module = chain(LOADERS[name], flow_after, *kills, devices=2, strategy="ddp", max_epochs=2)
    torch.save((module.state_dict(), torch.cat(module.seen)), f"{torch.distributed.get_rank()}.pt")


@pytest.mark.parametrize("name", [slow("shuffled"), "weighted"])
def test_the_distributed_sampler_of_lightning_goes_on(name):
    launch(chain_on_two_processes, name, ())
    expected = [torch.load(f"{rank}.pt") for rank in range(2)]
    launch(chain_on_two_processes, name, (1, 3))
    for rank in range(2):
        state, seen = torch.load(f"{rank}.pt")
        torch.testing.assert_close(state, expected[rank][0], rtol=0, atol=0)
        assert torch.equal(seen, expected[rank][1][-len(seen) :]) and len(seen) < len(expected[rank][1])


def test_processes_have_one_order_and_random_transforms_of_their_own():
    orders, drawn = [], []
    for rank in range(2):
        position, loader = LoaderPosition(), LOADERS["shuffled"]()
        position.rank = rank
        position.follow(loader, lambda: True)
        orders.append([(indices, drawn.append(float(torch.rand(())))) for indices in loader.batch_sampler])
        position.release()
    assert orders[0] == orders[1] and len(set(drawn)) == 2 * BATCHES


def test_epochs_differ_and_generators_and_loaders_are_as_before_the_fit():
    generator = own_generator()
    loader = DataLoader(DATA, 4, True, generator=generator)
    own = loader.batch_sampler
    seen = torch.cat(fit(lambda: loader, exact, max_epochs=2).seen).view(2, 23)
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[0].sort().values, seen[1].sort().values)
    assert loader.batch_sampler is own and generator.initial_seed() == 5


class Counts(Sampler):
    """Its order depends on how often it was iterated."""

    times = 0

    def __iter__(self):
        self.times += 1
        return iter(np.random.RandomState(self.times).permutation(23).tolist())

    def __len__(self):
        return 23


def test_a_sampler_that_does_not_repeat_itself_is_refused():
    chain(lambda: DataLoader(DATA, 4, sampler=Counts()), exact, 2)
    with pytest.raises(RuntimeError, match=r"first 2 batches of this epoch are not those.*ResumableSampler"):
        chain(lambda: DataLoader(DATA, 4, sampler=Counts()), exact, 8)


def test_without_exact_resume_flow_names_the_line_that_helps_once():
    def flow():
        return flow_before()[:1]

    with pytest.warns(UserWarning, match=r"middle of an epoch.*Add flow_lightning.ExactResumeCallback\(\)") as caught:
        chain(LOADERS["shuffled"], flow, 3)
    assert len([one for one in caught if "some samples come twice" in str(one.message)]) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chain(LOADERS["shuffled"], flow, BATCHES)  # between two epochs
        chain(LOADERS["shuffled"], flow_after, 3)
    assert not [one for one in caught if "come twice" in str(one.message)]


def test_a_checkpoint_of_a_run_without_exact_resume_is_named():
    with suppress(SystemExit):
        fit(LOADERS["shuffled"], list, Kill(3))
    with pytest.warns(UserWarning, match="written without ExactResumeCallback"):
        fit(LOADERS["shuffled"], exact, ckpt_path="last")


def test_several_training_loaders_are_left_to_lightning():
    class Two(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["one"], batch_idx)

    def loaders():
        return {"one": DataLoader(DATA, 4, True), "other": DataLoader(DATA, 6, True)}

    with pytest.warns(UserWarning, match="dataloader is not resumable"):
        chain(loaders, exact, 2, make=Two)
