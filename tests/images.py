"""Tiny pictures for tests of the vision module: three classes that differ in colour."""

from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

import flow_lightning as fl
from flow_lightning.modules.image_classification import ImageClassificationModule


class Pictures(Dataset[dict[str, Any]]):
    """`n` noisy pictures `[3, size, size]`; class c has most of colour c."""

    def __init__(self, n: int = 30, size: int = 32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = (torch.arange(n) % 3).tolist()
        self.images = torch.randn(n, 3, size, size, generator=generator)
        for image, target in zip(self.images, self.targets):
            image[target] += 0.5

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "target": self.targets[index]}


class PictureData(LightningDataModule):
    def __init__(self, n: int = 30, size: int = 32, batch_size: int = 8, shuffle: bool = True) -> None:
        super().__init__()
        self.train_set = fl.IndexedDataset(Pictures(n, size))
        self.test_set = fl.IndexedDataset(Pictures(12, size, seed=1))
        self.batch_size, self.shuffle = batch_size, shuffle

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_set, self.batch_size, shuffle=self.shuffle)

    def scoring_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_set, self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test_set, self.batch_size)


def tiny_module(
    model: str = "test_resnet.r160_in1k",
    kind: type[ImageClassificationModule] = ImageClassificationModule,
    **settings: Any,
) -> ImageClassificationModule:
    torch.manual_seed(0)
    return kind(model, 3, pretrained=False, **settings)
