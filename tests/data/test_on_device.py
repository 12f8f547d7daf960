"""Batches that are finished on the device, against images one by one; colours against those of torchvision."""

import pytest
import torch
from lightning import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

import flow_lightning as fl
from flow_lightning.data.on_device import BytesAndDraws, finish
from flow_lightning.report.page.evidence import describe
from flow_lightning.scoring.fingerprint import inspect_dataset
from tests.data.fake_datasets import TRAIN, make_folder
from tests.examples import fit, make_trainer, slow
from tests.images import tiny_module

HALF = [0.5, 0.5, 0.5]
LOADERS = ("train", "scoring", "val", "test")


def module_of(root, transforms="resize_flip", **settings):
    if not any(root.iterdir()):
        make_folder(root)
    settings |= {"image_size": 32, "batch_size": 10, "num_workers": 0, "mean": HALF, "std": [0.2, 0.3, 0.4]}
    return fl.ImageDataModule("folder", root, transforms=transforms, **settings)


def batches(data, name, epoch):
    """Return all batches of a loader, finished as a fit finishes them."""
    loader = getattr(data, f"{name}_dataloader")()
    if name == "train":
        loader.sampler.set_epoch(epoch)
        data.train_set.set_epoch(epoch)
    return [finish(batch) for batch in loader]


@pytest.mark.parametrize("transforms", ["resize_flip", "random_resized_crop", "crop_jitter", "none"])
def test_batches_are_those_of_images_one_by_one(tmp_path, transforms):
    """To the last bit, but for changes of colour, which Pillow rounds to bytes, three times."""
    pair = [module_of(tmp_path, transforms, validation_fraction=0.25, on_device=on) for on in (False, True)]
    for each in pair:
        torch.manual_seed(0)
        each.setup()
    raw = next(iter(pair[1].train_dataloader()))
    assert raw["image"].dtype == torch.uint8, "a quarter of the bytes"
    for name in LOADERS:
        is_coloured = name == "train" and transforms in ("random_resized_crop", "crop_jitter")
        bound = 4 / 255 / 0.2 if is_coloured else 0.0
        for epoch in range(2):
            for one, other in zip(*(batches(each, name, epoch) for each in pair), strict=True):
                assert set(one) == set(other) and torch.equal(one["index"], other["index"])
                torch.testing.assert_close(other["image"], one["image"], rtol=0, atol=bound)


def test_colours_are_torchvisions_in_the_order_that_was_drawn():
    images = torch.randint(0, 256, (32, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draw = BytesAndDraws([v2.RandomHorizontalFlip(), v2.ColorJitter(0.9, 0.9, 0.9)], HALF, [0.2, 0.3, 0.4])
    samples = [draw(functional.to_pil_image(image)) for image in images]
    batch = torch.utils.data.default_collate(samples)
    changes = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation
    expected = []
    for image, sample in zip(images, samples):
        image = functional.hflip(image) if sample["flip"] else image
        image = image.float() / 255
        for kind in sample["order"].tolist():
            factors = sample["numbers"].view(torch.float32)[6:].tolist()
            image = changes[kind](image, factors[kind]) if kind < 3 else image
        expected.append(functional.normalize(image, HALF, [0.2, 0.3, 0.4]))
    found = finish(batch)
    assert set(found) == {"image"} and 0 < int(batch["flip"].sum()) < 32
    torch.testing.assert_close(found["image"], torch.stack(expected), rtol=0, atol=1e-5)


class Seen(Callback):
    """Keeps the images and samples that training steps got."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert set(batch) == {"image", "target", "index"}
        self.batches.append((batch["image"].clone(), batch["index"]))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_changed_colours_are_not_rounded_in_other_precisions(tmp_path, precision):
    """Lightning turns floats of a batch into those of the model before they are on the device."""
    seen, dtype = [Seen(), Seen()], {"64-true": torch.float64, "bf16-true": torch.bfloat16}[precision]
    for callback, settings in zip(seen, ({}, {"precision": precision})):
        data = module_of(tmp_path, "crop_jitter", validation_fraction=0, on_device=True)
        fit(callback, module=tiny_module(), data=data, max_epochs=1, limit_val_batches=0, **settings)
    for (exact, _), (other, _) in zip(seen[0].batches, seen[1].batches, strict=True):
        assert exact.dtype == torch.float32 and torch.equal(other, exact.to(dtype))


@pytest.mark.parametrize("precision", ["32-true", slow("bf16-true")])
def test_a_fit_scores_and_trains_on_the_same_images(tmp_path, precision):
    results = []
    for on_device in (False, True):
        seen, flow = Seen(), fl.FlowWeightingCallback()
        data = module_of(tmp_path, validation_fraction=0, on_device=on_device)
        settings = {"max_epochs": 2, "precision": precision, "limit_val_batches": 0}
        module, _ = fit(seen, flow, fl.LinearProbeCallback(), module=tiny_module(), data=data, **settings)
        results.append((module, flow.weights.weights, seen.batches))
    (one, weights, images), (other, other_weights, other_images) = results
    assert len(images) == 2 * -(-TRAIN // 10) and torch.equal(weights, other_weights)
    for first, second in zip(images, other_images, strict=True):
        assert all(map(torch.equal, first, second)) and first[0].dtype == second[0].dtype
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_the_hook_of_the_users_module_still_comes(tmp_path):
    class Darker(fl.ImageClassificationModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert batch["image"].dtype == torch.float32
            return batch | {"image": batch["image"] - 1}

    seen, plain = Seen(), Seen()
    for callback, kind in ((seen, Darker), (plain, fl.ImageClassificationModule)):
        data = module_of(tmp_path, "none", validation_fraction=0, on_device=True)
        fit(callback, module=tiny_module(kind=kind), data=data, max_epochs=1, limit_val_batches=0)
    assert all(torch.equal(a[0], b[0] - 1) for a, b in zip(seen.batches, plain.batches, strict=True))


def test_bytes_without_their_data_module_are_refused(tmp_path):
    data = module_of(tmp_path, validation_fraction=0, on_device=True)
    data.setup()
    with pytest.raises(TypeError, match="Give it to the Trainer, not its loaders"):
        make_trainer(max_epochs=1).fit(tiny_module(), data.train_dataloader())


def test_another_normalisation_is_another_data_set_and_a_page_shows_the_bytes(tmp_path):
    found = set()
    for mean in (HALF, [0.4, 0.5, 0.5]):
        data = module_of(tmp_path, validation_fraction=0, on_device=True)
        data.mean = mean
        data.setup()
        found.add(inspect_dataset(data.scoring_set)[0])
    assert len(found) == 2 and describe(data.scoring_set[0])["picture"].startswith("data:image/jpeg")


def test_without_it_the_hook_is_lightnings_own(tmp_path):
    assert is_overridden("on_after_batch_transfer", module_of(tmp_path, on_device=True))
    assert not is_overridden("on_after_batch_transfer", module_of(tmp_path))
