from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule, LightningModule
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from flow_lightning.measures.images import pretrained_task_images, target_dataloader, target_outcomes

CONFIG = {
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "input_size": (3, 20, 20),
}


class Module(LightningModule):
    data_config = CONFIG
    pretrained_head = torch.nn.Linear(2, 5)

    def pretrained_task(self, original_batch_norm):
        raise AssertionError("not needed to open the images")


class BodyOnly(Module):
    pretrained_head = None


class Data(LightningDataModule):
    def __init__(self, loaders):
        super().__init__()
        self.loaders = loaders
        self.stages = []

    def setup(self, stage):
        self.stages.append(stage)

    def test_dataloader(self):
        return self.loaders


class SetUpLate(Data):
    def test_dataloader(self):
        if "test" not in self.stages:
            raise AttributeError("test_set")
        return self.loaders


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (30, 30), (255, 0, 0)).save(tmp_path / "red.png")
    return str(tmp_path)


def test_images_are_prepared_as_the_model_expects(folder):
    image = pretrained_task_images(folder, None, SimpleNamespace(datamodule=None), Module())[0]["image"]
    torch.testing.assert_close(image, torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 20, 20))


def test_what_the_data_module_sets_comes_first(folder):
    data = SimpleNamespace(image_size=16, mean=[0.0] * 3, std=[1.0] * 3, interpolation=None)
    image = pretrained_task_images(folder, None, SimpleNamespace(datamodule=data), Module())[0]["image"]
    torch.testing.assert_close(image, torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 16, 16))
    assert pretrained_task_images(folder, 8, SimpleNamespace(datamodule=data), Module())[0]["image"].shape[-1] == 8


def test_a_module_without_pretrained_task_is_refused(folder):
    trainer = SimpleNamespace(datamodule=None)
    with pytest.raises(TypeError, match=r"LightningModule has no pretrained_task\(\)"):
        pretrained_task_images(folder, None, trainer, LightningModule())
    with pytest.raises(ValueError, match="BodyOnly has no pre-trained head"):
        pretrained_task_images(folder, None, trainer, BodyOnly())


@pytest.mark.parametrize(("kind", "stages"), [(Data, []), (SetUpLate, ["test"])])
def test_the_test_set_is_set_up_only_where_that_is_missing(kind, stages):
    samples = [{"image": torch.zeros(1), "target": 0}] * 3
    data = kind(DataLoader(samples, batch_size=2, shuffle=True))
    loader = target_dataloader(SimpleNamespace(datamodule=data), Module(), batch_size=64)
    assert data.stages == stages
    assert [batch["index"].tolist() for batch in loader] == [[0, 1], [2]]


def test_no_test_set_and_several_test_sets():
    assert target_dataloader(SimpleNamespace(datamodule=None), Module(), batch_size=64) is None
    with pytest.raises(TypeError, match="gave a list; expected one DataLoader"):
        target_dataloader(SimpleNamespace(datamodule=Data([])), Module(), batch_size=64)


def test_batches_that_are_no_dicts_are_named():
    batch = next(iter(DataLoader(TensorDataset(torch.zeros(2, 1), torch.zeros(2)))))
    with pytest.raises(TypeError, match="got a list; expected batches that are dicts"):
        target_outcomes(Module(), batch)
    with pytest.raises(TypeError, match=r"got a dict of \['x'\]"):
        target_outcomes(Module(), {"x": torch.zeros(2)})
