"""Where the test set comes from, and that nobody's error in finding it is hidden."""

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from flow_lightning.data.samplers import FixedBatches
from flow_lightning.measures.target import target_dataloader
from tests.retention import language_data

SAMPLES = [{"image": torch.zeros(1), "target": 0}] * 3


class Data(LightningDataModule):
    """`late`: there is a test set after setup("test") only; `missing`: what setup does not find."""

    def __init__(self, loaders, late=False, missing=None):
        super().__init__()
        self.loaders, self.late, self.missing, self.stages = loaders, late, missing, []

    def setup(self, stage):
        self.stages.append(stage)
        if self.missing:
            raise FileNotFoundError(self.missing)

    def test_dataloader(self):
        if self.late and "test" not in self.stages:
            raise RuntimeError("call setup first")
        return self.loaders


class NeverSetUp(LightningDataModule):
    def test_dataloader(self):
        return self.test_sett


class WithTestSet(LightningModule):
    def test_dataloader(self):
        return DataLoader(SAMPLES)


def find(data, module=None):
    return target_dataloader(SimpleNamespace(datamodule=data, lightning_module=module or LightningModule()))


@pytest.mark.parametrize(("late", "stages"), [(False, []), (True, ["test"])])
def test_the_test_set_is_set_up_only_where_that_is_missing(late, stages):
    data = Data(DataLoader(SAMPLES, batch_size=2, shuffle=True), late)
    loader = find(data)
    assert data.stages == stages
    assert [batch["index"].tolist() for batch in loader] == [[0, 1], [2]]


def test_batches_of_similar_length_stay_together():
    loader = find(Data(DataLoader(SAMPLES, batch_sampler=FixedBatches([[2], [1, 0]]))))
    assert [batch["index"].tolist() for batch in loader] == [[2], [1, 0]]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (Data(None, late=True, missing="test.csv"), FileNotFoundError, "test.csv"),
        (NeverSetUp(), AttributeError, "test_sett"),
        (Data([]), TypeError, "returned a list; expected one DataLoader"),
        (Data(DataLoader([], batch_size=1)), ValueError, "empty"),
    ],
)
def test_an_error_of_the_user_comes_through_as_it_is(data, error, message):
    with pytest.raises(error, match=message) as raised:
        find(data)
    if error is FileNotFoundError:  # and what led to it is told
        assert "call setup first" in str(raised.value.__context__)


def test_the_module_can_have_the_test_set_else_a_warning_says_what_is_left_out():
    for data in (None, LightningDataModule()):
        assert len(find(data, WithTestSet()).dataset) == 3
    for data in (None, LightningDataModule(), language_data(test=False)):
        with pytest.warns(UserWarning, match="nothing is measured on the target task"):
            assert find(data) is None
