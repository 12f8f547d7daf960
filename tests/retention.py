"""Data and models for tests of what a fit learned and kept: pictures with a pre-trained task, instructions and text."""

from pathlib import Path

import numpy as np
import timm
import torch
from lightning import Callback, LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.data.retention_images import retention_images
from flow_lightning.measures import Measure, Metric, Panel
from tests.examples import fit
from tests.images import Pictures
from tests.language import SENTENCES, TOKENIZER, instructions, language_module, tiny_model, write_jsonl

SIZE, CLASSES, IMAGES = 32, 12, 7
TEXT = " ".join(SENTENCES)
TEMPLATE = "Q: {instruction} A: "


#: What a run on images measures, with labels and without.
RUN = {
    "target/before/top1": 0.6,
    "target/top1": 0.8,
    "target/hard_top1": 0.3,
    "retention/before/top1": 0.5,
    "retention/after/top1": 0.4,
    "retention/after/top1_original_bn": 0.42,
}
UNLABELLED = {"target/top1": 0.8, "retention/after/agreement": 0.7, "retention/after/kl": 0.2, "average": 0.75}


class SizeOfHead(Measure):
    """A measure of one's own: the largest weight of the head, which every step changes."""

    part = "retention"
    metrics = (
        Metric("retention/before/size", "size of the head before training", "number"),
        Metric("retention/after/size", "size of the head", "number", "down"),
    )
    panels = (Panel("size of the head", "number", "down", "retention/after/size"),)

    def __init__(self):
        self.measured = []

    def measure(self, trainer, module, when):
        self.measured.append(when)
        return {"size": module.head.weight.abs().max().item()}


class TrainingOnly(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(fl.IndexedDataset(Pictures(12, seed=1)), batch_size=4, shuffle=True)


class Target(TrainingOnly):
    """Sets up the test set only when asked for, as Lightning's own examples do."""

    def setup(self, stage):
        if stage == "test":
            self.test_set = Pictures(9, seed=2)

    def test_dataloader(self):
        return DataLoader(self.test_set, batch_size=4)


def pretrained():
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=CLASSES)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
    torch.nn.init.normal_(model.get_classifier().weight)
    return model.eval()


def image_module(**settings):
    return fl.ImageClassificationModule(
        pretrained(), num_classes=3, **({"learning_rate": 0.05, "batch_norm": "train"} | settings)
    )


def image_fit(*callbacks, module=None, data=None, **settings):
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0} | settings
    return fit(*callbacks, module=module or image_module(), data=data or Target(), **settings)


def unlabelled_images(folder):
    """Write images of the pre-trained task into a folder and return its path."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(IMAGES):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    return str(folder / "images")


def labelled_images(folder):
    """Write the same images and labels that the pre-trained model gets right for some of them."""
    labels = logits(pretrained(), unlabelled_images(folder)).argmax(1)
    labels[::3] = (labels[::3] + 1) % CLASSES
    rows = "".join(f"images/{number}.png,{label}\n" for number, label in enumerate(labels))
    (folder / "labels.csv").write_text("file,class_index\n" + rows)
    return str(folder / "labels.csv")


@torch.no_grad()
def logits(model, path):
    config = timm.data.resolve_model_data_config(model)
    settings = {name: config[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    dataset = retention_images(path, SIZE, num_classes=CLASSES, **settings)
    return torch.cat([model(dataset[i]["image"][None]) for i in range(len(dataset))]).double().numpy()


def text_file():
    Path("text.txt").write_text(TEXT)
    return "text.txt"


def language_data(test=None, **settings):
    """Nine instructions to train on, and a test set: three others, the given records, or False for none."""
    held_out = instructions(12)[9:] if test is None else test
    train = write_jsonl(Path("train.jsonl"), instructions(9))
    test = write_jsonl(Path("test.jsonl"), held_out) if held_out else None
    settings = {"template": TEMPLATE, "tokenizer": TOKENIZER, "validation_fraction": 0.0} | settings
    return fl.InstructionDataModule(train, test, **settings)


def language_fit(*callbacks, module=None, data=None, **settings):
    settings = {"max_epochs": 2, "limit_val_batches": 0} | settings
    return fit(*callbacks, module=module or language_module(), data=data or language_data(), **settings)


class Scripted(fl.CausalLanguageModule):
    """Says what `replies` has for a prompt, else always the same, and writes down what it is asked."""

    def __init__(self, default, replies=None):
        super().__init__(tiny_model(len(TOKENIZER)), TOKENIZER)
        self.default, self.replies, self.asked = default, replies or {}, []
        self.causal_lm.generate = self.generate

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, **settings):
        assert not do_sample and not self.causal_lm.training
        self.asked.append(input_ids)
        prompts = [TOKENIZER.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask)]
        answers = [TOKENIZER(self.replies.get(prompt, self.default))["input_ids"] for prompt in prompts]
        width = max(map(len, answers))
        padded = [answer + [settings["pad_token_id"]] * (width - len(answer)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


class OnFitStart(Callback):
    """Calls a function where a fit starts; processes do not share memory, so each rank's answer is a file."""

    def __init__(self, function):
        self.function = function

    def on_fit_start(self, trainer, pl_module):
        torch.save(self.function(trainer, pl_module), f"answer{trainer.global_rank}.pt")


def measured(measure, module=None, data=None, **settings):
    """Let a measure prepare and measure at the start of a fit, and return what each rank says."""

    def function(trainer, module):
        facts = measure.prepare(trainer, module)
        return {**facts, **measure.measure(trainer, module, "before")}

    _, trainer = language_fit(OnFitStart(function), module=module, data=data, **({"max_epochs": 0} | settings))
    return [torch.load(f"answer{rank}.pt") for rank in range(trainer.world_size)]
