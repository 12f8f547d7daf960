"""The point that a fit ends on, and that it is the right one by hand, whatever else is in the fit."""

from pathlib import Path

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy

import flow_lightning as fl
from flow_lightning.distributed import fill
from flow_lightning.measures import GeneralText, PretrainedImages
from flow_lightning.measures.outcomes import halves
from flow_lightning.method.budget import accuracy_kept, agreement_kept
from flow_lightning.method.path import point
from flow_lightning.report.metrics import METRICS, read_metrics
from tests import retention, unchanged
from tests.examples import slow
from tests.processes import launch
from tests.retention import SIZE, image_fit, image_module, labelled_images, language_fit, unlabelled_images
from tests.shards import full

ALPHAS, CONV = [0.0, 0.25, 0.5, 0.75, 1.0], "model.conv1.0.weight"


class Train(Callback):
    """Stands for training: the same change of all parameters, whatever the optimizer has done before."""

    def __init__(self, size=0.3, only=""):
        self.size, self.only = size, only

    def on_train_epoch_end(self, trainer, pl_module):
        generator = torch.Generator().manual_seed(trainer.current_epoch)
        with torch.no_grad():
            for name, value in pl_module.named_parameters():
                if value.requires_grad and self.only in name:
                    whole = full(value.detach())
                    size = self.size * whole.abs().mean() if whole.any() else 0.01
                    fill(value, whole + size * torch.randn(whole.shape, generator=generator))
        self.state = copy_of(pl_module)


def budget(**settings):
    """A budget that is so loose that the few images of the tests can show something."""
    if isinstance(images := settings.get("data"), str) and settings.get("of") != "perplexity":
        settings["data"] = PretrainedImages(images, image_size=SIZE)
    loose = {"keep": 0.3, "confidence": 0.5, "of": "agreement", "alphas": ALPHAS}
    return fl.RetentionBudgetCallback(**(loose | settings))


def run(callback, *callbacks, size=0.3, **settings):
    """Fit images without a learning rate; return module and fine-tuned state."""
    train = Train(size)
    settings = {"max_epochs": 1, "module": image_module(learning_rate=0.0)} | settings
    module, _ = image_fit(callback, train, *callbacks, **settings)
    return module, getattr(train, "state", None)  # processes do not share memory


def line(start, end, alpha):
    """Return the point by hand; integers are those of the end."""
    return {
        name: (1 - alpha) * value + alpha * end[name] if value.is_floating_point() else end[name]
        for name, value in start.items()
    }


def check_point(module, start, end, alpha, but=("model.fc.",)):
    for name, value in module.state_dict().items():
        if not name.startswith(but) and value.is_floating_point():
            torch.testing.assert_close(value, line(start, end, alpha)[name], msg=name)


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def saved(name):
    return torch.load(f"run/checkpoints/{name}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(("of", "shape"), [("accuracy", "even"), ("agreement", "depth")])
def test_every_point_keeps_what_a_model_built_by_hand_keeps(tmp_path, of, shape):
    images = (labelled_images if of == "accuracy" else unlabelled_images)(tmp_path)
    callback, reference, start = (
        budget(of=of, data=images, shape=shape, curve=True),
        retention.pretrained(),
        image_module().state_dict(),
    )
    _, end = run(callback, size=1.0)
    answers, own = [], reference.state_dict()
    for alpha in ALPHAS:
        body = line(start, end, alpha) if shape == "even" else point(start, end, alpha, "depth")
        body = {name.removeprefix("model."): value for name, value in body.items() if ".fc." not in name}
        reference.load_state_dict(own | {name: value for name, value in body.items() if name in own})
        answers.append(torch.from_numpy(retention.logits(reference, images)).argmax(1))
    half = halves([f"{number}.png" for number in range(retention.IMAGES)], 99)[0]
    if of == "accuracy":
        rows = Path(images).read_text().splitlines()[1:]
        labels = torch.tensor([int(row.rpartition(",")[2]) for row in rows])
        answers = [(answer == labels).float() for answer in answers]
    compare = {"accuracy": accuracy_kept, "agreement": agreement_kept}[of]
    shares = [compare(answers[0][half], answer[half], 0.5).share for answer in answers]
    assert [each["kept"] for each in callback.points] == pytest.approx(shares)
    assert [each["alpha"] for each in callback.points] == ALPHAS and len(set(shares)) > 1


@pytest.mark.parametrize(("guard", "epochs"), [(False, 4), (True, 2)])
def test_a_guard_ends_a_training_that_keeps_too_little_at_its_first_point(tmp_path, guard, epochs):
    """The weights change after the guard has looked, so it sees those of the first epoch at the end of the second."""
    callback = budget(data=unlabelled_images(tmp_path), keep=0.5, alphas=[0.5, 1.0], guard=guard)
    _, trainer = image_fit(callback, Train(100.0), module=image_module(learning_rate=0.0), max_epochs=4)
    assert trainer.current_epoch == epochs


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_the_fit_ends_on_the_last_point_that_keeps_the_budget(tmp_path, batch_norm, rendered):
    """The first point that is not kept ends the search, but for the last one. Running statistics are on the path."""
    start = copy_of(module := image_module(learning_rate=0.0, batch_norm=batch_norm))
    callback = budget(data=unlabelled_images(tmp_path), keep=0.5)
    module, end = run(callback, module=module, size=0.5)
    kept = [each["bound"] >= 0.5 for each in callback.points]
    failed = kept.index(False)
    assert callback.alpha == ALPHAS[failed - 1] > 0
    assert [each["alpha"] for each in callback.points] == sorted({*ALPHAS[: failed + 1], 1.0})
    check_point(module, start, end, callback.alpha, but=())
    moved = not torch.equal(start["model.bn1.running_mean"], end["model.bn1.running_mean"])
    assert moved == (batch_norm == "train")
    metrics = read_metrics("run/metrics.json")
    assert metrics["budget/alpha"] == callback.alpha and metrics["path/points"] == callback.points
    assert {key for key in metrics if key.startswith("budget/")} <= {metric.key for metric in METRICS}
    assert Path("run/path.png").read_bytes()[:4] == b"\x89PNG"


def test_a_budget_that_is_kept_changes_nothing(tmp_path):
    plain, _ = image_fit(max_epochs=2)
    callback = budget(data=unlabelled_images(tmp_path), keep=0.01, guard=True)
    module, trainer = image_fit(callback, max_epochs=2)
    assert callback.alpha == 1 and trainer.current_epoch == 2
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_if_no_point_keeps_it_the_body_is_the_pretrained_one_with_a_solved_head(tmp_path):
    probe, module = fl.LinearProbeCallback(), image_module(learning_rate=0.0)
    start = copy_of(module)
    callback = budget(data=unlabelled_images(tmp_path), keep=0.6, alphas=[0.5, 1.0])
    with pytest.warns(UserWarning, match=r"No point of the path surely keeps 60\.0% .* pre-trained one again"):
        module, _ = run(callback, probe, module=module, size=30.0)
    assert callback.alpha == 0
    for name, value in module.state_dict().items():
        if not name.startswith("model.fc."):
            assert torch.equal(value, start[name]), name
    torch.testing.assert_close(module.head.weight, probe.probe.head.weight)


def test_a_path_by_depth_ends_beside_the_fine_tuned_model_so_its_model_is_written(tmp_path):
    callback = budget(data=unlabelled_images(tmp_path), keep=0.01, shape="depth")
    module, end = run(callback, size=0.1, enable_checkpointing=True)
    assert callback.alpha == 1 and torch.equal(saved("budget")[CONV], module.model.conv1[0].weight)
    assert not torch.equal(module.model.conv1[0].weight, end[CONV])


@pytest.mark.parametrize("turn", [1, -1])
def test_the_order_of_the_callbacks_does_not_matter(tmp_path, turn):
    """The head is solved on the chosen body, with the weights of the fit; then it is measured and written."""
    callback = budget(data=unlabelled_images(tmp_path), alphas=[0.5])
    measure = fl.RetentionCallback(measures=[retention.SizeOfHead()])
    others = [fl.LinearProbeCallback(), fl.FlowWeightingCallback(), measure]
    start = image_module().state_dict()
    module, end = run(*[callback, *others][::turn], enable_checkpointing=True)
    assert callback.alpha == 0.5
    check_point(module, start, end, 0.5)
    torch.testing.assert_close(module.state_dict(), saved("refitted"), rtol=0, atol=0)
    metrics = read_metrics("run/metrics.json")
    assert metrics["retention/after/size"] == module.head.weight.abs().max().item() and "refit/strength" in metrics


def test_averaged_weights_are_the_end_of_the_path(tmp_path):
    module, start = image_module(learning_rate=0.0), image_module().state_dict()
    average = WeightAveraging(device="cpu", use_buffers=True)
    callback = budget(data=unlabelled_images(tmp_path), alphas=[0.5])
    module, end = run(callback, average, module=module, max_epochs=1, enable_checkpointing=True)
    assert callback.alpha == 0.5
    mean = average._average_model.module.state_dict()[CONV]
    assert not torch.equal(mean, end[CONV])
    torch.testing.assert_close(module.model.conv1[0].weight, (start[CONV] + mean) / 2)
    assert torch.equal(saved("budget")[CONV], module.model.conv1[0].weight)


def fit_frozen(images, folder, **settings):
    module = image_module(learning_rate=0.0, batch_norm="frozen")
    run(budget(data=images), size=0.5, module=module, default_root_dir=folder, **settings)


def fit_in_shards(images):
    fit_frozen(images, "run2", devices=2, strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=False))


@pytest.mark.parametrize("in_shards", [False, slow(True)])
def test_two_processes_choose_as_one(tmp_path, in_shards):
    images = unlabelled_images(tmp_path)
    fit_frozen(images, "run1")
    if in_shards:
        launch(fit_in_shards, images)
    else:
        fit_frozen(images, "run2", devices=2, strategy="ddp_fork")
    one, two = (read_metrics(f"run{processes}/metrics.json") for processes in (1, 2))
    assert one["budget/alpha"] == two["budget/alpha"] > 0
    assert len({each["kept"] for each in one["path/points"]}) > 1
    for first, second in zip(one["path/points"], two["path/points"]):
        assert second == pytest.approx(first, rel=1e-3)


def test_a_resumed_fit_chooses_as_an_unbroken_one(tmp_path):
    images, results = unlabelled_images(tmp_path), []
    for path in (None, "c/epoch=0.ckpt"):
        callbacks = budget(data=images), ModelCheckpoint("c", "{epoch}", save_top_k=-1), fl.LinearProbeCallback()
        settings = {"max_epochs": 2, "size": 0.5, "ckpt_path": path, "enable_checkpointing": True}
        module, _ = run(*callbacks, module=image_module(learning_rate=0.0, batch_norm="frozen"), **settings)
        results.append((callbacks[0].points, callbacks[0].alpha, module.state_dict()))
    assert results[0][:2] == results[1][:2] and len({each["kept"] for each in results[1][0]}) > 1
    torch.testing.assert_close(results[0][2], results[1][2])


def test_a_resumed_fit_must_start_from_the_same_pretrained_model(tmp_path):
    images, keep = unlabelled_images(tmp_path), ModelCheckpoint("c", "{epoch}", save_top_k=-1)
    run(budget(data=images), keep, enable_checkpointing=True)
    other = image_module(learning_rate=0.0)
    torch.nn.init.constant_(other.model.conv1[0].weight, 0.1)
    with pytest.raises(ValueError, match=r"not the pre-trained one .*model\.conv1\.0\.weight differs"):
        run(budget(data=images), module=other, max_epochs=2, ckpt_path="c/epoch=0.ckpt")
    image_fit(ModelCheckpoint("d", "{epoch}", save_top_k=-1), max_epochs=1, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="written without RetentionBudgetCallback"):
        run(budget(data=images), max_epochs=2, ckpt_path="d/epoch=0.ckpt")


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_perplexity_of_text_is_that_of_the_measure(monkeypatch, tune):
    """One half is all of the text here, so that GeneralText measures the same."""
    module = retention.language_module(learning_rate=0.0, tune=tune, **({"lora_r": 2} if tune == "lora" else {}))
    start = copy_of(module)
    monkeypatch.setattr("flow_lightning.callbacks.retention_budget.halves", lambda groups, most: [list(groups)] * 2)
    monkeypatch.setattr("flow_lightning.method.budget._FEWEST_TEXTS", 1)
    callback = budget(of="perplexity", data=retention.text_file(), keep=0.2, alphas=[0.5])
    report, train = fl.RetentionCallback(measures=[GeneralText([retention.text_file()], window=256)]), Train(0.5)
    module, _ = language_fit(callback, report, train, module=module, max_epochs=1)
    metrics = read_metrics("run/metrics.json")
    before, after = (metrics[f"retention/{when}/perplexity"] for when in ("before", "after"))
    assert metrics["budget/alpha"] == 0.5 and metrics["budget/kept"] == pytest.approx(before / after, rel=1e-5)
    assert abs(before / after - 1) > 1e-3
    for name, value in module.state_dict().items():
        expected = line(start, train.state, 0.5)[name]
        if "lora_" in name:
            expected = train.state[name] * (0.5 if "lora_B" in name else 1)
        torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_agreement_of_a_language_model_is_that_of_its_next_tokens(monkeypatch, tune):
    """By hand: the tokens of whole logits, window by window, of the model without adapters and of the point."""
    module = retention.language_module(learning_rate=0.0, tune=tune, **({"lora_r": 2} if tune == "lora" else {}))
    monkeypatch.setattr("flow_lightning.method.budget._FEWEST_TEXTS", 1)
    text = GeneralText([retention.text_file()], window=20, batch_size=3)
    callback = budget(data=text, keep=0.1, alphas=[0.5])
    module, _ = language_fit(callback, Train(0.3), module=module, max_epochs=1)
    windows = text.loader.dataset
    rows = [windows[i]["input_ids"][None] for i in halves(range(len(windows)), 1000)[0]]
    with torch.no_grad():
        now = torch.cat([module.eval()(row)[0, :-1].argmax(1) for row in rows])
        with module.frozen_reference():
            start = module if tune == "lora" else retention.language_module()
            before = torch.cat([start.eval()(row)[0, :-1].argmax(1) for row in rows])
    share = float((now == before).double().mean())
    assert callback.alpha == 0.5 and callback.points[-1]["kept"] == pytest.approx(share) and 0.1 < share < 1


@pytest.mark.parametrize("flow", [[], [fl.FlowWeightingCallback()]], ids=len)
def test_an_unchanged_module_agrees_with_itself_on_the_inputs_of_its_training(flow):
    dataset, start = unchanged.data(), copy_of(module := unchanged.Classifier())
    callback, train = budget(keep=0.5, alphas=[0.3, 1.0]), Train(2.0)
    unchanged.fit(module, dataset, callback, train, *flow, max_epochs=1, default_root_dir="run")
    half = halves(range(len(dataset)), 99)[0]
    answers = []
    for alpha in (0.0, 0.3, 1.0):
        other = unchanged.Classifier()
        other.load_state_dict(line(start, train.state, alpha))
        with torch.no_grad():
            answers.append(other.eval().net(dataset.tensors[0][half]).argmax(1))
    shares = [float((answer == answers[0]).float().mean()) for answer in answers]
    assert [each["kept"] for each in callback.points] == pytest.approx(shares) and shares[-1] < 1
    check_point(module, start, train.state, callback.alpha, but=())


@pytest.mark.parametrize("probed", [True, False])
def test_a_probed_head_is_not_part_of_what_an_unchanged_module_keeps(probed):
    """It will be solved anew, so answers are compared with the head from before training; another head counts."""
    dataset, module, callback = unchanged.data(), unchanged.Classifier(), budget(keep=0.01)
    callbacks = [callback, Train(20.0, only="net.4"), *[fl.LinearProbeCallback()] * probed]
    unchanged.fit(module, dataset, *callbacks, max_epochs=1, default_root_dir="run")
    shares = [each["kept"] for each in callback.points]
    assert (shares == [1] * 5) == probed and len({each["target_loss"] for each in callback.points}) == 5
