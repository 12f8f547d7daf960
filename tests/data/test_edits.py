"""What a person decided about samples, read from a table, against the same done by hand."""

import json
from pathlib import Path

import pandas
import pytest
import torch

import flow_lightning as fl
from flow_lightning.data.edits import data_fingerprint, read_dropped, read_edits
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
    file = write(f"index,given_label,fingerprint,action\n0,cat,{data_fingerprint('labels', TARGETS)},drop\n")
    assert read_edits(file, TARGETS, NAMES).kept == [1, 2, 3]
    for other in ([0, 1, 2], [0, 2, 1, 0], [*TARGETS, 0]):
        with pytest.raises(ValueError, match=r"line 2: the fingerprint is 'labels-\w{16}', that of the samples here"):
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


def test_the_table_of_a_run_goes_into_the_next_one_edited_or_as_it_is_and_is_recorded(tmp_path):
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
    table = pandas.read_csv("run/label_issues.csv")
    table["is_label_issue"] = table["index"] % 4 == 1
    table.to_csv(tmp_path / "mine.csv", index=False)
    third = folder_module(tmp_path / "images", drop_issues=tmp_path / "mine.csv")
    assert third.train_set.dataset.targets == [t for i, t in enumerate(first.train_set.dataset.targets) if i % 4 != 1]
    assert third.edit_numbers == {"edits/dropped": 6, "edits/relabelled": 0}
    with pytest.raises(ValueError, match="Give one file as drop_issues"):
        folder_module(tmp_path / "images", drop_issues="a.csv", edits="b.csv")


def test_a_new_fit_does_not_overwrite_a_table_that_was_edited():
    Path("run").mkdir()
    write("index,is_label_issue,action\n0,True,drop\n", "run/label_issues.csv")
    trainer = make_trainer(fl.LinearProbeCallback(folds=3), max_epochs=0)
    with pytest.raises(FileExistsError, match="your edits"):
        trainer.fit(tiny_module(), datamodule=PictureData())
    assert Path("run/label_issues.csv").read_text().endswith("drop\n")


ISSUES = "index,is_label_issue,action\n0,True,\n1,True,keep\n2,False,drop\n3,true,1\n"


def test_issues_are_dropped_without_an_action_and_actions_go_before():
    edits = read_edits(write(ISSUES), TARGETS, NAMES, drop_issues=True)
    assert (edits.kept, edits.labels) == ([1, 3], {3: 1})
    assert read_edits("edits.csv", TARGETS, NAMES).kept == [0, 1, 3]
    file = write("index,is_label_issue\n1,False\n2,True\n")
    assert read_edits(file, TARGETS, NAMES, drop_issues=True).kept == [0, 1, 3]
    with pytest.raises(ValueError, match="no column action"):
        read_edits(file, TARGETS, NAMES)
    with pytest.raises(ValueError, match="no column is_label_issue"):
        read_edits(write("index,action\n1,drop\n"), TARGETS, NAMES, drop_issues=True)


def test_texts_are_kept_or_dropped_and_have_no_labels():
    tokens = torch.tensor([5, 6, 7, 8]).int()
    fingerprint = data_fingerprint("tokens", tokens)
    file = write(f"index,is_text_issue,fingerprint,action\n0,True,{fingerprint},\n2,False,{fingerprint},drop\n")
    assert read_dropped(file, tokens, 3).kept == [0, 1]
    assert read_dropped(file, tokens, 3, drop_issues=True).kept == [1]
    with pytest.raises(ValueError, match=r"line 2: the fingerprint is 'tokens-\w{16}', that of the samples here"):
        read_dropped(file, tokens.flip(0), 3)
    with pytest.raises(ValueError, match="action '1' of sample 0 is neither keep nor drop"):
        read_dropped(write("index,action\n0,1\n"), tokens, 3)
