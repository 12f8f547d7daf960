"""ExactResumeCallback: a fit that is killed, anywhere and again, ends as the unbroken one, to the last bit."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, WeightAveraging
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.resume import ResumableDataLoader, ResumableSampler
from tests.examples import LinearRegression, RegressionData, chain, make_trainer, regression_data, slow
from tests.processes import launch

#: Batches of an epoch: where a step takes two of them, the last step of an epoch takes one.
BATCHES = 5
LAST = Path("ckpt/last.ckpt")


class Tiny(LinearRegression):
    """Dropout, BatchNorm, momentum, and schedulers by step and by epoch."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        total = self.trainer.estimated_stepping_batches  # which makes Lightning forget where the loader was
        by_step = {"scheduler": LinearLR(optimizer, 1.0, 0.1, total), "interval": "step"}
        by_epoch = {"scheduler": ExponentialLR(optimizer, 0.8), "interval": "epoch"}
        return [optimizer], [by_step, by_epoch]


class Steady(Tiny):
    """Its schedule does not depend on when the fit is to end."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.8), "interval": "epoch"}]


class Validated(Tiny):
    """Also has a scheduler by a metric of the validation."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.sample_losses(batch).mean(), batch_size=len(batch.index))

    def configure_optimizers(self):
        optimizers, schedulers = super().configure_optimizers()
        plateau = ReduceLROnPlateau(optimizers[0], factor=0.7, patience=0, threshold=0.5)
        return optimizers, [*schedulers, {"scheduler": plateau, "monitor": "val/loss"}]


class Plain(LightningModule):
    """A module that is not ours."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout()), torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return (self.head(self.body(batch[0][0])).squeeze(1) - batch[0][1]).square().mean()

    configure_optimizers = Tiny.configure_optimizers


class PlainSteady(Plain):
    configure_optimizers = Steady.configure_optimizers


class TinyData(RegressionData):
    def __init__(self):
        super().__init__(regression_data(4 * BATCHES))

    def train_dataloader(self):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        sampler = ResumableSampler(self.dataset, world, rank, seed=3)
        return ResumableDataLoader(self.dataset, batch_size=4 // world, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(self.dataset, batch_size=10) if isinstance(self.trainer.lightning_module, Validated) else []


class PlainData(TinyData):
    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=4, shuffle=True)


class Ends(Callback):
    """Counts, in its checkpoints, the ends of validations and epochs."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(f"validated {trainer.global_step}")

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(f"ended {trainer.current_epoch}")

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state_dict):
        self.seen = list(state_dict["seen"])


def tiny_fit(make, *callbacks, ckpt_path=None, data=TinyData, **settings):
    """Fit from a fixed seed and return all that a fit leaves."""
    seed_everything(3, verbose=False)
    module, ends = make(), Ends()
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0} | settings
    trainer = make_trainer(ends, *callbacks, enable_checkpointing=True, **settings)
    trainer.fit(module, datamodule=data(), ckpt_path=ckpt_path)
    trainer.save_checkpoint("after.ckpt", weights_only=False)
    state = [module.state_dict(), trainer.optimizers[0].state_dict()["state"]]
    counts = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    logged = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step of the loggers
    return state, [counts, ends.seen, trainer.global_step, trainer.current_epoch, logged]


def exact_fit(make, *callbacks, **settings):
    return tiny_fit(make, fl.ExactResumeCallback(), *callbacks, **settings)


def assert_equal_fits(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1] == expected[1]


def checkpoint_of(every):
    return ModelCheckpoint("ckpt", "{step}", save_last=True, every_n_train_steps=every, save_top_k=-1)


class Keep(Callback):
    """Keeps, before each batch, the last checkpoint: a run that is killed there resumes from it."""

    def __init__(self, start):
        self.kept = [start]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        content = LAST.read_bytes() if LAST.exists() else None
        if content != self.kept[-1]:
            self.kept.append(content)


def fit_from(start, make, every, **settings):
    """Fit from a checkpoint; return what the fit leaves, and each checkpoint that a kill before a batch would leave."""
    shutil.rmtree("ckpt", ignore_errors=True)
    if start is not None:
        LAST.parent.mkdir()
        LAST.write_bytes(start)
    keep = Keep(start)
    return exact_fit(make, checkpoint_of(every), keep, ckpt_path="last", **settings), keep.kept[1:]


@pytest.mark.parametrize(
    ("make", "every", "settings"),
    [
        slow(Tiny, 1, {}),
        (Tiny, 3, {}),
        (Plain, 2, {}),
        (Validated, 2, {"val_check_interval": 2, "accumulate_grad_batches": 3}),
        (Tiny, 2, {"max_epochs": -1, "max_steps": 6}),
        slow(Validated, 1, {"limit_train_batches": 3}),
        slow(Validated, 1, {"check_val_every_n_epoch": None, "val_check_interval": 3}),
        (Validated, 2, {}),
        slow(Validated, 2, {"accumulate_grad_batches": 1}),
    ],
)
def test_two_kills_anywhere_change_nothing(make, every, settings):
    """Resumed from each checkpoint that a kill leaves, and from each that a kill of the resumed run leaves."""
    expected, first = fit_from(None, make, every, **settings)
    resumed = [fit_from(start, make, every, **settings) for start in first]
    twice = [fit_from(start, make, every, **settings) for _, second in resumed for start in second]
    assert first and (twice or every == 3)
    for found, _ in resumed + twice:
        assert_equal_fits(found, expected)


def test_lightning_alone_loses_half_a_gradient_at_the_second_kill():
    """The test above can fail: a resumed fit writes a checkpoint in the middle of a step."""

    def fit_once(*kill, **settings):
        return tiny_fit(Tiny, checkpoint_of(3), *kill, **settings)

    found, expected = chain(fit_once, 7, 1), chain(fit_once)
    assert (found[0][0]["head.weight"] - expected[0][0]["head.weight"]).norm() > 0.01


class Save(Callback):
    """Writes a checkpoint in each call of each hook."""

    def __init__(self, folder="all"):
        self.folder, self.count = folder, 0

    def save(self, trainer, hook):
        trainer.save_checkpoint(f"{self.folder}/{self.count:03}-{hook}.ckpt", weights_only=False)
        self.count += 1


HOOKS = ["train_epoch_start", "train_batch_start", "after_backward", "before_optimizer_step", "train_batch_end"]
HOOKS += ["validation_start", "validation_end", "train_epoch_end"]
for name in HOOKS:
    setattr(Save, f"on_{name}", lambda self, trainer, *args, hook=name, **kwargs: self.save(trainer, hook))


@pytest.mark.parametrize(
    ("make", "settings"),
    [(Tiny, {"max_epochs": -1, "max_steps": 6}), slow(Validated, {}), slow(Validated, {"val_check_interval": 2})],
)
def test_a_fit_resumes_from_a_checkpoint_of_any_hook(make, settings):
    """From every second one, so from each hook of some batch."""
    expected = exact_fit(make, Save(), **settings)
    paths = sorted(Path("all").iterdir())[:-2]  # after the last step, there is nothing left to do
    assert len(paths) > 30 and {path.stem[4:] for path in paths[::2]} >= set(HOOKS[:5])
    for path in paths[::2]:
        assert_equal_fits(exact_fit(make, ckpt_path=str(path), **settings), expected)


def test_a_validation_that_was_made_up_for_is_not_done_again():
    expected = exact_fit(Validated, Save(), val_check_interval=2)
    path = min(Path("all").glob("*validation_start*"))
    exact_fit(Validated, Save("again"), ckpt_path=str(path), val_check_interval=2)
    for path in sorted(Path("again").iterdir())[:12:2]:
        assert_equal_fits(exact_fit(Validated, ckpt_path=str(path), val_check_interval=2), expected)


def test_a_callback_that_comes_before_may_write_the_checkpoint():
    expected = tiny_fit(Validated, Save(), fl.ExactResumeCallback())
    for path in sorted(Path("all").glob("*-train_batch_end.ckpt"))[::3]:
        assert_equal_fits(exact_fit(Validated, ckpt_path=str(path)), expected)


class Fail(Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.total_batch_idx == 3:
            raise KeyError


def test_the_checkpoint_of_an_exception_is_of_the_last_step():
    expected = exact_fit(Tiny)
    with pytest.raises(KeyError):
        exact_fit(Tiny, Fail(), OnExceptionCheckpoint("ckpt"))
    assert_equal_fits(exact_fit(Tiny, ckpt_path="ckpt/on_exception.ckpt"), expected)


@pytest.mark.parametrize("turn", [1, -1])
def test_averaged_weights_are_resumed(turn):
    def callbacks():
        return [fl.ExactResumeCallback(), WeightAveraging(use_buffers=True)][::turn]

    expected = tiny_fit(Tiny, *callbacks(), Save())
    for path in sorted(Path("all").iterdir())[:-1:7]:
        assert_equal_fits(tiny_fit(Tiny, *callbacks(), ckpt_path=str(path)), expected)


def chain_on_two_processes(kills) -> None:
    settings = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}

    def fit_once(*kill, **more):
        return exact_fit(Validated, checkpoint_of(1), *kill, **settings, **more)

    torch.save(chain(fit_once, *kills), f"{torch.distributed.get_rank()}.pt")


def test_two_processes_that_are_killed_again_and_again_end_as_unbroken_ones():
    launch(chain_on_two_processes, ())
    expected = [torch.load(f"{rank}.pt") for rank in range(2)]
    launch(chain_on_two_processes, (3, 1, 1, 3))
    for rank in range(2):
        assert_equal_fits(torch.load(f"{rank}.pt"), expected[rank])


def test_torchs_generator_is_left_alone_unless_exact_resume_is_asked_for():
    class Draws(Tiny):
        def training_step(self, batch, batch_idx):
            drawn.append(torch.initial_seed())
            return super().training_step(batch, batch_idx)

    for fit, seeds in ((tiny_fit, 1), (exact_fit, 2 * BATCHES)):
        drawn: list[int] = []
        fit(Draws)
        assert len(set(drawn)) == seeds


def test_the_loader_goes_on_in_any_resumed_fit_of_our_modules():
    """`LoopRepairs` comes with the module: without ExactResumeCallback the batches are right, dropout is not."""
    whole, resumed = Tiny(), Tiny()
    tiny_fit(lambda: whole, checkpoint_of(1), accumulate_grad_batches=1)
    tiny_fit(lambda: resumed, ckpt_path="ckpt/step=3.ckpt", accumulate_grad_batches=1)
    assert torch.equal(torch.stack(resumed.seen), torch.stack(whole.seen[3:]))


@pytest.mark.parametrize("path", ["ckpt/last.ckpt", "after.ckpt"])
@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize(("make", "data"), [(Steady, TinyData), (PlainSteady, PlainData)])
def test_a_fit_that_max_steps_has_stopped_goes_on_where_it_stopped(make, data, steps, path):
    """In mid-epoch or, of 3 steps, at an epoch's end. `last.ckpt` is written after a step, or where the fit ends."""
    expected = exact_fit(make, data=data)
    exact_fit(make, checkpoint_of(2), data=data, max_steps=steps)
    found = exact_fit(make, data=data, ckpt_path=path)
    for one in (found, expected):
        del one[1][1]  # the first fit, too, has ended an epoch
    assert_equal_fits(found, expected)


@pytest.mark.parametrize("path", ["ckpt/last.ckpt", "after.ckpt"])
def test_the_batches_go_on_after_max_steps_without_exact_resume(path):
    whole, resumed = Steady(), Steady()
    tiny_fit(lambda: whole)
    tiny_fit(Steady, checkpoint_of(3), max_steps=2)
    tiny_fit(lambda: resumed, ckpt_path=path)
    assert torch.equal(torch.stack(resumed.seen), torch.stack(whole.seen[4:]))
