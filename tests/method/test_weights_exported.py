"""Weights for other tools: tables, a column of a data set, and the example for the Trainer of transformers."""

import csv
import sys
from textwrap import dedent

import pandas
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, default_data_collator

import flow_lightning as fl
from flow_lightning.method.weights import SampleWeights

N, WORDS, CLASSES = 10, 6, 3


def some_weights(n=N):
    return SampleWeights.from_losses(torch.rand(n, generator=torch.Generator().manual_seed(0)) * 4 + 0.01)


def test_tables_hold_every_number_exactly():
    weights = some_weights()
    weights.to_csv("folder/weights.csv")
    weights.to_parquet("folder/weights.parquet")
    with open("folder/weights.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(N))
    table = pandas.read_parquet("folder/weights.parquet")
    assert list(table.columns) == ["index", "loss", "flow_weight"] and table["index"].tolist() == list(range(N))
    for name, column in (("loss", weights.losses), ("flow_weight", weights.weights)):
        assert torch.equal(torch.tensor([float(row[name]) for row in rows]), column)
        assert torch.equal(torch.tensor(table[name].to_numpy()), column)


def test_without_pyarrow_parquet_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"flow-lightning\[language\]"):
        some_weights().to_parquet("weights.parquet")


def test_a_data_set_gets_a_column_and_a_second_time_a_new_one():
    weights, dataset = some_weights(), Dataset.from_dict({"x": list(range(N))})
    for _ in range(2):
        dataset = weights.to_dataset(dataset)
    assert dataset.column_names == ["x", "flow_weight"]
    assert torch.equal(torch.tensor(dataset["flow_weight"][:]), weights.weights)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Dataset.from_dict({"x": [1, 2]}), ValueError, "2 samples, but there are 10 weights"),
        ([1, 2], TypeError, r"list has no columns.*weights\.of\(indices\)"),
    ],
)
def test_other_data_is_refused(dataset, error, message):
    with pytest.raises(error, match=message):
        some_weights().to_dataset(dataset)


def sentences():
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(20, (N, WORDS), generator=generator)
    return Dataset.from_dict({"input_ids": words.tolist(), "label": (words[:, 0] % CLASSES).tolist()})


def network():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=20, num_labels=CLASSES, hidden_dropout_prob=0.0, **sizes)
    config.attention_probs_dropout_prob = 0.0
    return BertForSequenceClassification(config)


def losses_of(model, batch):
    return F.cross_entropy(model(batch["input_ids"]).logits, batch["labels"], reduction="none")


def example() -> str:
    """The code in the docstring of `to_dataset`."""
    text = SampleWeights.to_dataset.__doc__.partition("::\n")[2]
    lines = text.splitlines()
    return dedent("\n".join(lines[: next(i for i, line in enumerate(lines) if "Its `settings`" in line)]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_of_transformers_takes_the_example_and_its_step_is_the_weighted_one(accumulate):
    """One step over all samples equals SGD on mean(w l), written here by hand without the library."""
    assert len([line for line in example().splitlines() if line]) <= 15
    model, dataset = network(), sentences()
    settings = TrainingArguments(
        "run", max_steps=1, per_device_train_batch_size=N // accumulate, gradient_accumulation_steps=accumulate,
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0,
        remove_unused_columns=False, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    names = {"model": model, "dataset": dataset, "settings": settings, "losses_of": losses_of, "fl": fl, "F": F}
    names |= {"Trainer": Trainer, "DataLoader": DataLoader, "default_data_collator": default_data_collator}
    exec(example(), names)

    fresh = network()
    words, labels = torch.tensor(dataset["input_ids"][:]), torch.tensor(dataset["label"][:])
    with torch.no_grad():
        l0 = F.cross_entropy(network().eval()(words).logits, labels, reduction="none")
    torch.testing.assert_close(names["weights"].losses, l0)
    w = torch.exp(-l0 / l0.quantile(0.5))
    (w * F.cross_entropy(fresh(words).logits, labels, reduction="none")).mean().backward()
    for (name, after), before in zip(model.named_parameters(), fresh.parameters()):
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=1e-5, atol=1e-6, msg=name)
