"""Data sets and samplers of one's own with edits in them, against the same done by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule
from torch.utils.data import DataLoader, Subset, TensorDataset

import flow_lightning as fl
from tests.data.test_edits import ISSUES, NAMES, TARGETS, write
from tests.examples import make_trainer


def samples(kind):
    """Four samples of one kind, with the classes of TARGETS."""
    pairs = TensorDataset(torch.arange(4.0), torch.tensor(TARGETS))
    return {
        "tensors": pairs,
        "subset": Subset(TensorDataset(torch.arange(5.0), torch.tensor([1, *TARGETS])), [1, 2, 3, 4]),
        "pairs": [(float(i), label) for i, label in enumerate(TARGETS)],
        "dicts": [{"x": float(i), "label": np.int64(label)} for i, label in enumerate(TARGETS)],
    }[kind]


@pytest.mark.parametrize("kind", ["tensors", "subset", "pairs", "dicts"])
def test_any_data_set_is_edited_and_its_labels_keep_their_type(kind):
    dataset = samples(kind)
    edited = fl.apply_edits(dataset, write("index,given_label,action\n0,0,drop\n2,2,1\n"))
    assert edited.targets == [1, 1, 0] and len(edited) == 3
    for new, old in zip([edited[i] for i in range(3)], [dataset[i] for i in (1, 2, 3)]):
        values, before = (list(each.values()) if kind == "dicts" else each for each in (new, old))
        assert type(new) is type(old) and values[0] == before[0] and type(values[1]) is type(before[1])
    labels = [edited[i]["label"] if kind == "dicts" else edited[i][1] for i in range(-3, 0)]
    assert [int(label) for label in labels] == edited.targets
    assert fl.IndexedDataset(edited)[2].index == 2 if kind != "dicts" else fl.IndexedDataset(edited)[2]["index"] == 2


def test_issues_are_dropped_from_any_data_set():
    assert fl.apply_edits(samples("pairs"), write(ISSUES), NAMES, drop_issues=True).targets == [1, 1]


def test_class_names_are_those_of_the_data_set_or_as_given():
    dataset, file = samples("tensors"), write('index,action\n0,"a, dog"\n')
    with pytest.raises(ValueError, match="neither keep, drop nor a class"):
        fl.apply_edits(dataset, file)
    assert fl.apply_edits(dataset, file, NAMES).targets == [2, 1, 2, 0]
    dataset.classes = NAMES
    assert fl.apply_edits(dataset, file).targets == [2, 1, 2, 0]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (fl.IndexedDataset([("a", 0)]), r"IndexedDataset\(apply_edits"),
        ([("a", 0.5)], "float64"),
        ([("a", 0, 1)], "cannot be found"),
        ([{"x": 1}], "cannot be found"),
        (iter([]), "map-style"),
    ],
)
def test_labels_that_cannot_be_edited_are_refused(dataset, message):
    with pytest.raises(TypeError, match=message):
        fl.apply_edits(dataset, write("index,action\n"))


def test_a_sampler_draws_all_but_the_dropped_samples_and_their_positions_stay():
    dataset, file = samples("tensors"), write("index,action\n1,drop\n")
    for inner in (dataset, fl.IndexedDataset(dataset)):
        sampler = fl.KeptSampler(inner, file, generator=torch.Generator().manual_seed(0))
        drawn = [list(sampler) for _ in range(20)]
        assert len(sampler) == 3 and {tuple(sorted(each)) for each in drawn} == {(0, 2, 3)}
        assert len(set(map(tuple, drawn))) > 1
    batches = DataLoader(fl.IndexedDataset(dataset), batch_size=2, sampler=fl.KeptSampler(dataset, file))
    found = {int(i): (float(x), int(y)) for (xs, ys), index in batches for x, y, i in zip(xs, ys, index)}
    assert found == {0: (0.0, 0), 2: (2.0, 2), 3: (3.0, 0)}
    assert sorted(fl.KeptSampler(dataset, write(ISSUES.replace("true,1", "true,keep")), drop_issues=True)) == [1, 3]
    with pytest.raises(ValueError, match=r"gives 1 samples a new label, which a sampler cannot\. Use .*apply_edits"):
        fl.KeptSampler(dataset, write("index,action\n1,2\n"))


class Plain(LightningModule):
    """A module as others write them; it notes which samples it was trained on."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 3), set()

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen |= set(x.tolist())
        return torch.nn.functional.cross_entropy(self.layer(x[:, None]), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("way", ["sampler", "data set"])
def test_a_plain_loader_takes_edits_in_one_line_and_the_results_say_so(way, devices):
    dataset, file = TensorDataset(torch.arange(8.0), torch.arange(8) % 3), write("index,action\n1,drop\n6,drop\n")
    if way == "sampler":
        loader = DataLoader(dataset, batch_size=2, sampler=fl.KeptSampler(dataset, file))
    else:
        loader = DataLoader(fl.apply_edits(dataset, file), batch_size=2, shuffle=True)
    flow, module = fl.FlowWeightingCallback(), Plain()
    strategy = "auto" if devices == 1 else "ddp_fork"
    make_trainer(flow, devices=devices, strategy=strategy).fit(module, loader)
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert (metrics["edits/dropped"], metrics["edits/relabelled"]) == (2, 0)
    if devices == 1:  # forked processes leave the objects of this one alone
        assert len(flow.weights) == (8 if way == "sampler" else 6)
        assert module.seen == {0.0, 2.0, 3.0, 4.0, 5.0, 7.0}


def test_a_loader_without_edits_records_none():
    make_trainer(fl.FlowWeightingCallback()).fit(Plain(), DataLoader(samples("tensors"), batch_size=2))
    assert not [key for key in json.loads(Path("run/metrics.json").read_text()) if key.startswith("edits/")]
