"""FlowWeightingCallback on a user's own module: what it computes, that it leaves no trace, resume, errors."""

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, random_split

import flow_lightning as fl
from tests.examples import LinearRegression, RegressionData, expected_losses, fit, make_trainer, regression_data
from tests.language import language_data, language_module


def assert_same_parameters(module, other):
    assert module.state_dict().keys() == other.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


class Unweighted(fl.FlowWeightingCallback):
    """Scores and computes everything, then sets all weights to 1: training must be as without it."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        pl_module.sample_weights.weights = torch.ones(len(self.weights))


# -- what it computes ------------------------------------------------------------------------------------------------


def test_weights_are_the_papers():
    flow = fl.FlowWeightingCallback()
    fit(flow)
    losses = expected_losses(regression_data())
    np.testing.assert_allclose(flow.weights.losses.numpy(), losses, rtol=1e-5)
    assert flow.weights.temperature == pytest.approx(np.median(losses), rel=1e-6)
    np.testing.assert_allclose(flow.weights.weights.numpy(), np.exp(-losses / np.median(losses)), rtol=1e-4)


def test_every_sample_is_scored_exactly_once():
    module, _ = fit(fl.FlowWeightingCallback())
    assert module.scored == len(regression_data())


def test_quantile_and_temperature_are_taken():
    losses = expected_losses(regression_data())
    flow = fl.FlowWeightingCallback(quantile=0.75)
    fit(flow)
    assert flow.weights.temperature == pytest.approx(np.quantile(losses, 0.75), rel=1e-5)
    flow = fl.FlowWeightingCallback(temperature=2.0)
    fit(flow)
    assert flow.weights.temperature == 2.0


def test_the_first_step_is_the_weighted_gradient():
    """One step over all samples equals SGD on mean(w_i l_i), written here by hand without the library."""
    data = regression_data()
    flow = fl.FlowWeightingCallback()
    module, _ = fit(flow, data=RegressionData(batch_size=23, shuffle=False), max_steps=1, module=NoDropout())
    fresh = NoDropout().train()
    x, y = data.tensors
    frozen = NoDropout().eval()
    l0 = (frozen(x) - y).square().detach()
    w = torch.exp(-l0 / l0.median())
    (w * (fresh(x) - y).square()).mean().backward()
    for (name, after), before in zip(module.named_parameters(), fresh.parameters()):
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=1e-5, atol=1e-6, msg=name)


class NoDropout(LinearRegression):
    def __init__(self):
        super().__init__()
        self.body[2].p = 0.0


def test_files_of_the_run(tmp_path):
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
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    csv, board = CSVLogger("logs"), TensorBoardLogger("board")
    flow = fl.FlowWeightingCallback()
    fit(flow, logger=[csv, board])
    csv.save()
    with open(f"{csv.log_dir}/metrics.csv") as file:
        assert "flow/temperature" in file.readline()
    events = EventAccumulator(board.log_dir).Reload()
    assert events.Scalars("flow/temperature")[0].value == pytest.approx(flow.weights.temperature)
    assert events.Histograms("flow/weights")[0].histogram_value.num == len(flow.weights)


# -- no trace --------------------------------------------------------------------------------------------------------


class Snapshot(Callback):
    """Take down everything that scoring could disturb, before the first batch."""

    def on_train_start(self, trainer, pl_module):
        self.modes = {name: module.training for name, module in pl_module.named_modules()}
        self.buffers = {name: value.clone() for name, value in pl_module.named_buffers()}
        self.gradients = {name: value.grad for name, value in pl_module.named_parameters()}
        self.requires_grad = [value.requires_grad for value in pl_module.parameters()]
        self.streams = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
        self.stage = trainer.state.stage


@pytest.fixture
def snapshots():
    """The same fit with and without the callback; a part of the model is in evaluation mode, as a user left it."""

    def snapshot(*callbacks):
        module = LinearRegression()
        module.body[1].eval()
        taken = Snapshot()
        fit(*callbacks, taken, module=module)
        return taken

    return snapshot(fl.FlowWeightingCallback()), snapshot()


def test_modes_of_all_submodules_are_as_without_it(snapshots):
    with_flow, without = snapshots
    assert with_flow.modes == without.modes and with_flow.modes["body.1"] is False and with_flow.modes["body.2"] is True
    assert with_flow.stage == without.stage


def test_batch_norm_statistics_are_as_without_it(snapshots):
    with_flow, without = snapshots
    assert all(torch.equal(value, without.buffers[name]) for name, value in with_flow.buffers.items())


def test_gradients_are_as_without_it(snapshots):
    with_flow, without = snapshots
    assert with_flow.gradients == without.gradients == dict.fromkeys(with_flow.gradients)
    assert with_flow.requires_grad == without.requires_grad


def test_random_number_streams_are_as_without_it(snapshots):
    with_flow, without = snapshots
    assert torch.equal(with_flow.streams[0], without.streams[0])
    assert np.array_equal(with_flow.streams[1], without.streams[1])
    assert with_flow.streams[2] == without.streams[2]


@pytest.mark.parametrize(
    "loader", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=["0", "2", "persistent"]
)
def test_batches_and_training_are_as_without_it(loader):
    """Two epochs in the same order, none empty, and with weights of 1 the same parameters to the last bit."""
    plain, _ = fit(data=RegressionData(**loader), max_epochs=2)
    flow, _ = fit(Unweighted(), data=RegressionData(**loader), max_epochs=2)
    assert len(flow.seen) == len(plain.seen) == 12
    assert all(torch.equal(one, other) for one, other in zip(flow.seen, plain.seen))
    assert_same_parameters(flow, plain)


def test_gradients_that_were_there_stay():
    module, kept = LinearRegression(), []

    class Gradient(Callback):
        def __init__(self, value=None):
            self.value = value

        def on_fit_start(self, trainer, pl_module):
            if self.value is not None:
                pl_module.head.weight.grad = self.value
            kept.append(pl_module.head.weight.grad)

    fit(Gradient(torch.ones(1, 8)), fl.FlowWeightingCallback(), Gradient(), module=module)
    assert kept[1] is kept[0] and torch.equal(kept[1], torch.ones(1, 8))


@pytest.mark.parametrize(
    "dataset",
    [
        Subset(regression_data(), [5, 3, 8, 20, 1, 2]),
        ConcatDataset([regression_data(9), regression_data(6, seed=3)]),
        random_split(regression_data(), [16, 7], torch.Generator().manual_seed(0))[0],
    ],
    ids=["Subset", "ConcatDataset", "random_split"],
)
def test_composed_data_sets_work(dataset):
    flow = fl.FlowWeightingCallback()
    fit(flow, data=RegressionData(dataset))
    np.testing.assert_allclose(flow.weights.losses.numpy(), expected_losses(dataset), rtol=1e-4)


@pytest.mark.parametrize("tuner", ["learning rate", "batch size"])
def test_tuners_that_run_before_it_work(tuner):
    flow = fl.FlowWeightingCallback()
    module = LinearRegression()
    reference = expected_losses(regression_data())
    data = RegressionData()
    if tuner == "learning rate":
        callback = LearningRateFinder(num_training_steps=5)
    else:
        data.batch_size = 2
        data.train_dataloader = lambda: DataLoader(data.dataset, batch_size=data.batch_size)
        callback = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    fit(callback, flow, module=module, data=data, enable_checkpointing=True)
    np.testing.assert_allclose(flow.weights.losses.numpy(), reference, rtol=1e-5)
    assert module.sample_weights is None and flow.weights.lookups > 0


def test_limit_train_batches_works():
    flow = fl.FlowWeightingCallback()
    module, _ = fit(flow, limit_train_batches=2)
    assert len(flow.weights) == 23 and len(module.seen) == 2


def test_a_later_fit_without_it_is_plain_training():
    module, _ = fit(fl.FlowWeightingCallback())
    assert module.sample_weights is None


def test_a_module_of_its_own_train_dataloader_works():
    class WithData(LinearRegression):
        def train_dataloader(self):
            return RegressionData().train_dataloader()

    flow = fl.FlowWeightingCallback()
    make_trainer(flow).fit(WithData())
    assert len(flow.weights) == 23


@pytest.mark.parametrize("given", [True, False])
def test_a_bare_loader_works(given):
    loader = RegressionData().train_dataloader()
    flow = fl.FlowWeightingCallback(dataloader=loader if given else None)
    make_trainer(flow).fit(LinearRegression(), loader)
    np.testing.assert_allclose(flow.weights.losses.numpy(), expected_losses(regression_data()), rtol=1e-5)


# -- resume ----------------------------------------------------------------------------------------------------------


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


# -- errors that name the fix ----------------------------------------------------------------------------------------


def test_an_iterable_data_set_names_what_to_do():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from regression_data()

    loader = DataLoader(Stream(), batch_size=4)
    with pytest.raises(TypeError, match=r"map-style data set.*IndexedDataset"):
        make_trainer(fl.FlowWeightingCallback(dataloader=loader)).fit(LinearRegression(), loader)


def test_a_module_without_sample_losses_names_the_base_class():
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(TypeError, match="WeightedLossModule"):
        make_trainer(fl.FlowWeightingCallback()).fit(BoringModel())


def test_a_module_that_never_looks_up_a_weight_is_refused():
    class Forgetful(LinearRegression):
        def training_step(self, batch, batch_idx):
            return self.sample_losses(batch).mean()

    with pytest.raises(RuntimeError, match="did not look up a weight"):
        fit(fl.FlowWeightingCallback(), module=Forgetful())


def test_losses_reduced_over_the_batch_are_refused():
    class Reduced(LinearRegression):
        def sample_losses(self, batch):
            return super().sample_losses(batch).mean()

    with pytest.raises(ValueError, match=r"one loss per sample, \[B\]"):
        fit(fl.FlowWeightingCallback(), module=Reduced())


def test_a_nan_loss_names_the_samples():
    data = regression_data()
    data.tensors[1][[2, 17]] = float("nan")
    with pytest.raises(ValueError, match="2 of 23 losses are NaN or infinite: samples 2, 17"):
        fit(fl.FlowWeightingCallback(), data=RegressionData(data))


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        make_trainer(fl.FlowWeightingCallback()).fit(
            LinearRegression(), datamodule=RegressionData(regression_data(0), shuffle=False)
        )


def test_several_loaders_name_the_ways_to_give_one():
    loaders = [RegressionData().train_dataloader(), RegressionData().train_dataloader()]
    with pytest.raises(TypeError, match=r"one DataLoader, but found list.*scoring_dataloader"):
        make_trainer(fl.FlowWeightingCallback()).fit(LinearRegression(), loaders)


def test_scored_and_trained_data_of_different_length_are_refused():
    class Two(RegressionData):
        def scoring_dataloader(self):
            return DataLoader(fl.IndexedDataset(regression_data(20)), batch_size=4)

    with pytest.raises(ValueError, match="20 samples were scored but the training set has 23"):
        fit(fl.FlowWeightingCallback(), data=Two())


def test_random_transforms_are_warned_of():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 23

        def __getitem__(self, index):
            x, y = regression_data()[index]
            return x + torch.randn(4), y

    with pytest.warns(UserWarning, match="scoring_dataloader"):
        fit(fl.FlowWeightingCallback(), data=RegressionData(Noisy()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*(workers|training batches).*")
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


class Boom(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise RuntimeError("out of memory")


def test_a_fit_that_failed_leaves_no_weights_in_the_module():
    module = LinearRegression()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(fl.FlowWeightingCallback(), Boom(), module=module)
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
