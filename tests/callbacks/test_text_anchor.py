"""The anchor on text in fits of language models, against the divergence of torch written into the loss by hand."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

import flow_lightning as fl
from flow_lightning.callbacks.text_anchor import TextAnchorCallback
from tests import examples, unchanged
from tests.examples import slow
from tests.language import SENTENCES, TOKENIZER, language_data, language_module, tiny_model
from tests.refusals import assert_refused
from tests.unchanged import Classifier

SETTINGS = {"strength": 5.0, "window": 12, "count": 3}


@pytest.fixture(autouse=True)
def text():
    Path("text.txt").write_text(" ".join(SENTENCES), encoding="utf-8")


class ByHand(fl.CausalLanguageModule):
    """Takes the windows that the callback has drawn, one for each step."""

    def training_step(self, batch, batch_idx):
        ids = self.windows[self.global_step % len(self.windows)][None]
        with torch.no_grad():
            before = self.start(input_ids=ids).logits[0].double().log_softmax(1)
        now = self(ids)[0].double().log_softmax(1)
        change = F.kl_div(now, before, log_target=True, reduction="batchmean")
        return super().training_step(batch, batch_idx) + 5.0 * change.float()


class Windows(examples.Callback):
    """Keeps the windows, which the callback drops at the end of a fit."""

    def on_train_end(self, trainer, pl_module):
        (anchor,) = (each for each in trainer.callbacks if isinstance(each, TextAnchorCallback))
        self.windows = [each.clone() for each in anchor._windows]


def by_hand(windows, **settings):
    module = language_module(ByHand, **settings)
    vars(module).update(windows=windows, start=tiny_model(len(TOKENIZER)).eval())
    return module


@pytest.mark.parametrize(
    ("tune", "texts", "flow"),
    [("full", None, False), ("lora", None, True), ("full", ["text.txt"], True), slow("lora", ["text.txt"], False)],
)
def test_a_fit_is_that_with_the_divergence_in_the_loss(tmp_path, tune, texts, flow):
    data, watch = language_data(tmp_path, batch_size=4), Windows()
    settings = {"tune": tune, "lora_r": 2, "lora_alpha": 2, "optimizer": torch.optim.SGD, "learning_rate": 0.2}
    weights = [fl.FlowWeightingCallback()] * flow
    held, plain = language_module(**settings), language_module(**settings)
    examples.fit(*weights, TextAnchorCallback(texts, **SETTINGS), watch, module=held, data=data, max_epochs=2)
    expected = by_hand(watch.windows, **settings)
    examples.fit(*weights, module=expected, data=data, max_epochs=2)
    examples.fit(*weights, module=plain, data=data, max_epochs=2)
    moved = [name for name, parameter in held.named_parameters() if parameter.requires_grad]
    for name in moved:
        torch.testing.assert_close(held.state_dict()[name], expected.state_dict()[name], rtol=1e-3, atol=2e-4)
    assert max((held.state_dict()[name] - plain.state_dict()[name]).abs().max() for name in moved) > 5e-3
    assert len(watch.windows) == 3 and all(2 <= len(window) <= 12 for window in watch.windows)


def test_the_windows_of_files_are_parts_of_them(tmp_path):
    watch = Windows()
    callback = TextAnchorCallback(["text.txt"], window=5, count=4)
    examples.fit(callback, watch, module=language_module(), data=language_data(tmp_path), max_steps=1)
    ids = TOKENIZER(Path("text.txt").read_text())["input_ids"]
    parts = [ids[i : i + 5] for i in range(0, len(ids), 5)]
    found = [parts.index(window.tolist()) for window in watch.windows]
    assert len(set(found)) == 4 and found != sorted(found)


def test_text_of_its_own_has_the_distribution_of_the_model(tmp_path):
    """The second token of 2,000 texts against the model's probabilities behind the first one."""
    model, watch = tiny_model(len(TOKENIZER)).eval(), Windows()
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)  # its first token had none, as it pads
    model.generation_config.top_k, model.generation_config.temperature = 2, 0.1  # have no part in it
    module = fl.CausalLanguageModule(copy.deepcopy(model), TOKENIZER)
    callback = TextAnchorCallback(window=2, count=2000)
    examples.fit(callback, watch, module=module, data=language_data(tmp_path), max_steps=1)
    windows = torch.stack(watch.windows)
    assert (windows[:, 0] == TOKENIZER.eos_token_id).all()
    with torch.no_grad():
        p = model(input_ids=windows[:1, :1]).logits[0, 0].double().softmax(0)
    counts = torch.bincount(windows[:, 1], minlength=len(p))
    large = p > 0.01
    deviations = (counts - 2000 * p)[large] / (2000 * p * (1 - p))[large].sqrt()
    assert large.sum() > 5 and deviations.abs().max() < 4


@pytest.mark.parametrize("tune", [slow("full"), "lora"])
def test_a_resumed_fit_ends_as_an_unbroken_one(tmp_path, tune):
    def once(path, *others, module=None):
        keep = ModelCheckpoint("c", "{step}", save_top_k=-1, every_n_train_steps=1)
        module, data = module or language_module(tune=tune, lora_r=2), language_data(tmp_path, batch_size=4)
        settings = {"max_epochs": 2, "ckpt_path": path, "enable_checkpointing": True}
        examples.fit(fl.ExactResumeCallback(), keep, *others, module=module, data=data, **settings)
        return module.state_dict()

    unbroken = once(None, TextAnchorCallback(**SETTINGS))
    torch.testing.assert_close(once("c/step=2.ckpt", TextAnchorCallback(**SETTINGS)), unbroken, rtol=0, atol=0)
    if tune == "full":
        other = language_module()
        torch.nn.init.constant_(other.causal_lm.lm_head.weight, 0.1)
        with pytest.raises(ValueError, match=r"not the pre-trained one"):
            once("c/step=2.ckpt", TextAnchorCallback(**SETTINGS), module=other)
        once(None)
        with pytest.raises(RuntimeError, match="written without TextAnchorCallback"):
            once("c/step=2-v1.ckpt", TextAnchorCallback(**SETTINGS))


class InOrder(fl.CausalLanguageModule):
    """Has batches of one sample, of two processes by turns, and leaves what it has learned in a file."""

    def train_dataloader(self):
        rows = [{"input_ids": torch.arange(i, i + 9), "labels": torch.arange(i, i + 9), "index": i} for i in range(8)]
        return torch.utils.data.DataLoader(rows[self.trainer.global_rank :: self.trainer.world_size])

    def on_train_end(self):
        adapters = {name: value for name, value in self.state_dict().items() if ".lora_" in name}
        torch.save(adapters, f"{self.trainer.world_size}{self.trainer.global_rank}.pt")


def test_two_processes_take_the_windows_of_two_micro_batches():
    for settings in ({"accumulate_grad_batches": 2}, {"devices": 2, "strategy": "ddp_fork"}):
        options = {"tune": "lora", "lora_r": 2, "lora_alpha": 2, "optimizer": torch.optim.SGD, "learning_rate": 0.2}
        module = language_module(InOrder, **options)
        examples.make_trainer(TextAnchorCallback(**SETTINGS), use_distributed_sampler=False, **settings).fit(module)
    one, *two = (torch.load(f"{name}.pt") for name in ("10", "20", "21"))
    for each in two:
        torch.testing.assert_close(each, one, rtol=1e-4, atol=1e-6)


def test_a_tokenizer_without_a_start_and_a_module_without_a_language_model_are_refused(tmp_path):
    module = language_module()
    module.tokenizer = copy.deepcopy(module.tokenizer)
    module.tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"Give texts=\[FILE\]"):
        examples.fit(TextAnchorCallback(), module=module, data=language_data(tmp_path))
    with pytest.raises(TypeError, match="needs a module with causal_lm and tokenizer"):
        unchanged.fit(Classifier(), unchanged.data(), TextAnchorCallback())


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"window": 1}, {"count": 0}])
def test_a_wrong_argument_is_refused(settings):
    assert_refused(TextAnchorCallback, settings)
