"""The table of predictions: each sample once, in order, from one process or two."""

import csv

import pytest
import torch
from torch.utils.data import DataLoader

from flow_lightning.callbacks.predictions import PredictionsCallback
from tests.examples import make_trainer
from tests.images import PictureData, tiny_module


class Data(PictureData):
    class_names = ["red", "green", "blue"]

    def predict_dataloader(self):
        return DataLoader(self.test_set, batch_size=5)


def predicted(path, data=None, **settings):
    make_trainer(PredictionsCallback(), **settings).predict(tiny_module(), data or Data(), return_predictions=False)
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("settings", [{}, {"devices": 2, "strategy": "ddp_fork"}])
def test_each_sample_has_its_class_and_probability(settings):
    rows = predicted("run/predictions.csv", **settings)
    module, samples = tiny_module().eval(), Data().test_set
    with torch.no_grad():
        images = torch.stack([samples[i]["image"] for i in range(12)])
        expected = module(images).softmax(1).max(1)
    assert [int(row["index"]) for row in rows] == list(range(12))
    assert [int(row["class"]) for row in rows] == expected.indices.tolist()
    assert [row["name"] for row in rows] == [Data.class_names[i] for i in expected.indices.tolist()]
    probabilities = [float(row["probability"]) for row in rows]
    assert probabilities == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_without_a_run_directory_the_table_is_in_the_root_directory():
    class Nameless(Data):
        class_names = None

    rows = predicted("predictions.csv", Nameless(), default_root_dir=None)
    assert len(rows) == 12 and {row["name"] for row in rows} == {""}
