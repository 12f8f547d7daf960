"""The image data module: a data set by name, with the splits, transforms and normalisation of the paper."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from flow_lightning.data.catalogue import CATALOGUE, Splits, find_dataset
from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.sources import ImageArrays, class_folders, split_positions, targets_of
from flow_lightning.data.transforms import RecipeName, Transform, recipe
from flow_lightning.distributed import data_rank
from flow_lightning.resume import EpochSeed, ResumableDataLoader, ResumableSampler

# Arrays up to this size (bytes) are cheaper to transform in place than to send through worker processes.
_SMALL = 2**20


class TransformedImages(Dataset[dict[str, Any]]):
    """Turn `(PIL image, class index)` into the sample `{"image": float [3, H, W], "target": int}`.

    Args:
        images: Map-style data set of `(PIL image, class index)`.
        transform: From an RGB picture to a tensor.
        seed: Makes a random transform a function of seed, epoch and position, so that a resumed run sees the same
            pictures; None leaves it to the global random number generator.
    """

    def __init__(self, images: Any, transform: Transform, seed: int | None = None) -> None:
        self.images = images
        self.transform = transform
        self.random = None if seed is None else EpochSeed(seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> dict[str, Any]:
        image, target = self.images[position]
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        if self.random is None:
            return {"image": self.transform(rgb), "target": int(target)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random.of(position))
            return {"image": self.transform(rgb), "target": int(target)}

    def set_epoch(self, epoch: int) -> None:
        """Draw other random transforms from now on."""
        if self.random is not None:
            self.random.epoch.fill_(epoch)

    @property
    def targets(self) -> list[int] | None:
        """Class index of each sample, or None where that would need the images to be read."""
        return targets_of(self.images)


class _Normalisation(NamedTuple):
    mean: list[float]
    std: list[float]
    interpolation: str


class ImageDataModule(LightningDataModule):
    """Load an image classification data set by name, prepared as in the paper.

    The paper has no validation split: its runs are a fixed number of epochs and their last state is tested.
    So unless `validation_fraction` is set, validation looks at the test set, which is fine for watching a run
    and wrong for choosing between runs.

    Where the files are expected, below `root`: `cifar-10-batches-py`, `cifar-100-python`, `flowers-102`,
    `dtd`, `caltech101`, `stanford_cars` (as torchvision lays them out; the last two also with `train/<class>`
    and `test/<class>` folders), `stanford_dogs/Images/<breed>`. "folder" reads `<root>/train/<class>` and
    `<root>/test/<class>` (or `val`); "digits" comes with scikit-learn.

    Args:
        dataset: CIFAR10, CIFAR100, Flowers102, DTD, Caltech101, StanfordCars, StanfordDogs, digits or folder.
        root: Folder that holds the data sets (for "folder": the one that holds `train` and `test`).
        image_size: Height and width of the network's input, in pixels.
        batch_size: Images per batch and device.
        num_workers: Loader processes; by default one less than the CPU has cores, at most 8, and 0 for tiny
            data.
        persistent_workers: Keep the loader processes from one epoch to the next.
        mean: Mean of each colour channel (pixels from 0 to 1); by default the pre-trained model's own.
        std: Standard deviation of each colour channel; by default the pre-trained model's own.
        interpolation: How images are resized ("bilinear", "bicubic", ...); by default the pre-trained model's
            own.
        transforms: "resize_flip", "crop_jitter", "random_resized_crop" or "none" (resize only); by default
            what the paper uses for this data set.
        validation_fraction: Share of the training set to hold out for validation, in [0, 1); 0 validates on
            the test set.
        split_seed: Seed of the splits that are random (validation, Stanford Dogs, Caltech101, digits).
        download: Fetch the files where torchvision can (not Stanford Cars and Dogs).

    Raises:
        ValueError: If the data set is unknown or a number is out of range.
    """

    def __init__(
        self,
        dataset: str,
        root: str | Path = "data",
        image_size: int = 224,
        batch_size: int = 128,
        num_workers: int | None = None,
        persistent_workers: bool = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: str | None = None,
        transforms: RecipeName | None = None,
        validation_fraction: float = 0.0,
        split_seed: int = 42,
        download: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= validation_fraction < 1.0:
            raise ValueError(f"validation_fraction is {validation_fraction}; expected a share from 0 to below 1.")
        if (mean is None) != (std is None):
            raise ValueError(f"Got mean={mean} and std={std}; expected both, or neither (the model's own).")
        self.dataset = find_dataset(dataset)
        self.root = Path(root)
        self.image_size, self.batch_size = image_size, batch_size
        self.num_workers, self.persistent_workers = num_workers, persistent_workers
        self.mean, self.std, self.interpolation = mean, std, interpolation
        self.transforms = transforms or CATALOGUE[self.dataset].transforms
        self.validation_fraction, self.split_seed, self.download = validation_fraction, split_seed, download
        self._splits: Splits | None = None

    def prepare_data(self) -> None:
        """Download the data set if that is asked for (one process per machine does this)."""
        if self.download:
            self._build(download=True)

    def setup(self, stage: str | None = None) -> None:
        """Read the data set's index and prepare training, scoring, validation and test sets.

        Raises:
            FileNotFoundError: If the data set is not there; the message says where it was looked for.
            ValueError: If the normalisation is neither given nor known from the model.
        """
        splits = self._splits = self._splits or self._build(download=False)
        known = self._normalisation()
        augment, plain = recipe(self.transforms, self.image_size, known.mean, known.std, known.interpolation)
        training, validation = self._hold_out(splits)
        self._seed = (
            torch.initial_seed() if self.trainer is None else self.trainer.strategy.broadcast(torch.initial_seed())
        )
        self.train_set = IndexedDataset(TransformedImages(training, augment, self._seed))
        self.scoring_set = IndexedDataset(TransformedImages(training, plain))
        self.val_set = IndexedDataset(TransformedImages(validation, plain))
        self.test_set = IndexedDataset(TransformedImages(splits.test, plain))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their indices.

        Raises:
            RuntimeError: Before `setup`.
        """
        if self._splits is None:
            raise RuntimeError(f"The class names of {self.dataset!r} are known after setup(); call that first.")
        return self._splits.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes; for "folder" the folders below `train`."""
        named = CATALOGUE[self.dataset].num_classes
        if named is None and self._splits is None:
            return len(class_folders(Path(self.root) / "train"))
        return named if named is not None and self._splits is None else len(self.class_names)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training samples, shuffled and augmented."""
        return self._loader(self.train_set, training=True)

    def scoring_dataloader(self) -> DataLoader[Any]:
        """Return the training samples in order and un-augmented, with the `index` they have in training."""
        return self._loader(self.scoring_set)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out part of the training set; with `validation_fraction` 0 the test set."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test samples in order."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test samples in order."""
        return self._loader(self.test_set)

    def _build(self, download: bool) -> Splits:
        return CATALOGUE[self.dataset].build(self.root, download, self.split_seed)

    def _hold_out(self, splits: Splits) -> tuple[Dataset[Any], Dataset[Any]]:
        if self.validation_fraction == 0.0:
            return splits.train, splits.test
        count = len(splits.train)  # type: ignore[arg-type]  # map-style, hence with a length
        held_out, kept = split_positions(count, self.validation_fraction, self.split_seed)
        if not held_out or not kept:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} of {count} training images leaves "
                f"{len(kept)} to train and {len(held_out)} to validate; choose a fraction that gives both at "
                "least one."
            )
        return Subset(splits.train, kept), Subset(splits.train, held_out)

    def _normalisation(self) -> _Normalisation:
        """Take what was given, and the rest from the data config of the model that the trainer fits."""
        module = getattr(self.trainer, "lightning_module", None)
        config = getattr(module, "data_config", None) or {}
        mean, std = self.mean or config.get("mean"), self.std or config.get("std")
        if mean is None or std is None:
            raise ValueError(
                "The normalisation is not known: mean and std were not given and there is no model with a "
                "`data_config` to take them from. Give both (ImageNet's are mean=[0.485, 0.456, 0.406], "
                "std=[0.229, 0.224, 0.225])."
            )
        return _Normalisation(list(mean), list(std), self.interpolation or config.get("interpolation", "bilinear"))

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        images = self._splits.train if self._splits else None
        small = isinstance(images, ImageArrays) and images.pixels.nbytes <= _SMALL
        return 0 if small else min((os.cpu_count() or 1) - 1, 8)

    def _loader(self, dataset: Dataset[dict[str, Tensor]], training: bool = False) -> DataLoader[Any]:
        workers, sampler = self._workers(), None
        if training:
            rank, world = data_rank(self.trainer) if self.trainer else (0, 1)
            sampler = ResumableSampler(dataset, world, rank, self._seed % 2**31)
        return (ResumableDataLoader if training else DataLoader)(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=self.persistent_workers and workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
