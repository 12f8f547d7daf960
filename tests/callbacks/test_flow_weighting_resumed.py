"""A resumed fit: the weights of its checkpoint, scored by nobody again; what does not belong to it is refused."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

import flow_lightning as fl
from tests.examples import LinearRegression, RegressionData, fit, make_trainer, regression_data
from tests.language import language_data, language_module

MID = "ckpt/mid.ckpt"


def half(*callbacks, **settings):
    """Four steps of the six of an epoch, then a checkpoint in its middle."""
    checkpoint = ModelCheckpoint("ckpt", filename="mid", every_n_train_steps=4, save_top_k=1)
    return fit(*callbacks, checkpoint, enable_checkpointing=True, max_steps=4, **settings)


@pytest.fixture
def first():
    """The callback of a run that has left a checkpoint of tensors and primitives only."""
    flow = fl.FlowWeightingCallback()
    half(flow)
    assert any("FlowWeightingCallback" in name for name in torch.load(MID, weights_only=True)["callbacks"])
    return flow


def test_a_run_resumed_in_mid_epoch_scores_nothing_and_has_and_reports_the_same_weights(first):
    resumed = fl.FlowWeightingCallback()
    module, trainer = fit(resumed, ckpt_path=MID, max_epochs=2, default_root_dir="again")
    assert module.scored == 0
    assert trainer.global_step > 4 and resumed.weights.lookups > 0
    for name in ("losses", "weights"):
        assert torch.equal(getattr(resumed.weights, name), getattr(first.weights, name))
    for name in ("temperature", "fingerprint"):
        assert getattr(resumed.weights, name) == getattr(first.weights, name)
    assert "flow/temperature" in Path("again/metrics.json").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": RegressionData(regression_data(seed=2))}, r"training data set.*changed since"),
        ({"module": LinearRegression(seed=5)}, "pre-trained model changed since"),
    ],
)
def test_a_resumed_run_with_other_data_or_another_reference_is_refused(first, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(fl.FlowWeightingCallback(), ckpt_path=MID, **settings)


def test_a_module_built_from_the_checkpoint_may_resume_but_not_start_a_new_run(first):
    module = LinearRegression.load_from_checkpoint(MID)
    fit(fl.FlowWeightingCallback(), module=module, ckpt_path=MID, max_epochs=2)
    assert module.scored == 0
    with pytest.warns(UserWarning, match="fine-tuned"):
        fit(fl.FlowWeightingCallback(), module=LinearRegression.load_from_checkpoint(MID))


def test_a_checkpoint_without_weights_resumes_with_a_weights_file_alone():
    half()
    with pytest.raises(RuntimeError, match="holds no FLOW weights"):
        fit(fl.FlowWeightingCallback(), ckpt_path=MID)
    fit(fl.FlowWeightingCallback())
    flow = fl.FlowWeightingCallback(weights_file="run/flow_weights.safetensors")
    module, _ = fit(flow, ckpt_path=MID, max_epochs=2)
    assert module.scored == 0 and flow.weights.lookups > 0


def test_a_tuner_in_a_resumed_run_does_not_make_it_a_new_one(first):
    callbacks = LearningRateFinder(num_training_steps=5), fl.FlowWeightingCallback()
    module, _ = fit(*callbacks, ckpt_path=MID, max_epochs=2, enable_checkpointing=True)
    assert module.scored == 0


class MadeLate(LinearRegression):
    """Its parts are made in configure_model."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        self.made = {"body": self.body, "head": self.head}
        del self.body, self.head

    def configure_model(self):
        for name, part in self.made.items():
            setattr(self, name, part)


def test_the_reference_of_a_module_made_in_configure_model_is_known():
    fit(fl.FlowWeightingCallback(), module=MadeLate())
    flow = fl.FlowWeightingCallback(weights_file="run/flow_weights.safetensors")
    fit(flow, module=MadeLate(), default_root_dir="second")
    with pytest.warns(UserWarning, match="the pre-trained model changed"):
        fit(flow, module=MadeLate(seed=1), default_root_dir="third")


def test_a_module_made_in_configure_model_resumes():
    first, again = fl.FlowWeightingCallback(), fl.FlowWeightingCallback()
    half(first, module=MadeLate())
    module, _ = fit(again, module=MadeLate(), max_steps=5, ckpt_path=MID)
    assert module.scored == 0 and torch.equal(again.weights.weights, first.weights.weights)


class Late(SingleDeviceStrategy):
    """Restores checkpoints after on_fit_start, as FSDP and DeepSpeed do."""

    restore_checkpoint_after_setup = True


def fit_tokens(n, **settings):
    callback = fl.FlowWeightingCallback(per="token")
    checkpoint = ModelCheckpoint("ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = language_module(learning_rate=1e-3, schedule="constant", warmup=0.0)
    data = language_data(Path.cwd(), n, batch_size=4, tokens_per_batch=150)
    settings = {"strategy": Late("cpu"), "enable_checkpointing": True} | settings
    fit(callback, checkpoint, module=module, data=data, **settings)
    return callback.weights


def test_late_restored_token_weights_are_checked_and_a_refused_run_overwrites_nothing():
    first = fit_tokens(11, max_steps=1)
    resumed = {"ckpt_path": "ckpt/step=1.ckpt", "max_steps": 2}
    with pytest.raises(ValueError, match="the training data set"):
        fit_tokens(9, **resumed)
    again = fit_tokens(11, **resumed)
    assert torch.equal(again.losses, first.losses) and again.temperature == first.temperature


def test_a_checkpoint_of_a_run_can_be_tested(first):
    class Tested(LinearRegression):
        def test_step(self, batch, batch_idx):
            self.log("loss", self.sample_losses(batch).mean())

    trainer = make_trainer(fl.FlowWeightingCallback())
    (result,) = trainer.test(Tested(), RegressionData().train_dataloader(), ckpt_path="ckpt/mid.ckpt")
    assert result["loss"] > 0
