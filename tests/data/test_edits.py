"""Samples that a person dropped or relabelled, against the same done by hand."""

import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from lightning import LightningModule
from torch.utils.data import DataLoader, Subset, TensorDataset

import flow_lightning as fl
from flow_lightning.data.edits import labels_fingerprint, read_edits
from tests.data.fake_datasets import CLASSES
from tests.data.test_images import folder_module, gather
from tests.examples import make_trainer
from tests.images import PictureData, tiny_module

NAMES = ["cat", "1", "a, dog"]
TARGETS = [0, 1, 2, 0]


def write(text, name="edits.csv"):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


@pytest.mark.parametrize(
    ("rows", "kept", "labels"),
    [
        ("", [0, 1, 2, 3], {}),
        ("3,drop\n0,\n1,keep\n", [0, 1, 2], {}),
        ('0,"a, dog"\n2, cat \n3,drop\n', [0, 1, 2], {0: 2, 2: 0}),
        ("0,1\n1,0\n2,2\n", [0, 1, 2, 3], {0: 1, 1: 0}),  # a name goes before an index; 2 is what it was
    ],
)
def test_rows_keep_drop_and_relabel_samples(rows, kept, labels):
    edits = read_edits(write("\ufeffindex,action\n" + rows), TARGETS, NAMES)
    assert (edits.kept, edits.labels) == (kept, labels)
    assert edits.numbers == {"edits/dropped": 4 - len(kept), "edits/relabelled": len(labels)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,acton\n", "no column action; its columns are 'index,acton'"),
        ("index;action\n0;drop\n", "no column index and no column action"),
        ("", "no column index"),
        ("index,action\n0,keep\n4,drop\n", r"line 3: there is no sample '4'.*0 to 3"),
        ("index,action\n-1,drop\n", "no sample '-1'"),
        ("index,action\n1.0,drop\n", "no sample '1.0'"),
        ("index,action\n,drop\n", "no sample ''"),
        ("index,action\n1,drop\n2,\n1,keep\n", "line 4: sample 1 has two rows"),
        ("index,action\n2,3\n", "action '3' of sample 2 is neither keep, drop nor a class. Classes are cat, 1, a, dog"),
        ("index,action\n2,remove\n", "'remove'"),
        ("index,given_label,action\n0,cat,\n1,cat,drop\n", "line 3: given_label of sample 1 is 'cat'.*is '1'"),
        ("index,action,given_label\n0,drop\n", "given_label of sample 0 is None"),
        ("index,action\n0,drop\n1,drop\n2,drop\n3,drop\n", "drops all 4 samples"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_line(text, message):
    with pytest.raises(ValueError, match=message):
        read_edits(write(text), TARGETS, NAMES)


def test_a_few_rows_that_happen_to_fit_other_data_are_refused_by_the_fingerprint():
    file = write(f"index,given_label,fingerprint,action\n0,cat,{labels_fingerprint(TARGETS)},drop\n")
    assert read_edits(file, TARGETS, NAMES).kept == [1, 2, 3]
    for other in ([0, 1, 2], [0, 2, 1, 0], [*TARGETS, 0]):
        with pytest.raises(ValueError, match=r"line 2: the fingerprint is 'labels-\w{16}', that of the labels here"):
            read_edits(file, other, NAMES)


def test_parquet_is_read_as_csv_is_and_errors_name_its_row():
    table = pandas.DataFrame({"index": [3, 0, 2], "given_label": ["cat", "cat", None], "action": ["drop", None, "1"]})
    table[:2].to_parquet("edits.parquet")
    edits = read_edits("edits.parquet", TARGETS, NAMES)
    assert (edits.kept, edits.labels) == ([0, 1, 2], {})
    table.assign(given_label=["cat", "cat", "a, dog"]).to_parquet("edits.parquet")
    assert read_edits("edits.parquet", TARGETS, NAMES).labels == {2: 1}
    table.to_parquet("edits.parquet")
    with pytest.raises(ValueError, match=r"edits.parquet, row 3: given_label of sample 2 is None"):
        read_edits("edits.parquet", TARGETS, NAMES)
    table[["index"]].to_parquet("edits.parquet")
    with pytest.raises(ValueError, match="no column action; its columns are 'index'"):
        read_edits("edits.parquet", TARGETS, NAMES)


def test_images_are_dropped_and_relabelled_among_those_that_are_trained_on(tmp_path):
    settings = {"validation_fraction": 0.25, "transforms": "none"}
    before = folder_module(tmp_path, **settings)
    given, validated = gather(before.scoring_dataloader()), gather(before.val_dataloader())
    names = [CLASSES[c] for c in given["target"]]
    other = (int(given["target"][5]) + 1) % 3
    actions = {2: "drop", 5: CLASSES[other], 17: "drop"}
    rows = [f"{i},{name},{actions.get(i, '')}\n" for i, name in enumerate(names)]
    after = folder_module(tmp_path, **settings, edits=write("index,given_label,action\n" + "".join(rows)))
    found, kept = gather(after.scoring_dataloader()), [i for i in range(18) if i not in (2, 17)]
    assert torch.equal(found["image"], given["image"][kept]) and found["index"].tolist() == list(range(16))
    expected = given["target"][kept]
    expected[kept.index(5)] = other
    assert torch.equal(found["target"], expected)
    trained = gather(after.train_dataloader())
    assert torch.equal(trained["target"][trained["index"].argsort()], expected)
    assert torch.equal(gather(after.val_dataloader())["image"], validated["image"])
    with pytest.raises(ValueError, match="another split"):
        folder_module(tmp_path, **settings, split_seed=1, edits="edits.csv")


def test_the_edited_table_of_a_run_goes_into_the_next_one_and_is_recorded(tmp_path):
    (tmp_path / "images").mkdir()
    first = folder_module(tmp_path / "images")
    make_trainer(fl.LinearProbeCallback(folds=3), max_epochs=0).fit(tiny_module(), datamodule=first)
    header, *rows = Path("run/label_issues.csv").read_text().splitlines()
    assert len(rows) == 24
    edited = [f"{header},action", f"{rows[0]},drop", f"{rows[1]},cat", *(f"{row}," for row in rows[2:])]
    write("\n".join(edited), tmp_path / "mine.csv")
    second = folder_module(tmp_path / "images", edits=tmp_path / "mine.csv")
    probe = fl.LinearProbeCallback(folds=3)
    trainer = make_trainer(probe, max_epochs=0, default_root_dir="next")
    trainer.fit(tiny_module(), datamodule=second)
    assert probe.probe.targets.tolist() == [2, *first.scoring_set.dataset.targets[2:]]
    metrics = json.loads(Path("next/metrics.json").read_text())
    assert (metrics["edits/dropped"], metrics["edits/relabelled"]) == (1, 1)
    assert second.hparams["edits"] == str(tmp_path / "mine.csv")


def test_a_new_fit_does_not_overwrite_a_table_that_was_edited():
    Path("run").mkdir()
    write("index,is_label_issue,action\n0,True,drop\n", "run/label_issues.csv")
    trainer = make_trainer(fl.LinearProbeCallback(folds=3), max_epochs=0)
    with pytest.raises(FileExistsError, match="your edits"):
        trainer.fit(tiny_module(), datamodule=PictureData())
    assert Path("run/label_issues.csv").read_text().endswith("drop\n")


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
        assert (
            len(sampler) == 3
            and {tuple(sorted(each)) for each in drawn} == {(0, 2, 3)}
            and len(set(map(tuple, drawn))) > 1
        )
    batches = DataLoader(fl.IndexedDataset(dataset), batch_size=2, sampler=fl.KeptSampler(dataset, file))
    found = {int(i): (float(x), int(y)) for (xs, ys), index in batches for x, y, i in zip(xs, ys, index)}
    assert found == {0: (0.0, 0), 2: (2.0, 2), 3: (3.0, 0)}
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
