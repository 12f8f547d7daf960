from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from flow_lightning.callbacks.head_refit import HeadRefitCallback
from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from scipy.special import rel_entr
from sklearn.metrics import top_k_accuracy_score
from torch.utils.data import DataLoader, Dataset

from flow_lightning.callbacks.retention import RetentionCallback
from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.data.retention_images import retention_images
from flow_lightning.modules.image_classification import ImageClassificationModule
from flow_lightning.report.metrics import METRICS, read_metrics

SIZE, CLASSES, IMAGES = 32, 12, 7


class Pictures(Dataset):
    def __init__(self, length, seed):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(length, 3, SIZE, SIZE, generator=generator)
        self.targets = torch.randint(3, (length,), generator=generator).tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "target": self.targets[index]}


class Target(LightningDataModule):
    """Sets up the test set only when asked for, as Lightning's own examples do."""

    def setup(self, stage):
        if stage == "fit":
            self.train_set = IndexedDataset(Pictures(12, seed=1))
        if stage == "test":
            self.test_set = Pictures(9, seed=2)

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=4, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.test_set, batch_size=4)


class TrainingOnly(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(IndexedDataset(Pictures(12, seed=1)), batch_size=4)


class StateAtTrainEnd(Callback):
    def on_train_end(self, trainer, pl_module):
        self.state = deepcopy(pl_module.state_dict())
        self.modes = [module.training for module in pl_module.modules()]
        self.rng = torch.get_rng_state()


def _pretrained():
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=CLASSES)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
    torch.nn.init.normal_(model.get_classifier().weight)
    return model.eval()


def _module(**kwargs):
    return ImageClassificationModule(
        _pretrained(), num_classes=3, **({"learning_rate": 0.05, "batch_norm": "train"} | kwargs)
    )


def _dataset(path, model):
    config = timm.data.resolve_model_data_config(model)
    settings = {name: config[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    return retention_images(path, SIZE, num_classes=CLASSES, **settings)


@torch.no_grad()
def _logits(model, path):
    dataset = _dataset(path, model)
    return torch.cat([model(dataset[i]["image"][None]) for i in range(len(dataset))]).double().numpy()


@pytest.fixture
def unlabelled(tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(IMAGES):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def labelled(unlabelled):
    """Labels that the pre-trained model gets right for some of the images."""
    labels = _logits(_pretrained(), unlabelled).argmax(1)
    labels[::3] = (labels[::3] + 1) % CLASSES
    rows = "".join(f"images/{number}.png,{label}\n" for number, label in enumerate(labels))
    file = unlabelled.parent / "labels.csv"
    file.write_text("file,class_index\n" + rows)
    return file


def _fit(folder, callbacks, module=None, datamodule=None, ckpt_path=None, **kwargs):
    torch.manual_seed(7)
    module = module or _module()
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=callbacks,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **(settings | kwargs),
    )
    trainer.fit(module, datamodule=datamodule or Target(), ckpt_path=ckpt_path)
    return module


def _original(module, batch_norm):
    """Rebuild the fine-tuned body with the pre-trained head (and BatchNorm layers) by parameter names alone."""
    model = _pretrained()
    keep = {name for name in model.state_dict() if name.startswith("fc.")}
    if batch_norm:
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                keep |= {f"{name}.{key}" for key in layer.state_dict()}
    state = model.state_dict()
    model.load_state_dict({k: state[k] if k in keep else module.model.state_dict()[k] for k in model.state_dict()})
    return model.eval()


def test_accuracy_is_measured_before_and_after_with_both_kinds_of_batch_norm(tmp_path, labelled):
    module = _fit(tmp_path / "run", [RetentionCallback(str(labelled), image_size=SIZE, batch_size=3)])
    metrics = read_metrics(tmp_path / "run" / "metrics.json")
    labels = [int(line.split(",")[1]) for line in labelled.read_text().splitlines()[1:]]

    def accuracy(model, k):
        return top_k_accuracy_score(labels, _logits(model, labelled), k=k, labels=range(CLASSES))

    for key, model in {
        "retention/before/top{}": _pretrained(),
        "retention/after/top{}": _original(module, batch_norm=False),
        "retention/after/top{}_original_bn": _original(module, batch_norm=True),
    }.items():
        assert metrics[key.format(1)] == pytest.approx(accuracy(model, 1)), key
        assert metrics[key.format(5)] == pytest.approx(accuracy(model, 5)), key
    assert 0 < metrics["retention/before/top1"] < 1
    assert metrics["average"] == pytest.approx((metrics["target/top1"] + metrics["retention/after/top1"]) / 2)
    assert set(metrics) <= {metric.key for metric in METRICS}
    assert (tmp_path / "run" / "retention.png").stat().st_size > 0


def test_without_labels_agreement_and_kl_are_measured(tmp_path, unlabelled):
    module = _fit(tmp_path / "run", [RetentionCallback(str(unlabelled), image_size=SIZE, batch_size=3)])
    metrics = read_metrics(tmp_path / "run" / "metrics.json")
    reference = _logits(_pretrained(), unlabelled)
    for kind, batch_norm in (("", False), ("_original_bn", True)):
        now = _logits(_original(module, batch_norm), unlabelled)
        p, q = (torch.from_numpy(x).softmax(1).numpy() for x in (reference, now))
        assert metrics[f"retention/after/kl{kind}"] == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-3)
        agreed = (reference.argmax(1) == now.argmax(1)).mean()
        assert metrics[f"retention/after/agreement{kind}"] == pytest.approx(agreed)
        assert metrics[f"average{kind}"] == pytest.approx((metrics["target/top1"] + agreed) / 2)
    assert metrics["retention/after/kl"] > 0
    assert metrics["retention/after/kl"] != metrics["retention/after/kl_original_bn"]


def test_target_and_its_hardest_samples(tmp_path):
    module = _module()
    before = deepcopy(module).eval()
    _fit(tmp_path, [RetentionCallback(hard_fraction=0.3)], module)
    metrics = read_metrics(tmp_path / "metrics.json")
    test = Pictures(9, seed=2)
    targets = torch.tensor(test.targets)
    with torch.no_grad():
        first, last = before(test.images), module.eval()(test.images)
    losses = -first.log_softmax(1).gather(1, targets[:, None]).flatten().numpy()
    hard = np.argsort(losses)[-3:]
    right = (last.argmax(1) == targets).numpy()
    assert metrics["target/before/top1"] == pytest.approx((first.argmax(1) == targets).double().mean().item())
    assert metrics["target/top1"] == pytest.approx(right.mean())
    assert metrics["target/hard_top1"] == pytest.approx(right[hard].mean())
    assert not [key for key in metrics if key.startswith("retention/after")]


def test_without_test_set_only_the_pretrained_task_is_measured(tmp_path, labelled):
    callback = RetentionCallback(str(labelled), image_size=SIZE)
    with pytest.warns(UserWarning, match="no test_dataloader"):
        _fit(tmp_path, [callback], datamodule=TrainingOnly())
    metrics = read_metrics(tmp_path / "metrics.json")
    assert "retention/after/top1" in metrics and "target/top1" not in metrics and "average" not in metrics


def test_measuring_leaves_no_trace(tmp_path, labelled):
    plain, probe = StateAtTrainEnd(), StateAtTrainEnd()
    _fit(tmp_path, [plain])
    module = _fit(tmp_path, [probe, RetentionCallback(str(labelled), image_size=SIZE, every_n_epochs=1)])
    assert torch.equal(torch.get_rng_state(), probe.rng)
    assert torch.equal(plain.rng, probe.rng)
    assert [submodule.training for submodule in module.modules()] == probe.modes == plain.modes
    for name, value in module.state_dict().items():
        assert torch.equal(value, probe.state[name]) and torch.equal(value, plain.state[name]), name


def test_without_batch_norm_both_kinds_are_equal(tmp_path, unlabelled):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=CLASSES, img_size=SIZE)
    module = ImageClassificationModule(model, num_classes=3, learning_rate=0.05)
    _fit(tmp_path, [RetentionCallback(str(unlabelled), image_size=SIZE)], module)
    metrics = read_metrics(tmp_path / "metrics.json")
    for name in ("agreement", "kl"):
        assert metrics[f"retention/after/{name}_original_bn"] == metrics[f"retention/after/{name}"]


def test_epochs_are_measured_and_logged(tmp_path, labelled):
    logger = CSVLogger(tmp_path, name="", version="run")
    _fit(tmp_path, [RetentionCallback(str(labelled), SIZE, every_n_epochs=1)], logger=logger)
    metrics = read_metrics(tmp_path / "run" / "metrics.json")
    course = metrics["retention/epochs"]
    assert [(entry["epoch"], entry["step"]) for entry in course] == [(1, 3), (2, 6)]
    assert course[-1]["top1"] == metrics["retention/after/top1"]
    assert course[-1]["top1_original_bn"] == metrics["retention/after/top1_original_bn"]
    assert "retention/epoch/top1" in (tmp_path / "run" / "metrics.csv").read_text()


@pytest.mark.parametrize("kind", ["labelled", "unlabelled"])
def test_two_processes_measure_what_one_does(tmp_path, kind, request):
    path = str(request.getfixturevalue(kind))
    found = []
    for name, settings in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        module = _module(learning_rate=0.0, batch_norm="frozen")
        _fit(tmp_path / name, [RetentionCallback(path, SIZE, batch_size=2)], module, max_epochs=1, **settings)
        found.append(read_metrics(tmp_path / name / "metrics.json"))
    one, two = ({key: value for key, value in run.items() if "time/" not in key} for run in found)
    assert one.keys() == two.keys()
    assert two == pytest.approx(one, abs=1e-6)


def test_more_processes_than_images(tmp_path, unlabelled):
    for number in range(1, IMAGES):
        (unlabelled / f"{number}.png").unlink()
    callback = RetentionCallback(str(unlabelled), SIZE)
    _fit(tmp_path, [callback], _module(learning_rate=0.0), max_epochs=1, devices=2, strategy="ddp_fork")
    assert read_metrics(tmp_path / "metrics.json")["retention/samples"] == 1


@pytest.mark.parametrize("kind", ["labelled", "unlabelled"])
def test_a_resumed_fit_keeps_what_was_measured_before(tmp_path, kind, request):
    path = str(request.getfixturevalue(kind))
    whole, resumed = (RetentionCallback(path, SIZE, every_n_epochs=1) for _ in range(2))
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    _fit(tmp_path / "a", [whole, checkpoint], enable_checkpointing=True)
    torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    _fit(tmp_path / "b", [resumed], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.state.before == whole.state.before  # the seconds it took included: not measured again
    assert torch.equal(resumed.state.hard, whole.state.hard)
    assert [entry["epoch"] for entry in resumed.state.epochs] == [1, 2]
    if kind == "unlabelled":
        assert torch.equal(resumed.state.reference, whole.state.reference)
    assert "target/before/top1" in read_metrics(tmp_path / "b" / "metrics.json")


def test_a_resumed_fit_with_other_images_is_refused(tmp_path, unlabelled):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    _fit(tmp_path, [RetentionCallback(str(unlabelled), SIZE), checkpoint], enable_checkpointing=True)
    (unlabelled / "0.png").unlink()
    with pytest.raises(ValueError, match=r"retention/samples is 7 .* but 6 now"):
        _fit(tmp_path, [RetentionCallback(str(unlabelled), SIZE)], ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_checkpoint_without_measurement_is_named(tmp_path, labelled):
    _fit(tmp_path, [ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)], enable_checkpointing=True)
    with pytest.warns(UserWarning, match="written without RetentionCallback"):
        _fit(tmp_path, [RetentionCallback(str(labelled), SIZE)], ckpt_path=tmp_path / "epoch=0.ckpt")
    metrics = read_metrics(tmp_path / "metrics.json")
    assert "retention/after/top1" in metrics and "retention/before/top1" not in metrics


def test_the_order_of_callbacks_is_checked(tmp_path):
    with pytest.raises(ValueError, match="Put RetentionCallback last"):
        _fit(tmp_path, [RetentionCallback(), HeadRefitCallback()])


@pytest.mark.parametrize("arguments", [{"every_n_epochs": 0}, {"hard_fraction": 0.0}, {"hard_fraction": 1.5}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RetentionCallback(**arguments)
