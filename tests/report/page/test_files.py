"""What a run has left."""

from pathlib import Path

import torch

from flow_lightning.data.edits import is_issue
from flow_lightning.method.weights import TokenWeights
from flow_lightning.report.page.files import read_run
from tests.report.page.example import EVIL, write_run, write_text_run


def test_a_whole_run_misses_nothing():
    run = read_run(write_run(Path("run")))
    assert run.missing == [] and len(run.issues) == 30 and EVIL in run.configuration
    assert [index for index, row in run.issues.items() if is_issue(row)] == [4, 5]
    assert run.name(0) == run.name("0") == EVIL and run.name("cat") == "cat" and run.name(17) == "17"


def test_damaged_files_are_named_and_the_others_are_read():
    folder = write_run(Path("run"))
    for name in ("metrics.json", "report.safetensors", "flow_weights.safetensors"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-7])
    (folder / "label_issues.csv").write_text("no,columns\n1,2\n")
    run = read_run(folder)
    assert [word.split()[0] for word in run.missing] == [
        "metrics.json", "flow_weights.safetensors", "report.safetensors", "label_issues.csv",
    ]  # fmt: skip
    assert run.metrics == {} and run.weights is None and run.issues == {}


def test_texts_are_known_by_their_tokens_and_miss_no_label_issues():
    run = read_run(write_text_run(Path("run")))
    assert run.holds_texts and run.source(0) is None and isinstance(run.weights, TokenWeights)
    assert [word.split()[0] for word in run.missing] == ["metrics.json:", "config.yaml:"]
    Path("run/flow_weights.safetensors").unlink()
    assert read_run(Path("run")).holds_texts
    assert not read_run(write_run(Path("pictures"))).holds_texts


def test_where_a_text_comes_from_has_a_name_or_is_one_of_the_others():
    run = read_run(write_text_run(Path("run")))
    run.evidence.tensors["text/source"], run.evidence.words["sources"] = torch.tensor([1, 0]), ["book"]
    assert [run.source(index) for index in range(3)] == ["other sources", "book", None]
