"""Losses and probes are found by a later fit on the same model, data and transforms, and only then."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import flow_lightning as fl
from flow_lightning.callbacks import sweep as sweep_module
from flow_lightning.data.images import ImageDataModule
from tests.examples import LinearRegression, RegressionData, fit, regression_data
from tests.images import PictureData, tiny_module


def scored(module=None, data=None, times=1, flow=None, **settings) -> int:
    """Fit, and count the samples that the frozen model looked at."""
    module = LinearRegression() if module is None else module
    flow = fl.FlowWeightingCallback(cache="cache") if flow is None else flow
    fit(flow, module=module, data=data, **settings)
    return module.scored


def test_a_second_fit_looks_at_nothing_and_has_the_same_weights():
    first, second = (fl.FlowWeightingCallback(cache="cache") for _ in range(2))
    assert scored(flow=first) == 23
    assert scored(LinearRegression(learning_rate=0.5), flow=second) == 0  # the rate does not matter for the losses
    assert torch.equal(first.weights.weights, second.weights.weights)


def test_temperature_and_rule_are_applied_to_cached_losses():
    scored()
    flow = fl.FlowWeightingCallback(cache="cache", temperature=0.5, weighting="threshold")
    assert scored(flow=flow) == 0
    assert torch.equal(flow.weights.weights, (flow.weights.losses < 0.5).float())


def test_force_scores_anew_and_replaces():
    scored()
    (path,) = Path("cache").glob("*/whole.safetensors")
    written = path.stat().st_mtime_ns
    assert scored(flow=fl.FlowWeightingCallback(cache="cache", force=True)) == 23
    assert path.stat().st_mtime_ns > written


@pytest.mark.parametrize("cache", [False, True])
def test_no_cache_is_used_if_none_is_wanted(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("FLOW_LIGHTNING_CACHE", str(tmp_path / "cache") if not cache else "")
    for _ in range(2):
        assert scored(flow=fl.FlowWeightingCallback(cache=cache)) == 23
    assert not Path("cache").exists()


def test_the_users_cache_is_found_automatically(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOW_LIGHTNING_CACHE", str(tmp_path / "mine"))
    assert scored(flow=fl.FlowWeightingCallback()) == 23
    assert scored(flow=fl.FlowWeightingCallback(), default_root_dir="another") == 0


class OtherLoss(LinearRegression):
    def sample_losses(self, batch):
        return super().sample_losses(batch) + 0


class Doubled(RegressionData):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        (x, y), index = batch
        return fl.IndexedDataset([0])[0].__class__([x * 2, y], index)


def with_changed(parameter):
    module = LinearRegression()
    with torch.no_grad():
        dict(module.named_parameters())[parameter].view(-1)[-1].add_(1e-4)
    return module


def other_statistics():
    module = LinearRegression()
    module.body[1].running_mean[3] += 1e-3
    return module


def other_setting():
    module = LinearRegression()
    module.body[1].eps = 1e-4
    return module


def changed_sample():
    data = regression_data()
    data.tensors[0][11, 2] += 1e-3
    return RegressionData(data)


class Collated(RegressionData):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.dataset, collate_fn=collate, **self.loader)


def backwards():
    return RegressionData(torch.utils.data.Subset(regression_data(), range(22, -1, -1)))


def collate(samples):
    batch = torch.utils.data.default_collate(samples)
    return batch._replace(sample=[batch.sample[0] * 3, batch.sample[1]])


CHANGES = {
    "a weight": {"module": lambda: with_changed("body.0.weight")},
    "the head": {"module": lambda: with_changed("head.bias")},
    "BatchNorm statistics": {"module": other_statistics},
    "a setting of a layer": {"module": other_setting},
    "the code of the loss": {"module": OtherLoss},
    "one sample": {"data": changed_sample},
    "the number of samples": {"data": lambda: RegressionData(regression_data(22))},
    "the order of samples": {"data": backwards},
    "the collate function": {"data": Collated},
    "a transfer hook": {"data": Doubled},
    "the batch size": {"data": lambda: RegressionData(batch_size=5)},
    "the precision": {"precision": "bf16-mixed"},
    "the precision of the parameters": {"precision": "bf16-true"},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_found_once_something_changed(change):
    assert scored() == 23
    assert scored() == 0
    made = {name: make() if callable(make) else make for name, make in CHANGES[change].items()}
    assert scored(**made) in (22, 23)
    made = {name: make() if callable(make) else make for name, make in CHANGES[change].items()}
    assert scored(**made) == 0  # the changed one is found, too


def picture_folder(folder: Path) -> None:
    for split in ("train", "test"):
        for name in ("a/0", "a/1", "b/0", "b/1"):
            path = folder / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * len(name), 5, 90)).save(path)


def folder_module():
    return ImageDataModule("folder", root="pictures", image_size=8, batch_size=2, num_workers=0)


class Watch(fl.LinearProbeCallback):
    """Counts the samples that the body looks at while the head is fitted."""

    def on_fit_start(self, trainer, pl_module):
        looked, features = [], pl_module.features

        def counted(batch):
            looked.extend(batch["index"])
            return features(batch)

        pl_module.features = counted
        super().on_fit_start(trainer, pl_module)
        self.looked = len(looked)
        del pl_module.features


def probed(data=None, **settings) -> tuple[int, fl.LinearProbeCallback]:
    probe = Watch(cache="cache", **settings)
    flow = fl.FlowWeightingCallback(cache="cache")
    fit(probe, flow, module=tiny_module(), data=PictureData() if data is None else data)
    return probe.looked, probe


def test_a_probe_is_found_again_whatever_the_random_head():
    torch.manual_seed(0)
    looked, first = probed()
    torch.manual_seed(1)  # another random head
    again, second = probed()
    assert (looked, again) == (30, 0)
    assert torch.equal(first.probe.losses, second.probe.losses)
    assert torch.equal(first.probe.head.weight, second.probe.head.weight)
    assert (first.probe.strength, first.probe.validation) == (second.probe.strength, second.probe.validation)
    assert probed(folds=3)[0] == 30


def test_a_touched_picture_or_another_transform_is_scored_anew():
    picture_folder(Path("pictures"))
    assert probed(folder_module())[0] == 4
    assert probed(folder_module())[0] == 0
    os.utime("pictures/train/b/0.png", (1, 1))
    assert probed(folder_module())[0] == 4
    bigger = ImageDataModule("folder", root="pictures", image_size=16, batch_size=2, num_workers=0)
    assert probed(bigger)[0] == 4


class Killed(KeyboardInterrupt):
    pass


class Interrupted(LinearRegression):
    """Dies in the middle of scoring."""

    def sample_losses(self, batch):
        if not self.training and str(self.scored) == os.environ.get("DIES_AFTER"):  # no part of the cache's key
            raise Killed
        return super().sample_losses(batch)


@pytest.mark.parametrize("dies_at", [0, 4, 12, 20])
def test_interrupted_scoring_goes_on_without_a_second_look(dies_at, monkeypatch):
    monkeypatch.setattr(sweep_module, "_SECONDS_PER_BLOCK", 0.0)  # each batch is a block
    whole = fl.FlowWeightingCallback(cache=False)
    scored(Interrupted(), flow=whole)
    monkeypatch.setenv("DIES_AFTER", str(dies_at))
    broken = Interrupted()
    with pytest.raises(BaseException, match="") as info:
        scored(broken)
    assert isinstance(info.value, Killed | SystemExit) and broken.scored == dies_at
    monkeypatch.delenv("DIES_AFTER")
    flow = fl.FlowWeightingCallback(cache="cache")
    assert scored(Interrupted(), flow=flow) == 23 - dies_at
    assert torch.equal(flow.weights.losses, whole.weights.losses)
    assert not list(Path("cache").glob("*/part-*"))


def test_two_processes_go_on_where_one_stopped(monkeypatch):
    monkeypatch.setattr(sweep_module, "_SECONDS_PER_BLOCK", 0.0)
    monkeypatch.setenv("DIES_AFTER", "12")
    with pytest.raises(BaseException, match=""):
        scored(Interrupted())
    monkeypatch.delenv("DIES_AFTER")
    fit(Record(cache="cache"), module=Interrupted(), devices=2, strategy="ddp_fork")
    counts = [json.loads(Path(f"scored{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(counts) == 11
    assert scored(Interrupted()) == 0  # one process finds what two wrote


class Record(fl.FlowWeightingCallback):
    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        Path(f"scored{trainer.global_rank}.json").write_text(json.dumps(pl_module.scored))


def test_a_damaged_file_is_refused_and_force_gets_past_it():
    scored()
    (path,) = Path("cache").glob("*/whole.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"not a usable file of the cache.*--force"):
        scored()
    assert scored(flow=fl.FlowWeightingCallback(cache="cache", force=True)) == 23


class Noisy(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.randn(4), torch.zeros(())


def test_random_samples_are_not_cached():
    for _ in range(2):
        with pytest.warns(UserWarning, match="transforms are random"):
            assert scored(data=RegressionData(Noisy())) == 8
    assert not Path("cache").exists()


class Connected(Dataset):
    def __init__(self):
        self.connection = open(os.devnull)  # noqa: SIM115

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((4,), float(index)), torch.zeros(())


def test_what_cannot_be_identified_is_not_cached_and_says_so(caplog):
    for _ in range(2):
        assert scored(data=RegressionData(Connected())) == 8
    assert "define identity()" in caplog.text


def test_a_cache_that_cannot_be_written_to(monkeypatch):
    Path("file").write_text("")
    with pytest.raises(OSError, match=r"The cache cannot be used: .*file/cache.*cache=False"):
        scored(flow=fl.FlowWeightingCallback(cache="file/cache"))
    monkeypatch.setenv("FLOW_LIGHTNING_CACHE", "file/cache")
    with pytest.warns(UserWarning, match="The cache cannot be used"):
        assert scored(flow=fl.FlowWeightingCallback()) == 23


def test_nothing_is_said_of_the_cache_when_all_is_well():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scored()
    assert not [w for w in seen if "cache" in str(w.message)]
