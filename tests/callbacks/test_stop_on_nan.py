from pathlib import Path

import pytest
import torch

import flow_lightning as fl
from flow_lightning.callbacks.stop_on_nan import FiniteLosses
from tests.examples import LinearRegression, RegressionData, fit


class Breaking(LinearRegression):
    """Gives the loss of some samples as NaN from a batch on, in training alone."""

    def __init__(self, broken, batch):
        super().__init__()
        self.broken, self.batch = torch.tensor(broken), batch

    def sample_losses(self, batch):
        losses = super().sample_losses(batch)
        late = torch.tensor(self.training and len(self.seen) > self.batch)
        return torch.where(torch.isin(batch.index, self.broken) & late, torch.full_like(losses, torch.nan), losses)


@pytest.mark.parametrize("batch", [0, 3, 5])
def test_a_broken_loss_stops_training_with_step_and_samples(batch):
    module = Breaking(range(23), batch)
    with pytest.raises(FloatingPointError, match=rf"at batch {batch}, for the samples .*gradient_clip_val") as error:
        fit(fl.FlowWeightingCallback(), module=module)
    named = str(error.value).split("samples ")[1].split(" of the")[0]
    assert named == ", ".join(map(str, module.seen[batch].tolist()))


def test_plain_training_stops_too():
    with pytest.raises(FloatingPointError, match="at batch 3, for the samples"):
        fit(module=Breaking(range(23), 3))


def test_only_the_broken_samples_are_named():
    with pytest.raises(FloatingPointError, match="for the samples 17 of the training set"):
        fit(fl.FlowWeightingCallback(), module=Breaking([17], -1))


def test_no_checkpoint_is_written_of_a_broken_epoch():
    with pytest.raises(FloatingPointError):
        fit(fl.FlowWeightingCallback(), module=Breaking(range(23), 5), enable_checkpointing=True)
    assert not list(Path(".").rglob("*.ckpt"))


def test_token_losses_name_the_batch():
    finite = FiniteLosses()
    finite.note(7, torch.tensor([4, 2]), torch.tensor([1.0, torch.inf, 2.0]))
    with pytest.raises(FloatingPointError, match="at batch 7, in a batch of the samples 4, 2"):
        finite.check()
    finite.check()


def test_sound_losses_pass():
    assert fit(fl.FlowWeightingCallback(), data=RegressionData())[1].global_step == 6
