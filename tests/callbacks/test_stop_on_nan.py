import os
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import flow_lightning as fl
from tests.examples import LinearRegression, fit
from tests.processes import launch


class Breaking(LinearRegression):
    """Gives the loss of some samples as NaN from a batch on, in training alone."""

    def __init__(self, broken, batch):
        super().__init__()
        self.broken, self.batch = torch.tensor(broken), batch

    def sample_losses(self, batch):
        losses = super().sample_losses(batch)
        late = torch.tensor(self.training and len(self.seen) > self.batch)
        return torch.where(torch.isin(batch.index, self.broken) & late, torch.full_like(losses, torch.nan), losses)


@pytest.mark.parametrize(("batch", "interval", "trained"), [(0, 1, 1), (5, 1, 6), (0, 4, 4), (5, 4, 6), (3, 0, 6)])
def test_a_broken_loss_stops_training_with_batch_and_samples(batch, interval, trained):
    """Whenever the losses are checked, it is the first broken batch that is named."""
    module = Breaking(range(23), batch)
    with pytest.raises(FloatingPointError, match=rf"at batch {batch}, for the samples .*gradient_clip_val") as error:
        fit(fl.FlowWeightingCallback(), module=module, log_every_n_steps=interval)
    named = str(error.value).split("samples ")[1].split(" of the")[0]
    assert named == ", ".join(map(str, module.seen[batch].tolist()))
    assert len(module.seen) == trained


def test_only_the_broken_samples_are_named():
    with pytest.raises(FloatingPointError, match="for the samples 17 of the training set"):
        fit(fl.FlowWeightingCallback(), module=Breaking([17], -1))


class BreakingParameter(LinearRegression):
    """Has an infinite parameter after its fourth step."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.trainer.global_step == 3:  # not counted yet
            self.head.bias.data[0] = torch.inf


@pytest.mark.parametrize("when", [{"every_n_train_steps": 1}, {"every_n_epochs": 1}])
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("make", [partial(Breaking, range(23), 3), BreakingParameter])
def test_no_broken_model_is_in_a_checkpoint_of_any_kind(make, when, weights_only):
    checkpoint = ModelCheckpoint("ckpt", "{step}", save_top_k=-1, save_weights_only=weights_only, **when)
    with pytest.raises(FloatingPointError, match=r"(at|after) batch [345]"):
        fit(checkpoint, module=make(), enable_checkpointing=True, log_every_n_steps=100)
    steps = range(1, 4) if "every_n_train_steps" in when else ()
    assert sorted(path.name for path in Path("ckpt").glob("*.ckpt")) == [f"step={step}.ckpt" for step in steps]


def test_token_losses_name_the_batch():
    class Tokens(LinearRegression):
        def training_losses(self, batch):
            return self.sample_losses(batch).repeat_interleave(2) * torch.where(batch.index == 9, torch.inf, 1.0).sum()

    with pytest.raises(FloatingPointError, match=r"at batch \d, in a batch of the samples .*\b9\b"):
        fit(module=Tokens())


def test_batches_without_an_index_name_the_batch():
    class Unnumbered(Breaking):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch.index)
            return self.weighted_loss(batch[0], self.sample_losses(batch))

    with pytest.raises(FloatingPointError, match=r"at batch 2\. If its samples are sound"):
        fit(module=Unnumbered(range(23), 2))


def broken_on_rank_one() -> None:
    broken, text = (range(23), "at batch 2, for") if os.environ["RANK"] == "1" else ([], "in another process")
    with pytest.raises(FloatingPointError, match=text):
        fit(module=Breaking(broken, 2), devices=2, strategy="ddp")


def test_all_processes_stop_together():
    launch(broken_on_rank_one)
