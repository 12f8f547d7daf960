"""The head refitted after training."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression

import flow_lightning as fl
from tests.callbacks.test_linear_probe import all_images
from tests.examples import LinearRegression, fit, make_trainer
from tests.images import PictureData, tiny_module


def test_the_refitted_head_is_the_solution_on_the_fine_tuned_body():
    module = tiny_module(learning_rate=0.05)
    make_trainer(fl.HeadRefitCallback(), max_epochs=2).fit(module, datamodule=PictureData())
    batch = all_images(PictureData())
    with torch.no_grad():
        features = module.eval().features(batch).double().numpy()
    mean, scale = features.mean(0), features.var(0).mean() ** 0.5
    strength = json.loads(Path("run/metrics.json").read_text())["refit/strength"]
    reference = LogisticRegression(C=1 / (strength * 30), tol=1e-10, max_iter=100_000)
    expected = reference.fit((features - mean) / scale, batch["target"].numpy()).predict_proba(
        (features - mean) / scale
    )
    with torch.no_grad():
        torch.testing.assert_close(
            module(batch["image"]).softmax(1), torch.from_numpy(expected).float(), rtol=0, atol=5e-3
        )


def test_the_refitted_model_is_saved():
    module = tiny_module()
    make_trainer(fl.HeadRefitCallback(), enable_checkpointing=True).fit(module, datamodule=PictureData())
    saved = torch.load("run/checkpoints/refitted.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["model.fc.weight"], module.head.weight)


def test_an_unsuitable_module_is_refused_before_training():
    module = LinearRegression()
    with pytest.raises(TypeError, match=r"features\(batch\)"):
        fit(fl.HeadRefitCallback(), module=module)
    assert not module.seen
