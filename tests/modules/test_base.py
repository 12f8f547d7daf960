"""The example of the README and of `WeightedLossModule`'s docstring, through public names alone."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import flow_lightning as fl
from tests.examples import LinearRegression, fit


def test_training_without_the_callback_is_plain_training():
    module, _ = fit()
    assert module.sample_weights is None and module.scored == 0


def test_weighted_loss_is_numpys():
    module = LinearRegression().eval()
    batch = next(iter(DataLoader(fl.IndexedDataset([(torch.ones(4), torch.tensor(0.0))] * 6), 6)))
    losses = torch.rand(6)
    module.sample_weights = fl.SampleWeights.from_losses(torch.rand(6) + 0.1)
    w = module.sample_weights.weights.numpy()
    assert module.weighted_loss(batch, losses).item() == pytest.approx((w * losses.numpy()).sum() / 6)
    module.reduction = "weights"
    assert module.weighted_loss(batch, losses).item() == pytest.approx(np.average(losses.numpy(), weights=w))


def test_a_module_without_sample_losses_says_so():
    with pytest.raises(NotImplementedError, match="sample_losses"):
        fl.WeightedLossModule().sample_losses({})


def test_weights_are_no_part_of_the_model():
    """Weight averaging pairs parameters and buffers by position: the weights must be neither."""
    module = LinearRegression()
    names = set(module.state_dict())
    module.sample_weights = fl.SampleWeights.from_losses(torch.rand(6) + 0.1)
    assert set(module.state_dict()) == names and len(list(module.buffers())) == 3


def test_weight_averaging_works_beside_it():
    from lightning.pytorch.callbacks import WeightAveraging

    module, trainer = fit(fl.FlowWeightingCallback(), WeightAveraging())
    assert trainer.global_step == 6 and all(torch.isfinite(p).all() for p in module.parameters())


def test_the_readmes_example_runs(tmp_path):
    from pathlib import Path

    text = (Path(__file__).parents[2] / "README.md").read_text()
    example = text.split("<!-- example -->")[1].split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["trainer"].global_step > 0 and scope["flow"].weights.lookups > 0
    assert (tmp_path / "lightning_logs").exists() or list(tmp_path.rglob("flow_weights.safetensors"))
