"""FlowWeightingCallback on a user's own module: what it computes, that it leaves no trace, resume, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import flow_lightning as fl
from tests.examples import Kill, LinearRegression, RegressionData, expected_losses, fit, make_trainer, regression_data
from tests.unchanged import Classifier, data

# -- what it computes ------------------------------------------------------------------------------------------------


def test_weights_are_the_papers():
    flow = fl.FlowWeightingCallback()
    module, _ = fit(flow)
    losses = expected_losses(regression_data())
    assert module.scored == len(losses) and module.sample_weights is None
    np.testing.assert_allclose(flow.weights.losses.numpy(), losses, rtol=1e-5)
    assert flow.weights.temperature == pytest.approx(np.median(losses), rel=1e-6)
    np.testing.assert_allclose(flow.weights.weights.numpy(), np.exp(-losses / np.median(losses)), rtol=1e-4)


def test_quantile_and_temperature_are_taken():
    expected = np.quantile(expected_losses(regression_data()), 0.75)
    for arguments, temperature in (({"quantile": 0.75}, expected), ({"temperature": 2.0}, 2.0)):
        flow = fl.FlowWeightingCallback(**arguments)
        fit(flow)
        assert flow.weights.temperature == pytest.approx(temperature, rel=1e-5)


class NoDropout(LinearRegression):
    def __init__(self):
        super().__init__()
        self.body[2].p = 0.0


class Ordinary(NoDropout):
    """Looks no weight up by itself."""

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


@pytest.mark.parametrize("kind", [NoDropout, Ordinary])
def test_the_first_step_is_the_weighted_gradient(kind):
    """One step over all samples equals SGD on mean(w_i l_i), written here by hand without the library."""
    data = regression_data()
    flow = fl.FlowWeightingCallback()
    module, _ = fit(flow, data=RegressionData(batch_size=23, shuffle=False), max_steps=1, module=kind())
    fresh = NoDropout().train()
    x, y = data.tensors
    frozen = NoDropout().eval()
    l0 = (frozen(x) - y).square().detach()
    w = torch.exp(-l0 / l0.median())
    (w * (fresh(x) - y).square()).mean().backward()
    for (name, after), before in zip(module.named_parameters(), fresh.parameters()):
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_files_of_the_run(tmp_path, rendered):
    flow = fl.FlowWeightingCallback()
    _, trainer = fit(flow, logger=CSVLogger("logs"))
    folder = tmp_path / trainer.log_dir
    saved = fl.SampleWeights.load(folder / "flow_weights.safetensors")
    assert torch.equal(saved.weights, flow.weights.weights.cpu())
    assert (folder / "flow_weights.png").read_bytes().startswith(b"\x89PNG")
    metrics = (folder / "metrics.json").read_text()
    for key in ("flow/temperature", "flow/mean_weight", "flow/effective_sample_size", "time/scoring_s"):
        assert key in metrics


def test_every_logger_gets_the_numbers_and_tensorboard_the_histogram():
    csv, board = CSVLogger("logs"), TensorBoardLogger("board")
    flow = fl.FlowWeightingCallback()
    fit(flow, logger=[csv, board])
    csv.save()
    assert "flow/temperature" in Path(csv.log_dir, "metrics.csv").read_text()
    events = EventAccumulator(board.log_dir).Reload()
    assert events.Scalars("flow/temperature")[0].value == pytest.approx(flow.weights.temperature)
    assert events.Histograms("flow/weights")[0].histogram_value.num == len(flow.weights)


class WithData(LinearRegression):
    def train_dataloader(self):
        return RegressionData().train_dataloader()


LOADER = RegressionData().train_dataloader()


@pytest.mark.parametrize(
    ("module", "scored", "trained"),
    [(WithData, None, None), (LinearRegression, None, LOADER), (LinearRegression, LOADER, LOADER)],
)
def test_a_bare_loader_works(module, scored, trained):
    """The module's own, or one that is given to `fit`, or also to the callback."""
    flow = fl.FlowWeightingCallback(scoring_dataset=scored)
    make_trainer(flow).fit(module(), trained)
    np.testing.assert_allclose(flow.weights.losses.numpy(), expected_losses(regression_data()), rtol=1e-5)


# -- errors that name the fix ----------------------------------------------------------------------------------------


class Reduced(LinearRegression):
    def sample_losses(self, batch):
        return super().sample_losses(batch).mean()


def broken_data():
    data = regression_data()
    data.tensors[1][[2, 17]] = float("nan")
    return RegressionData(data)


class Two(RegressionData):
    def scoring_dataloader(self):
        return DataLoader(fl.IndexedDataset(regression_data(20)), batch_size=4)


@pytest.mark.parametrize(
    ("module", "data", "error", "message"),
    [
        (BoringModel, lambda: None, ValueError, r"train_dataloader\(\) gives other samples"),  # drawn anew each time
        (Reduced, RegressionData, ValueError, r"one loss per sample, \[B\]"),
        (LinearRegression, broken_data, ValueError, "2 of 23 losses are NaN or infinite: samples 2, 17"),
        (LinearRegression, lambda: RegressionData(regression_data(0), shuffle=False), ValueError, "empty"),
        (LinearRegression, Two, ValueError, "20 samples were scored but the training set has 23"),
    ],
)
def test_what_cannot_be_weighed_is_an_error_that_names_the_fix(module, data, error, message):
    with pytest.raises(error, match=message):
        make_trainer(fl.FlowWeightingCallback()).fit(module(), data())


@pytest.mark.parametrize("first", [0, 1])
def test_a_hook_that_gives_other_samples_each_time_is_refused(first):
    class Split(Classifier):
        calls = 0

        def train_dataloader(self):
            self.calls += 1
            seed = max(self.calls - 1, first)  # the second call, which is trained on, or the third, of the next epoch
            part, _ = torch.utils.data.random_split(whole, [20, 3], torch.Generator().manual_seed(seed))
            return DataLoader(part, 4)

    whole = data()
    with pytest.raises(ValueError, match=r"other samples than when they were scored.*setup"):
        make_trainer(fl.FlowWeightingCallback(), max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(Split())


@pytest.mark.filterwarnings("error::UserWarning", "ignore:.*(workers|training batches).*")
def test_a_sound_fit_warns_of_nothing():
    fit(fl.FlowWeightingCallback())


def test_hooks_that_augment_while_training_do_not_touch_the_scores():
    class Augmented(LinearRegression):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training:
                batch.sample[0].add_(torch.randn_like(batch.sample[0]))
            return batch

    flow = fl.FlowWeightingCallback()
    fit(flow, module=Augmented())
    np.testing.assert_allclose(flow.weights.losses.numpy(), expected_losses(regression_data()), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_an_unusable_temperature_is_refused_at_once(temperature):
    with pytest.raises(ValueError, match="positive"):
        fl.FlowWeightingCallback(temperature=temperature)


@pytest.mark.parametrize("broken", ["run", "checkpoints"])
def test_a_folder_that_cannot_be_written_to_stops_the_fit_before_scoring(broken):
    """As root every folder is writable, so that a file stands in the place of the folder."""
    Path("file").write_text("")
    places = {"run": "run", "checkpoints": "checkpoints"} | {broken: f"file/{broken}"}
    checkpoint = ModelCheckpoint(places["checkpoints"])
    module = LinearRegression()
    with pytest.raises(OSError, match=f"file/{broken}"):
        settings = {"default_root_dir": places["run"], "enable_checkpointing": True}
        fit(fl.FlowWeightingCallback(), checkpoint, module=module, **settings)
    assert module.scored == 0


def test_a_fit_that_failed_leaves_no_weights_in_the_module():
    module = LinearRegression()
    with pytest.raises(SystemExit):
        fit(fl.FlowWeightingCallback(), Kill(0), module=module)
    assert module.sample_weights is None


class ModuleHook(LinearRegression):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        raise AssertionError("Lightning asks the data module, which has this hook, too")


class DataHook(RegressionData):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        (x, y), index = batch
        return fl.IndexedSample([2 * x, y], index)


def test_of_two_hooks_that_of_the_data_module_counts():
    flow = fl.FlowWeightingCallback()
    fit(flow, module=ModuleHook(), data=DataHook())
    x, y = regression_data().tensors
    np.testing.assert_allclose(
        flow.weights.losses.numpy(), expected_losses(TensorDataset(2 * x, y)), rtol=1e-4, atol=1e-7
    )
