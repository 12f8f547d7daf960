"""The table of suspected label errors against cleanlab on the probabilities of scikit-learn."""

import csv
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.metrics import average_precision_score

import flow_lightning as fl
from flow_lightning.method.label_errors import stratified_parts
from flow_lightning.method.probe import Probe, fit_probe
from flow_lightning.report.label_issues import write_label_issues
from flow_lightning.report.page.evidence import Evidence
from flow_lightning.report.page.files import RunFiles
from tests.examples import make_trainer
from tests.images import PictureData, tiny_module
from tests.method.test_probe import clusters, sklearn_probabilities

HEADER = ["index", "is_label_issue", "label_score", "given_label", "predicted_label", "probability", "fingerprint"]
_SCORES = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


def rows_of(path):
    """Read header and rows."""
    with open(path, newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        return reader.fieldnames, list(reader)


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


@pytest.mark.parametrize("wrong", [0.05, 0.3])
def test_issues_and_probabilities_are_cleanlabs(tmp_path, wrong):
    features, targets = clusters(n=400)
    flipped = torch.rand(400, generator=torch.Generator().manual_seed(1)) < wrong
    targets = torch.where(flipped, (targets + 1) % 3, targets)
    probe = fit_probe(features, targets, 3, folds=4, strengths=[0.03])
    write_label_issues(tmp_path / "issues.csv", probe)
    p, given = np.empty((400, 3)), targets.numpy()
    for fold in range(4):
        unseen = stratified_parts(targets, 4) == fold
        p[unseen] = sklearn_probabilities(features, targets, 0.03, features[unseen], ~unseen)
    header, rows = rows_of(tmp_path / "issues.csv")
    assert header == HEADER and [int(row["index"]) for row in rows] == list(range(400))
    assert [int(row["given_label"]) for row in rows] == targets.tolist()
    scores = get_label_quality_scores(given, p, method="self_confidence")
    np.testing.assert_allclose(torch.exp(-probe.losses), scores, atol=2e-3)
    np.testing.assert_allclose(column(rows, "label_score"), probe.right, rtol=1e-5)
    np.testing.assert_allclose(column(rows, "probability"), p.max(1), atol=2e-3)
    ordered = np.sort(p, axis=1)
    sure = np.array([p[given == c, c].mean() for c in range(3)])
    near = (ordered[:, -1] - ordered[:, -2] < 4e-3) | (np.abs(p - sure) < 2e-3).any(1)  # rounding decides
    assert near.sum() < 20
    assert (column(rows, "predicted_label") == p.argmax(1))[~near].all()
    expected = find_label_issues(given, p, filter_by="confident_learning", n_jobs=1)
    found = np.array([row["is_label_issue"] == "True" for row in rows])
    assert 10 < expected.sum() < 250 and (found == expected)[~near].all()


def test_the_score_finds_more_wrong_labels_than_any_of_cleanlabs_where_two_classes_are_confused(tmp_path):
    features, targets = clusters(n=600)
    flipped = torch.rand(600, generator=torch.Generator().manual_seed(1)) < 0.3
    targets = torch.where(flipped, (targets + 1) % 3, targets)
    probe = fit_probe(features, targets, 3, folds=5)
    p = probe.probabilities.double().numpy()
    others = [get_label_quality_scores(targets.numpy(), p / p.sum(1, keepdims=True), method=name) for name in _SCORES]
    best = max(average_precision_score(flipped, -each) for each in others)
    write_label_issues(tmp_path / "issues.csv", probe)
    score = column(rows_of(tmp_path / "issues.csv")[1], "label_score")
    assert average_precision_score(flipped, -score) > best + 0.02


class NamedPictures(PictureData):
    class_names = ["1", "red, dark", 'a "blue"']


def test_a_fit_with_folds_writes_the_table_with_class_names_and_the_report_shows_them():
    probe = fl.LinearProbeCallback(folds=3)
    make_trainer(probe, max_epochs=0).fit(tiny_module(), datamodule=NamedPictures())
    header, rows = rows_of("run/label_issues.csv")
    assert header == HEADER and len(rows) == 30
    assert [row["given_label"] for row in rows] == NamedPictures.class_names * 10
    found = probe.probe
    assert [row["predicted_label"] for row in rows] == [NamedPictures.class_names[c] for c in found.predicted]
    assert [row["is_label_issue"] == "True" for row in rows] == found.issues.tolist()
    np.testing.assert_allclose(column(rows, "label_score"), found.right, rtol=1e-4)
    run = RunFiles("run", evidence=Evidence(words={"class_names": NamedPictures.class_names}))
    assert run.name("1") == "1" and run.name(1) == "red, dark" and run.name("2") == 'a "blue"'


def test_parquet_is_the_same_table_with_types_and_goes_into_edits():
    probe = fl.LinearProbeCallback(folds=3, parquet=True)
    make_trainer(probe, max_epochs=0).fit(tiny_module(), datamodule=NamedPictures())
    table, (_, rows) = pandas.read_parquet("run/label_issues.parquet"), rows_of("run/label_issues.csv")
    assert list(table.columns) == HEADER and table["is_label_issue"].dtype == bool and table["index"].dtype == "int64"
    for name in ("label_score", "probability"):
        np.testing.assert_allclose(table[name], column(rows, name), rtol=1e-5)
    for name in ("index", "is_label_issue", "given_label", "predicted_label", "fingerprint"):
        assert table[name].astype(str).tolist() == [row[name] for row in rows]
    assert torch.equal(torch.tensor(table["label_score"].to_numpy()).float(), probe.probe.right.float())
    table["action"] = np.where(table["index"] == 4, "drop", "")
    table.to_parquet("mine.parquet")
    dataset = [("picture", label) for label in probe.probe.targets.tolist()]
    assert len(fl.apply_edits(dataset, "mine.parquet", NamedPictures.class_names)) == 29
    Path("mine.parquet").rename("run/label_issues.parquet")
    with pytest.raises(FileExistsError, match=r"label_issues\.parquet has a column 'action'"):
        make_trainer(probe, max_epochs=0).fit(tiny_module(), datamodule=NamedPictures())


def test_parquet_without_pyarrow_or_folds_is_refused_before_anything_is_scored(monkeypatch):
    with pytest.raises(ValueError, match="parquet is about probabilities out of fold"):
        fl.LinearProbeCallback(parquet=True)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"flow-lightning\[language\]"):
        make_trainer(fl.LinearProbeCallback(folds=3, parquet=True)).fit(tiny_module(), datamodule=PictureData())
    assert not Path("run/metrics.json").exists()


def test_a_fit_without_folds_and_a_probe_of_an_earlier_version_write_no_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(fl.LinearProbeCallback(), max_epochs=0).fit(tiny_module(), datamodule=PictureData())
    assert not (tmp_path / "run/label_issues.csv").exists()
    tensors = fit_probe(*clusters(), 3, folds=3).tensors()
    again = Probe.from_tensors(tensors)
    for name in ("targets", "predicted", "confidences", "right"):
        assert torch.equal(getattr(again, name), tensors.pop(name))
    assert len(Probe.from_tensors(tensors).right) == 0
