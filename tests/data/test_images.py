import os
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torchvision.datasets
from lightning import LightningModule
from torch._utils import ExceptionWrapper

from flow_lightning import ImageDataModule
from flow_lightning.data.catalogue import CATALOGUE
from flow_lightning.data.label_noise import LabelNoise
from tests.data.fake_datasets import CLASSES, MAKERS, TEST, TRAIN, make_folder
from tests.examples import make_trainer, slow

HALF = [0.5, 0.5, 0.5]


def image_module(name, root, **settings):
    """Return a data module over small fake files, set up."""
    if not any(root.iterdir()):
        MAKERS[name](root)
    settings = {"image_size": 16, "batch_size": 10, "num_workers": 0, "mean": HALF, "std": HALF} | settings
    data = ImageDataModule(name, root, **settings)
    data.prepare_data()
    data.setup()
    return data


def folder_module(root, **settings):
    """The same over an image folder; by default all of `train` is trained on."""
    return image_module("folder", root, **({"validation_fraction": 0} | settings))


def gather(loader):
    """Join all batches."""
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def pictures(*loaders):
    """Return the set of pictures of each loader."""
    return [{image.numpy().tobytes() for image in gather(loader)["image"]} for loader in loaders]


def test_training_shuffles_and_scoring_sees_its_samples_in_order_under_the_same_index(tmp_path):
    data = folder_module(tmp_path, transforms="none")
    scored, loader, orders = gather(data.scoring_dataloader()), data.train_dataloader(), []
    assert scored["index"].tolist() == list(range(TRAIN)) and set(scored) == {"image", "target", "index"}
    assert scored["image"].shape == (TRAIN, 3, 16, 16) and scored["image"].dtype == torch.float32
    assert scored["target"].dtype == scored["index"].dtype == torch.int64
    assert data.scoring_set.dataset.targets == scored["target"].tolist(), "known without reading images"
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        trained = gather(loader)
        orders.append(trained["index"].tolist())
        for key, values in scored.items():
            assert torch.equal(values, trained[key][trained["index"].argsort()])
    assert orders[0] != orders[1]


def test_only_training_is_augmented(tmp_path):
    data = folder_module(tmp_path, transforms="random_resized_crop", validation_fraction=0.25)
    for name in ("scoring", "val", "test", "predict"):
        loader = getattr(data, f"{name}_dataloader")
        assert torch.equal(gather(loader())["image"], gather(loader())["image"])
    before = data.train_set[0]["image"]
    data.train_set.set_epoch(1)
    assert not torch.equal(data.train_set[0]["image"], before)


def test_nothing_but_training_images_is_validated(tmp_path):
    everything = folder_module(tmp_path, validation_fraction=0)
    assert everything.val_dataloader() == []
    assert (len(everything.train_set), len(everything.scoring_set), len(everything.test_set)) == (TRAIN, TRAIN, TEST)
    data, again = (folder_module(tmp_path, validation_fraction=0.25) for _ in range(2))
    trained, validated, tested = pictures(data.scoring_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [len(trained), len(validated)] == [18, 6] and not validated & (trained | tested)
    assert [trained | validated] == pictures(everything.scoring_dataloader())
    assert gather(data.scoring_dataloader())["index"].tolist() == list(range(18))
    assert torch.equal(gather(again.val_dataloader())["image"], gather(data.val_dataloader())["image"])
    assert len(image_module("folder", tmp_path).val_set) == round(TRAIN / 10), "by default"


def test_a_checkpoint_keeps_the_settings_and_no_objects(tmp_path):
    data, trainer = folder_module(tmp_path, batch_size=7, transforms="none"), make_trainer()
    trainer.fit(TinyModule(), data)
    trainer.save_checkpoint("x.ckpt")
    again = ImageDataModule.load_from_checkpoint("x.ckpt", weights_only=True)
    assert (again.dataset, again.root, again.batch_size, again.transforms) == ("folder", tmp_path, 7, "none")
    assert again.hparams == data.hparams and again.hparams["root"] == str(tmp_path)


class TinyModule(LightningModule):
    """A module that trains nothing, and knows how its pre-trained model wants its images."""

    data_config = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "interpolation": "bicubic"}

    def training_step(self, batch): ...

    def configure_optimizers(self): ...

    def predict_step(self, batch):
        return batch["image"]


def test_normalisation_and_interpolation_are_given_or_else_those_of_the_model(tmp_path):
    given = folder_module(tmp_path, interpolation="bilinear")
    of_model = folder_module(tmp_path, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], interpolation="bicubic")
    not_given = ImageDataModule("folder", tmp_path, image_size=16, num_workers=0)
    for data, expected in ((given, given), (not_given, of_model)):
        seen = torch.cat(make_trainer().predict(TinyModule(), datamodule=data))
        assert torch.equal(seen, gather(expected.test_dataloader())["image"])


def test_class_names_and_number_of_classes(tmp_path):
    data = folder_module(tmp_path)
    assert (data.num_classes, data.class_names) == (3, list(CLASSES))
    for name, count in (("folder", 3), ("CIFAR100", 100)):
        data = ImageDataModule(name, tmp_path)
        assert (data.num_classes, data.class_names) == (count, None), "before setup"
        assert data.transforms == CATALOGUE[name].transforms


def test_an_unreadable_image_is_named_also_from_a_worker_process(tmp_path):
    data, file = folder_module(tmp_path), tmp_path / "train" / "bike" / "003.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(OSError, match=str(file)) as raised:
        gather(data.scoring_dataloader())
    with pytest.raises(OSError, match=str(file)):  # as a loader passes it on from its worker
        ExceptionWrapper(raised._excinfo).reraise()


def test_data_sets_can_be_sent_to_a_spawned_worker(tmp_path):
    data = folder_module(tmp_path, validation_fraction=0.25)
    for dataset in (data.train_set, data.scoring_set, data.val_set, data.test_set):
        copy = ForkingPickler.loads(ForkingPickler.dumps(dataset))
        assert copy[1]["target"] == dataset[1]["target"]


def test_the_number_of_workers_follows_cores_and_data(tmp_path, monkeypatch):
    assert image_module("digits", tmp_path, num_workers=None).train_dataloader().num_workers == 0
    for cores, expected in ((1, 0), (4, 3), (64, 8)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert folder_module(tmp_path, num_workers=None).train_dataloader().num_workers == expected
    assert not folder_module(tmp_path, persistent_workers=True).train_dataloader().persistent_workers
    assert folder_module(tmp_path, num_workers=1, persistent_workers=True).train_dataloader().persistent_workers


def test_downloading_happens_in_prepare_data_only(tmp_path, monkeypatch):
    MAKERS["DTD"](tmp_path)
    asked = []
    monkeypatch.setattr(torchvision.datasets.DTD, "_download", lambda dataset: asked.append("download"))
    data = ImageDataModule("DTD", tmp_path, mean=HALF, std=HALF, download=True)
    for step in (data.setup, data.prepare_data):
        assert not asked
        step()
    assert "download" in asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "cifar11"}, "Did you mean CIFAR1"),
        ({"validation_fraction": 1.0}, "24 training samples leaves 0 to train and 24 to validate"),
        ({"validation_fraction": 0.01}, "24 training samples leaves 24 to train and 0 to validate"),
        ({"mean": None}, "Give both, or neither"),
        ({"mean": None, "std": None}, r"mean and std were not given.*0\.485"),
    ],
)
def test_bad_settings_are_explained(settings, message, tmp_path):
    make_folder(tmp_path)
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**({"dataset": "folder", "root": tmp_path, "mean": HALF, "std": HALF} | settings)).setup()


@pytest.mark.parametrize("transforms", [slow("resize_flip"), "crop_jitter", slow("none")])
def test_decoded_images_have_the_values_of_the_files_to_the_last_bit(tmp_path, transforms):
    """In training, too: random transforms draw the same."""
    settings = {"transforms": transforms, "validation_fraction": 0.25, "interpolation": "bicubic"}
    settings["label_noise"] = LabelNoise(0.3, "instance")
    own = folder_module(tmp_path, **settings)
    data = folder_module(tmp_path, decoded=tmp_path / "images.npy", **settings)
    assert len(np.load(tmp_path / "images.npy", mmap_mode="r")) == TRAIN + TEST
    for name in ("scoring", "val", "test", "train"):
        expected, found = (gather(getattr(module, f"{name}_dataloader")()) for module in (own, data))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    for file in (tmp_path / "train").rglob("*.png"):
        times = file.stat()
        file.write_bytes(b"\0" * times.st_size)  # whatever reads it, fails
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(gather(data.train_dataloader())["image"], gather(data.train_dataloader())["image"])


def test_decoded_images_come_from_prepare_data_and_stay_in_a_checkpoint(tmp_path):
    make_folder(tmp_path)
    settings = {"image_size": 16, "num_workers": 0, "decoded": tmp_path / "images.npy", "validation_fraction": 0}
    trainer, data = make_trainer(), ImageDataModule("folder", tmp_path, **settings)
    trainer.fit(TinyModule(), data)
    trainer.save_checkpoint("x.ckpt")
    assert ImageDataModule.load_from_checkpoint("x.ckpt", weights_only=True).decoded == str(tmp_path / "images.npy")
    again = ImageDataModule("folder", tmp_path, mean=HALF, std=HALF, interpolation="bicubic", **settings)
    before = os.stat(tmp_path / "images.npy").st_ino
    again.prepare_data()
    again.setup()
    assert os.stat(tmp_path / "images.npy").st_ino == before, "with the interpolation of the model"


def test_decoded_images_do_not_serve_random_crops_of_the_originals(tmp_path):
    with pytest.raises(ValueError, match=r"random_resized_crop crops from images of their own sizes.*Leave `decoded`"):
        ImageDataModule("Caltech101", tmp_path, decoded="images.npy")
