"""What a budget cannot be on is refused before anything is trained."""

import re
from pathlib import Path

import pytest
import torch
from lightning import Callback

from tests import unchanged
from tests.callbacks.test_retention_budget import budget
from tests.retention import image_fit, labelled_images, language_fit, unlabelled_images


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1.0}, r"keep is 1\.0; expected a number between 0 and 1"),
        ({"confidence": 95}, "confidence is 95; expected a number between 0 and 1"),
        ({"of": "loss"}, "of is 'loss'; expected one of accuracy, agreement, perplexity"),
        ({"of": "accuracy"}, "of='accuracy' needs data: labelled images"),
        ({"of": "perplexity"}, "of='perplexity' needs data: text files"),
        ({"alphas": [0.5, 0.25]}, r"alphas are \[0\.5, 0\.25\]; expected different numbers"),
        ({"shape": "round"}, "shape is 'round'"),
    ],
)
def test_a_wrong_argument_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        budget(**settings)


class NoTraining(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise AssertionError("trained")


def wrong_labels(folder):
    path = Path(labelled_images(folder))
    path.write_text(re.sub(r",\d+", ",0", path.read_text()))
    return str(path)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (unlabelled_images, {"keep": 0.98, "confidence": 0.95}, "needs at least 149 samples; it has 4"),
        (wrong_labels, {"of": "accuracy"}, r"at least 1 images that the pre-trained model has right; it has 0"),
        (unlabelled_images, {"of": "accuracy"}, "have no labels, so a budget cannot be on accuracy"),
    ],
)
def test_an_unfit_retention_set_is_refused_before_training(tmp_path, images, settings, message):
    with pytest.raises(ValueError, match=message):
        image_fit(budget(data=images(tmp_path), **settings), NoTraining())


def test_answers_need_logits():
    class Regression(unchanged.Classifier):
        def training_step(self, batch, batch_idx):
            return torch.nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1].float())

    with pytest.raises(TypeError, match="no cross-entropy has one row of logits for each sample"):
        unchanged.fit(Regression(), unchanged.data(), budget(), NoTraining(), max_epochs=1)


def test_answers_of_a_language_model_need_texts():
    with pytest.raises(TypeError, match="give text files"):
        language_fit(budget(), NoTraining())
