"""The schedule against the formula of the cosine, rates by depth, and optimizers that come back from a checkpoint."""

import importlib
import sys

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn, optim

import flow_lightning as fl
from flow_lightning.configurations import find_configuration
from flow_lightning.modules.optimization import optimizer_factory, optimizer_settings
from tests.examples import fit, make_trainer
from tests.images import PictureData, tiny_module
from tests.language import language_data, language_module


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("cosine", 0.0, [0.5 * (1 + np.cos(np.pi * k / 8)) for k in range(8)]),
        ("constant", 0.0, [1.0] * 8),
        ("cosine", 0.25, [0.5, 1.0] + [0.5 * (1 + np.cos(np.pi * k / 6)) for k in range(6)]),
    ],
)
def test_the_learning_rate_follows_the_schedule_step_by_step(schedule, warmup, expected):
    rates = []

    class Recorded(fl.ImageClassificationModule):
        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    torch.manual_seed(0)
    module = Recorded("test_resnet.r160_in1k", 3, pretrained=False, learning_rate=0.1, schedule=schedule, warmup=warmup)
    make_trainer(max_epochs=2).fit(module, datamodule=PictureData())
    np.testing.assert_allclose(rates, 0.1 * np.array(expected), rtol=1e-6)


#: Blocks from the top, by hand.
VIT = {"model.head": 0, "model.norm": 1, "model.patch_embed": 8, "model.cls_token": 9, "model.pos_embed": 9}
VIT |= {f"model.blocks.{number}": 7 - number for number in range(6)}
LANGUAGE = {"lm_head": 0, "model.norm": 1, "layers.1": 2, "layers.0": 3, "embed_tokens": 4}
LORA = {"layers.1": 0, "layers.0": 1}


@pytest.mark.parametrize(
    ("make", "from_the_top"),
    [
        (lambda **s: tiny_module("test_vit.r160_in1k", **s), VIT),
        (language_module, LANGUAGE),
        (lambda **s: language_module(tune="lora", lora_r=2, **s), LORA),
    ],
    ids=["vit", "language", "lora"],
)
def test_each_block_has_its_own_rate_and_the_groups_of_the_optimizer_keep_their_settings(make, from_the_top):
    def in_two_groups(parameters):
        return optim.AdamW([{"params": [p], "weight_decay": 0.1 * (p.ndim > 1)} for p in parameters])

    module = make(optimizer=in_two_groups, learning_rate=0.1, layer_decay=0.5, schedule="constant", warmup=0.0)
    groups = module.configure_optimizers().param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(found) == len(trained) == sum(len(group["params"]) for group in groups)
    for name, parameter in trained.items():
        (blocks,) = [blocks for part, blocks in from_the_top.items() if f"{part}." in f"{name}."]
        assert found[id(parameter)] == pytest.approx((0.1 * 0.5**blocks, 0.1 * (parameter.ndim > 1))), name


def test_the_schedule_keeps_the_rates_of_the_blocks():
    module = tiny_module("test_vit.r160_in1k", model_kwargs={"img_size": 32}, layer_decay=0.5, learning_rate=0.1)
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, datamodule=PictureData())
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {0.0}  # at the end of the cosine
    assert {group["initial_lr"] for group in trainer.optimizers[0].param_groups} == {0.1 * 0.5**k for k in range(10)}


@pytest.mark.parametrize("decay", [0.0, 1.5, float("nan")])
def test_a_wrong_decay_is_refused(decay):
    with pytest.raises(ValueError, match=f"layer_decay is {decay}"):
        tiny_module(layer_decay=decay, schedule="constant").configure_optimizers()


def settings_of(optimizer):
    """Class and settings of an optimizer, without what the schedule changes and `learning_rate` replaces."""
    return type(optimizer), {key: value for key, value in optimizer.defaults.items() if key != "lr"}


OPTIMIZERS = {
    "AdamW": lambda p: optim.AdamW(p, weight_decay=0.3, betas=(0.8, 0.95), amsgrad=True),
    "SGD": lambda p: optim.SGD(p, momentum=0.7, nesterov=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_checkpoint_gives_parameters_and_optimizer_back_with_its_settings(optimizer):
    module, trainer = tiny_module(optimizer=optimizer, learning_rate=0.01), make_trainer(max_steps=2)
    trainer.fit(module, datamodule=PictureData())
    trained = module.state_dict()
    for _ in range(2):  # a module that was loaded is saved again
        trainer.save_checkpoint("x.ckpt")
        module = fl.ImageClassificationModule.load_from_checkpoint("x.ckpt", weights_only=True)
        torch.testing.assert_close(module.state_dict(), trained, rtol=0, atol=0)
        trainer = make_trainer()
        trainer.test(module, datamodule=PictureData(), verbose=False)
    made = module.optimizer(module.parameters())
    assert settings_of(made) == settings_of(optimizer([nn.Parameter(torch.zeros(1))]))
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=PictureData())
    assert settings_of(trainer.optimizers[0]) == settings_of(made) and module.learning_rate == 0.01


@pytest.mark.slow
def test_the_shipped_adamw_of_8_bits_trains_in_bfloat16_as_adamw_does_in_float32(tmp_path, monkeypatch):
    """At rates where the steps of plain AdamW are lost in bfloat16. Its step is not compiled here: that takes 40 s."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    shipped = yaml.safe_load(find_configuration("optimizers/adamw8bit").read_text())
    importlib.import_module("torchao.optim")
    rounded = optimizer_factory(shipped["model"]["init_args"]["optimizer"])
    plain, found, states = (lambda p: optim.AdamW(p, weight_decay=0.0)), [], []
    half = shipped["trainer"]["precision"]
    for optimizer, precision in ((plain, "32-true"), (plain, half), (rounded, half)):
        data = language_data(tmp_path, 32, batch_size=4)
        module = language_module(optimizer=optimizer, learning_rate=1e-4, layer_decay=0.9)
        _, trainer = fit(module=module, data=data, max_epochs=6, precision=precision)
        module.float().eval()
        with torch.no_grad():
            found.append(float(torch.cat([module.sample_losses(batch) for batch in data.scoring_dataloader()]).mean()))
        states.append(module.hparams["optimizer"]["init_args"])
    exact, lost, kept = found
    assert kept == pytest.approx(exact, abs=0.02) and lost > exact + 0.2
    assert states[-1]["bf16_stochastic_round"] is True, "a checkpoint gives it back"
    assert {group["lr"].item() for group in trainer.optimizers[0].param_groups} == {0.0}, "the schedule reached its end"


def command_line(*arguments):
    """Fit through LightningCLI, which builds the optimizer from a configuration."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    model = ["--model.model=test_resnet.r160_in1k", "--model.num_classes=3", "--model.pretrained=false"]
    return LightningCLI(
        fl.ImageClassificationModule,
        PictureData,
        auto_configure_optimizers=False,
        save_config_callback=None,
        trainer_defaults={"accelerator": "cpu", "limit_train_batches": 2, "max_epochs": 1, **quiet},
        args=["fit", *model, *arguments],
    )


def test_a_checkpoint_of_the_command_line_gives_the_optimizer_back():
    chosen = {"": "torch.optim.AdamW", ".weight_decay": "0.3", ".betas": "[0.8,0.95]"}
    arguments = [f"--model.optimizer{key}={value}" for key, value in chosen.items()]
    command_line(*arguments).trainer.save_checkpoint("x.ckpt")
    module = fl.ImageClassificationModule.load_from_checkpoint("x.ckpt", weights_only=True)
    kind, settings = settings_of(module.optimizer(module.parameters()))
    assert kind is optim.AdamW and settings["weight_decay"] == 0.3 and tuple(settings["betas"]) == (0.8, 0.95)
    resumed = command_line("--ckpt_path=x.ckpt", "--trainer.max_epochs=2")
    kind, settings = settings_of(resumed.trainer.optimizers[0])
    assert kind is optim.AdamW and settings["weight_decay"] == 0.3 and resumed.trainer.global_step == 4


class Unseen(optim.SGD):
    """An optimizer of the user's own."""


def test_an_optimizer_that_was_not_imported_is_refused(monkeypatch):
    settings = optimizer_settings(Unseen([nn.Parameter()], lr=0.5, momentum=0.9))
    assert optimizer_factory(settings)([nn.Parameter()]).defaults["momentum"] == 0.9
    monkeypatch.delitem(sys.modules, Unseen.__module__)
    with pytest.raises(ValueError, match=r"Unseen' is not known\. Import its module before loading"):
        optimizer_factory(settings)


@pytest.mark.parametrize("path", ["os.system", "lightning.Trainer", "SGD"])
def test_a_checkpoint_cannot_choose_what_code_runs(path):
    with pytest.raises(ValueError, match="is not known"):
        optimizer_factory({"class_path": path, "init_args": {}})
