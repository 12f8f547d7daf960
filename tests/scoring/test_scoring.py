"""The weights file: used while it is true, scored anew when anything changed, continued after an interruption."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from lightning import Callback

import flow_lightning as fl
from flow_lightning.scoring import score
from tests.examples import LinearRegression, RegressionData, fit, regression_data
from tests.images import PictureData, tiny_module
from tests.language import language_data, language_module

FILE = "weights/w.safetensors"
#: Of 80 samples in batches of 4, those of the 8 batches that are scored anew before a file is believed.
CHECKED = 8 * 4


def fit_with_file(module=None, data=None, **settings):
    """Fit with a weights file; return weights, and how many samples were scored."""
    flow = fl.FlowWeightingCallback(weights_file=FILE)
    data = RegressionData(regression_data(80)) if data is None else data
    module, _ = fit(flow, module=module, data=data, **settings)
    return flow.weights, module.scored


@pytest.fixture
def first():
    return fit_with_file()[0]


def fit_without_a_word(**settings):
    """Fit with a weights file that is true: nothing may warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*anew.*")
        return fit_with_file(**settings)


# -- used while it is true -------------------------------------------------------------------------------------------


def test_a_true_file_takes_the_place_of_scoring(first):
    again, scored = fit_without_a_word(default_root_dir="second")
    assert scored == CHECKED
    assert torch.equal(again.weights, first.weights) and again.temperature == first.temperature
    assert Path("second/flow_weights.safetensors").exists()


def test_the_file_of_a_runs_directory_serves_as_well(first):
    os.renames("run/flow_weights.safetensors", FILE)
    again, scored = fit_without_a_word(default_root_dir="second")
    assert scored == CHECKED and torch.equal(again.weights, first.weights)


def test_another_temperature_needs_no_scoring(first):
    flow = fl.FlowWeightingCallback(weights_file=FILE, temperature=2.0)
    module, _ = fit(flow, data=RegressionData(regression_data(80)))
    assert module.scored == CHECKED
    torch.testing.assert_close(flow.weights.weights, torch.exp(-first.losses / 2.0))


def test_one_process_and_two_believe_each_others_files(first):
    class Record(Callback):
        def on_train_start(self, trainer, pl_module):
            torch.save([pl_module.sample_weights.weights, pl_module.scored], f"rank{trainer.global_rank}.pt")

    flow = fl.FlowWeightingCallback(weights_file=FILE)
    fit(flow, Record(), data=RegressionData(regression_data(80)), devices=2, strategy="ddp_fork")
    for rank in (0, 1):
        weights, scored = torch.load(f"rank{rank}.pt", weights_only=True)
        assert scored == CHECKED // 2 and torch.equal(weights, first.weights)


def test_the_loader_of_a_scoring_is_built_once_per_fit():
    class Counted(PictureData):
        built = 0

        def scoring_dataloader(self):
            self.built += 1
            return super().scoring_dataloader()

    data = Counted()
    fit(fl.LinearProbeCallback(refit=True), fl.FlowWeightingCallback(), module=tiny_module(), data=data)
    assert data.built == 1


# -- scored anew when something changed ------------------------------------------------------------------------------


def assert_scored_anew(message, module=None, data=None):
    """The fit says why, scores all samples, and the file is true again."""
    with pytest.warns(UserWarning, match=f"{message}.*anew"):
        weights, scored = fit_with_file(module, data)
    assert scored >= len(weights)
    again, _ = fit_without_a_word(module=None if module is None else type(module)(), data=data)
    assert torch.equal(again.weights, weights.weights)
    return weights


class Reseeded(LinearRegression):
    def __init__(self):
        super().__init__(seed=1)


def test_other_data_and_another_model_are_noticed(first):
    assert_scored_anew("training data set .* changed", data=RegressionData(regression_data(80, seed=2)))
    fit_with_file()
    assert_scored_anew("pre-trained model changed", Reseeded())


NUMBERS = r"sample \d+: [\d.e+]+ now, [\d.e+]+ in the file"


def test_one_changed_loss_in_a_checked_batch_is_named(first):
    class OneOff(LinearRegression):
        def sample_losses(self, batch):
            losses = super().sample_losses(batch)
            return torch.where(batch.index == 79, 12.5, losses)

    assert_scored_anew(r"sample 79: 12\.5 now", OneOff())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda first: os.truncate(FILE, 200), "not a usable"),
        (lambda first: fl.TokenWeights.from_losses(torch.ones(2), torch.tensor([0, 2])).save(FILE), "its format is"),
        (lambda first: first.save(FILE), "holds weights alone"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_and_replaced(first, damage, message):
    damage(first)
    assert_scored_anew(message)


# -- continued after an interruption ---------------------------------------------------------------------------------


class Interrupted(LinearRegression):
    """Stops in the third batch of scoring while the environment says so."""

    def sample_losses(self, batch):
        if not self.training and self.scored >= 8 and "STOP" in os.environ:
            raise KeyboardInterrupt
        return super().sample_losses(batch) * float(os.environ.get("FACTOR", 1.0))


@pytest.fixture
def interrupted(monkeypatch, first):
    """A scoring that was killed after two blocks of one batch each."""
    os.remove(FILE)
    monkeypatch.setattr(score, "_SECONDS_PER_BLOCK", 0.0)
    monkeypatch.setenv("STOP", "1")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit_with_file(Interrupted())
    monkeypatch.delenv("STOP")
    assert len(list(Path(f"{FILE}.blocks").iterdir())) == 2 and not Path(FILE).exists()
    return first


def test_an_interrupted_scoring_continues_from_its_blocks(interrupted):
    weights, scored = fit_without_a_word(module=Interrupted())
    assert torch.equal(weights.weights, interrupted.weights)
    assert scored == 80 - 8 + 8  # the two blocks are not scored again, but one batch of each is checked
    assert [file.name for file in Path("weights").iterdir()] == ["w.safetensors"]
    assert fit_without_a_word(module=Interrupted())[1] == CHECKED


def test_blocks_that_are_no_longer_true_are_scored_anew(interrupted, monkeypatch):
    monkeypatch.setenv("FACTOR", "2.0")
    with pytest.warns(UserWarning, match=rf"Blocks of .* are no longer true: {NUMBERS}"):
        weights, _ = fit_with_file(Interrupted())
    torch.testing.assert_close(weights.losses, 2 * interrupted.losses)
    assert torch.equal(weights.losses, fl.SampleWeights.load(FILE).losses)


# -- probes and tokens -----------------------------------------------------------------------------------------------


class CountFeatures(Callback):
    """Count the images that go through the body before the first step, and keep the head."""

    def setup(self, trainer, pl_module, stage):
        self.images, features = 0, pl_module.features

        def counted(batch):
            self.images += len(batch["image"])
            return features(batch)

        pl_module.features = counted

    def on_train_start(self, trainer, pl_module):
        self.head = pl_module.head.weight.clone()


def probed(n=96, **probe):
    flow, counter = fl.FlowWeightingCallback(weights_file=FILE), CountFeatures()
    callbacks = [fl.LinearProbeCallback(refit=False, **probe), flow, counter]
    fit(*callbacks, module=tiny_module(), data=PictureData(n, batch_size=4))
    return flow.weights, counter


@pytest.mark.slow
def test_the_same_file_serves_the_same_probe_alone():
    weights, counter = probed()
    assert counter.images == 96
    again, checked = probed()
    assert checked.images == CHECKED
    assert torch.equal(again.weights, weights.weights) and torch.equal(checked.head, counter.head)
    with pytest.warns(UserWarning, match=r"holds linear probe, .* folds 0, not .* folds 3.*anew"):
        _, counter = probed(folds=3)
    assert counter.images == 96


def test_an_interrupted_probe_continues_from_its_features(monkeypatch):
    expected, _ = probed()
    os.remove(FILE)
    monkeypatch.setattr(score, "_SECONDS_PER_BLOCK", 0.0)
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr("flow_lightning.scoring.kinds.fit_probe", lambda *args, **kwargs: 1 / 0)
        probed()
    weights, counter = probed()
    assert torch.equal(weights.weights, expected.weights)
    assert counter.images == 96  # one batch of each block of one batch: checked


@pytest.mark.filterwarnings("error:.*anew.*")
def test_the_same_file_serves_tokens(tmp_path):
    results = []
    for _ in range(2):
        flow = fl.FlowWeightingCallback(per="token", weights_file=FILE)
        data = language_data(tmp_path, 40, batch_size=4, tokens_per_batch=150)
        fit(flow, module=language_module(), data=data)
        results.append(flow.weights)
    first, again = results
    assert torch.equal(first.losses, again.losses) and torch.equal(first.offsets, again.offsets)
    assert again.temperature == first.temperature and torch.equal(first.weights, again.weights)


def test_tokens_and_a_probe_do_not_go_together():
    module = tiny_module()
    module.token_losses = module.sample_losses
    with pytest.raises(ValueError, match="use one of the two callbacks"):
        fit(fl.FlowWeightingCallback(per="token"), fl.LinearProbeCallback(), module=module, data=PictureData())
