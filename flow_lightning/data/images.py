"""The image data module: a data set by name, with the splits, transforms and normalisation of the paper.

In: the name of a data set. Out: loaders of images, classes and indices. Next: `modules/image_classification.py`.
"""

import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from flow_lightning.contract import module_contract
from flow_lightning.data.catalogue import CATALOGUE, Splits, find_dataset
from flow_lightning.data.decoded import DecodedImages, decode
from flow_lightning.data.edits import one_file, read_edits
from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.label_noise import LabelNoise, with_noise
from flow_lightning.data.on_device import finish
from flow_lightning.data.samplers import hold_out
from flow_lightning.data.sources import class_folders
from flow_lightning.data.transforms import Interpolation, RecipeName, Transform, recipe, stored_size
from flow_lightning.distributed import data_rank
from flow_lightning.resume import ResumableDataLoader, ResumableSampler


class TransformedImages(Dataset[dict[str, Any]]):
    """Turn `(PIL image, class index)` into the sample `{"image": float [3, H, W], "target": int}`.

    A transform that gives a dictionary, with "image" in it, adds all of that to the sample.
    With a seed, random transforms follow seed, epoch and position, so that a resumed run sees the same pictures.
    """

    def __init__(self, images: Any, transform: Transform, seed: int | None = None) -> None:
        self.images, self.transform, self.seed = images, transform, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # loader processes see it change, too

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> dict[str, Any]:
        image, target = self.images[position]
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                seed = hash((self.seed, int(self.epoch), position)) % 2**63
                torch.default_generator.manual_seed(seed)  # other devices take far longer
            found = self.transform(image)
        return {**(found if isinstance(found, dict) else {"image": found}), "target": int(target)}

    def set_epoch(self, epoch: int) -> None:
        """Draw the random transforms of an epoch from now on."""
        self.epoch.fill_(epoch)

    @property
    def targets(self) -> list[int]:
        """Class index of each sample."""
        return list(self.images.targets)


class ImageDataModule(LightningDataModule):
    """Load an image classification data set by name, prepared as in the paper.

    Validation uses a part of the training set, never the test set. The paper has no validation: it trains on the whole
    training set for a fixed number of epochs and tests the last state. `validation_fraction=0` does the same.

    Files are expected below `root`: `cifar-10-batches-py`, `cifar-100-python`, `flowers-102`, `dtd`, `caltech101`,
    `stanford_cars` (as torchvision has them; the last two also with `train/<class>` and `test/<class>` folders),
    `stanford_dogs/Images/<breed>`. "folder" reads `<root>/train/<class>` and `<root>/test/<class>` (or `val`).
    "digits" comes with scikit-learn.

    Args:
        dataset: CIFAR10, CIFAR100, Flowers102, DTD, Caltech101, StanfordCars, StanfordDogs, digits or folder.
        root: Folder of the data sets. For "folder" it is the one with `train` and `test` in it.
        image_size: Height and width of the network's input, in pixels.
        batch_size: Images per batch and device.
        num_workers: Loader processes. By default one less than the CPU has cores, at most 8, and 0 for digits.
        persistent_workers: Keep the loader processes from one epoch to the next.
        mean: Mean of each colour channel (pixels from 0 to 1). By default that of the pre-trained model.
        std: Standard deviation of each colour channel. By default that of the pre-trained model.
        interpolation: How images are resized ("bilinear", "bicubic", ...). By default as the pre-trained model does.
        transforms: A recipe of `transforms.py`. By default that of the paper for this data set.
        validation_fraction: Share of the training set to hold out for validation, in [0, 1). 0 means no validation.
        split_seed: Seed of the random splits (validation, Stanford Dogs, Caltech101, digits).
        download: Fetch the files if torchvision can (not Stanford Cars and Dogs).
        edits: A CSV file that drops training samples or corrects their labels: `label_issues.csv` of a run with a
            column `action`, see `flow_lightning.data.edits.read_edits`. Its indices count the training samples of
            that run, without those held out, which stay as they are. They follow `label_noise`. `--relabel FILE` is
            the same on the command line.
        drop_issues: The same file, or one without `action`: samples without an action are dropped if they are label
            issues. `--drop-issues FILE` is the same on the command line.
        label_noise: Makes some labels of the training set wrong, the held-out part too, for experiments.
        decoded: A file `.npy` of all images, decoded and resized, that later epochs and fits read in place of the
            images. It is made if it is not there, or not true any more. Values stay the same to the last bit. Not for
            the recipe `random_resized_crop`.
        on_device: Whether images become floats, flipped, coloured and normalised in whole batches on the device. The
            loaders then hand over bytes, which a Trainer with this data module finishes: a quarter as many, and less
            work for loader processes. Draws are the same, and so are values, but changed colours are not rounded to
            bytes on the way. On a CPU changes of colour take twice as long so. A resumed fit needs the same setting.

    Raises:
        ValueError: If the data set is unknown, only one of `mean` and `std` is given, `edits` and `drop_issues` both
            are, or `decoded` does not suit the recipe.
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
        interpolation: Interpolation | None = None,
        transforms: RecipeName | None = None,
        validation_fraction: float = 0.1,
        split_seed: int = 42,
        download: bool = False,
        label_noise: LabelNoise | None = None,
        edits: str | Path | None = None,
        drop_issues: str | Path | None = None,
        decoded: str | Path | None = None,
        on_device: bool = False,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError(f"Got mean={mean} and std={std}. Give both, or neither for those of the model.")
        # Checkpoints hold the arguments, and weights_only=True loads no Path.
        edits, drop_issues, decoded = (None if each is None else str(each) for each in (edits, drop_issues, decoded))
        root = str(root)
        self.save_hyperparameters(ignore="label_noise")
        self.dataset = find_dataset(dataset)
        self.root = Path(root)
        self.image_size, self.batch_size = image_size, batch_size
        self.num_workers, self.persistent_workers = num_workers, persistent_workers
        self.mean, self.std, self.interpolation = mean, std, interpolation
        self.transforms = transforms or CATALOGUE[self.dataset].transforms
        self.validation_fraction, self.split_seed, self.download = validation_fraction, split_seed, download
        self.label_noise, self.edits, self.decoded = label_noise, one_file(edits, drop_issues), decoded
        self.drop_issues, self.on_device = drop_issues is not None, on_device
        if on_device:  # else the hook of a module is the only one, as Lightning expects
            self.on_after_batch_transfer = self._finish  # type: ignore[method-assign]
        if decoded is not None:
            stored_size(self.transforms, image_size)
        #: How many training samples the edits dropped and relabelled, known after `setup`; for `metrics.json`.
        self.edit_numbers: dict[str, int] | None = None
        #: Names of the classes in the order of their indices, known after `setup`.
        self.class_names: list[str] | None = None
        self._splits: Splits | None = None

    def prepare_data(self) -> None:
        """Download the data set and decode its images, if asked for."""
        if self.download:
            CATALOGUE[self.dataset].build(self.root, True, self.split_seed)
        if self.decoded is not None:
            self._splits = CATALOGUE[self.dataset].build(self.root, False, self.split_seed)
            self._decode(self._splits)

    def setup(self, stage: str | None = None) -> None:
        """Read the list of files or the arrays, and make all sets; images are read later.

        Raises:
            FileNotFoundError: If the data set is not there.
            ValueError: If the normalisation is not known, no sample is left to train on or to validate, or
                the file of edits does not fit.
        """
        splits = self._splits = self._splits or CATALOGUE[self.dataset].build(self.root, False, self.split_seed)
        augment, plain = recipe(self.transforms, self.image_size, *self._normalisation(), on_device=self.on_device)
        held_out, kept = hold_out(len(splits.train), self.validation_fraction, self.split_seed)
        given = splits.train
        if self.label_noise is not None:
            given = with_noise(given, self.label_noise, len(splits.class_names))
        test = splits.test
        if self.decoded is not None:
            images = self._decode(splits)
            given, test = images.of(given), images.of(test, len(given))
        training, validation = given.part(kept), given.part(held_out)
        if self.edits is not None:
            edits = read_edits(self.edits, training.targets, splits.class_names, drop_issues=self.drop_issues)
            rank_zero_info(f"{self.edits}: {edits}.")
            training, self.edit_numbers = edits.of_images(training), edits.numbers
        seed = torch.initial_seed()
        self._seed = seed if self.trainer is None else self.trainer.strategy.broadcast(seed)
        self.class_names = splits.class_names
        self.train_set = IndexedDataset(TransformedImages(training, augment, self._seed))
        self.scoring_set = IndexedDataset(TransformedImages(training, plain))
        self.val_set = IndexedDataset(TransformedImages(validation, plain))
        self.test_set = IndexedDataset(TransformedImages(test, plain))

    @property
    def num_classes(self) -> int:
        """Number of classes; for "folder" the folders below `train`."""
        return CATALOGUE[self.dataset].num_classes or len(class_folders(self.root / "train"))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training samples, shuffled and augmented."""
        rank, world = data_rank(self.trainer) if self.trainer else (0, 1)
        sampler = ResumableSampler(self.train_set, world, rank, self._seed % 2**31)
        return self._loader(self.train_set, ResumableDataLoader, sampler)

    def scoring_dataloader(self) -> DataLoader[Any]:
        """Return the training samples in order, without augmentation, with the `index` they have in training."""
        return self._loader(self.scoring_set)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the held-out part of the training set in order, or no loader with `validation_fraction=0`."""
        return self._loader(self.val_set) if self.validation_fraction else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test samples in order."""
        return self._loader(self.test_set)

    predict_dataloader = test_dataloader

    def _finish(self, batch: Any, dataloader_idx: int) -> Any:
        """Finish the images of a batch, see `on_device`, and do what the module would have done."""
        if isinstance(batch, dict) and "image" in batch:
            batch = self.trainer.precision_plugin.convert_input(finish(batch))  # type: ignore[union-attr]
        return self.trainer.lightning_module.on_after_batch_transfer(batch, dataloader_idx)  # type: ignore[union-attr]

    def _normalisation(self) -> tuple[list[float], list[float], str]:
        """Return mean, standard deviation and interpolation, as given or else the model's."""
        model = {} if self.trainer is None else module_contract(self.trainer.lightning_module).data_config or {}
        mean, std = self.mean or model.get("mean"), self.std or model.get("std")
        if mean is None or std is None:
            raise ValueError(
                "The normalisation is not known: mean and std were not given, and the model has no `data_config`. Give "
                "both (ImageNet's are mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])."
            )
        return list(mean), list(std), self.interpolation or model.get("interpolation", "bilinear")

    def _decode(self, splits: Splits) -> DecodedImages:
        size, (*_, interpolation) = stored_size(self.transforms, self.image_size), self._normalisation()
        return decode(splits[:2], str(self.decoded), size, interpolation, self.root, self._workers())

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        # The digits are in memory and tiny: sending them takes longer than reading them.
        return 0 if self.dataset == "digits" else min((os.cpu_count() or 1) - 1, 8)

    def _loader(self, dataset: Any, kind: type[DataLoader[Any]] = DataLoader, sampler: Any = None) -> DataLoader[Any]:
        workers = self._workers()
        return kind(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=self.persistent_workers and workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
