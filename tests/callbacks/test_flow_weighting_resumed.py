"""A resumed fit: the weights of its checkpoint, scored by nobody again; what does not belong to it is refused."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

import flow_lightning as fl
from tests.examples import LinearRegression, RegressionData, fit, regression_data
from tests.language import language_data, language_module


def interrupted(flow=None, **settings):
    """Four steps of the six of an epoch, then a checkpoint in its middle."""
    checkpoint = ModelCheckpoint("ckpt", filename="mid", every_n_train_steps=4, save_top_k=1)
    return fit(flow or fl.FlowWeightingCallback(), checkpoint, enable_checkpointing=True, max_steps=4, **settings)


def test_a_run_resumed_in_mid_epoch_scores_nothing_and_has_the_same_weights():
    first = fl.FlowWeightingCallback()
    interrupted(first)
    resumed = fl.FlowWeightingCallback()
    module, trainer = fit(resumed, ckpt_path="ckpt/mid.ckpt", max_epochs=2)
    assert module.scored == 0
    assert trainer.global_step > 4 and resumed.weights.lookups > 0
    for name in ("losses", "weights"):
        assert torch.equal(getattr(resumed.weights, name), getattr(first.weights, name))
    assert (resumed.weights.temperature, resumed.weights.fingerprint) == (
        first.weights.temperature,
        first.weights.fingerprint,
    )


def test_the_checkpoint_holds_tensors_and_primitives_only():
    interrupted()
    state = torch.load("ckpt/mid.ckpt", weights_only=True)
    assert any("FlowWeightingCallback" in name for name in state["callbacks"])


def test_a_resumed_run_with_other_data_is_refused():
    interrupted()
    with pytest.raises(ValueError, match=r"training data set.*changed since"):
        fit(fl.FlowWeightingCallback(), ckpt_path="ckpt/mid.ckpt", data=RegressionData(regression_data(seed=2)))


def test_a_resumed_run_with_another_reference_is_refused():
    interrupted()
    with pytest.raises(ValueError, match="pre-trained model changed since"):
        fit(fl.FlowWeightingCallback(), ckpt_path="ckpt/mid.ckpt", module=LinearRegression(seed=5))


def test_a_module_built_from_the_checkpoint_may_resume():
    interrupted()
    module = LinearRegression.load_from_checkpoint("ckpt/mid.ckpt")
    module, _ = fit(fl.FlowWeightingCallback(), module=module, ckpt_path="ckpt/mid.ckpt", max_epochs=2)
    assert module.scored == 0


def test_a_fine_tuned_module_as_the_reference_of_a_new_run_is_warned_of():
    interrupted()
    module = LinearRegression.load_from_checkpoint("ckpt/mid.ckpt")
    with pytest.warns(UserWarning, match="fine-tuned"):
        fit(fl.FlowWeightingCallback(), module=module)


def test_a_checkpoint_without_weights_is_refused():
    checkpoint = ModelCheckpoint("ckpt", filename="plain", every_n_train_steps=4)
    fit(checkpoint, enable_checkpointing=True, max_steps=4)
    with pytest.raises(RuntimeError, match="holds no FLOW weights"):
        fit(fl.FlowWeightingCallback(), ckpt_path="ckpt/plain.ckpt")


def test_a_checkpoint_without_weights_resumes_with_a_weights_file():
    fit(fl.FlowWeightingCallback())
    checkpoint = ModelCheckpoint("ckpt", filename="plain", every_n_train_steps=4)
    fit(checkpoint, enable_checkpointing=True, max_steps=4)
    flow = fl.FlowWeightingCallback(weights_file="run/flow_weights.safetensors")
    module, _ = fit(flow, ckpt_path="ckpt/plain.ckpt", max_epochs=2)
    assert module.scored == 0 and flow.weights.lookups > 0


def test_a_resumed_run_reports_its_weights_too(tmp_path):
    interrupted()
    fit(fl.FlowWeightingCallback(), ckpt_path="ckpt/mid.ckpt", max_epochs=2, default_root_dir="again")
    assert "flow/temperature" in (tmp_path / "again" / "metrics.json").read_text()


def test_a_tuner_in_a_resumed_run_does_not_make_it_a_new_one():
    interrupted()
    module, _ = fit(
        LearningRateFinder(num_training_steps=5),
        fl.FlowWeightingCallback(),
        ckpt_path="ckpt/mid.ckpt",
        max_epochs=2,
        enable_checkpointing=True,
    )
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
    checkpoint = ModelCheckpoint("ckpt", filename="mid", every_n_train_steps=2)
    first, again = fl.FlowWeightingCallback(), fl.FlowWeightingCallback()
    fit(first, checkpoint, module=MadeLate(), max_steps=2, enable_checkpointing=True)
    module, _ = fit(again, module=MadeLate(), max_steps=3, ckpt_path="ckpt/mid.ckpt")
    assert module.scored == 0 and torch.equal(again.weights.weights, first.weights.weights)


class Late(SingleDeviceStrategy):
    """Restores checkpoints after on_fit_start, as FSDP and DeepSpeed do."""

    restore_checkpoint_after_setup = True


def fit_tokens(n, strategy="auto", ckpt_path=None, max_steps=1, **flow):
    callback = fl.FlowWeightingCallback(per="token", **flow)
    fit(
        callback,
        ModelCheckpoint("ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1),
        module=language_module(learning_rate=1e-3, schedule="constant", warmup=0.0),
        data=language_data(Path.cwd(), n, batch_size=4, tokens_per_batch=150),
        max_steps=max_steps,
        enable_checkpointing=True,
        ckpt_path=ckpt_path,
        strategy=strategy,
    )
    return callback.weights


def test_late_restored_token_weights_are_checked_and_a_refused_run_overwrites_nothing():
    first = fit_tokens(11, Late("cpu"))
    with pytest.raises(ValueError, match="the training data set"):
        fit_tokens(9, Late("cpu"), "ckpt/step=1.ckpt", max_steps=2)
    again = fit_tokens(11, Late("cpu"), "ckpt/step=1.ckpt", max_steps=2)
    assert torch.equal(again.losses, first.losses) and again.temperature == first.temperature
