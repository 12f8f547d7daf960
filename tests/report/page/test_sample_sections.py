"""What a page says of samples and classes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flow_lightning.method.weights import SampleWeights
from flow_lightning.report.page.evidence import Evidence
from flow_lightning.report.page.files import RunFiles, read_run
from flow_lightning.report.page.sample_sections import sample_section, weight_section
from tests.report.page.example import write_run, write_text_run


def test_a_starved_class_is_named_with_its_share():
    run = read_run(write_run(Path("run")))
    section, weights, labels = weight_section(run), run.weights.weights.numpy(), np.arange(30) % 3
    ratio = weights[labels == 2].sum() / weights.sum() * 3
    assert (
        f'starves classes: 1 of 3 get less than half of their share of the weight. Lowest: c" onload="x ({ratio:.2f}).'
        in section.text[1]
    )
    assert [row[1:3] for row in section.tables[0].rows] == [["10", "33.33%"]] * 3
    shares = [float(row[3].rstrip("%")) for row in section.tables[0].rows]
    assert sum(shares) == pytest.approx(100, abs=0.02) and shares == sorted(shares)


def test_equal_classes_are_not_starved():
    run = RunFiles(Path(), weights=SampleWeights.from_losses(torch.arange(8.0) // 2))
    run.evidence = Evidence({"labels": torch.arange(8) % 2})
    assert weight_section(run).text[1] == "FLOW starves no class: 0 gets least, 1.00 of its share of the weight."


def test_suspected_label_errors_come_first_with_both_labels_and_the_probability():
    section = sample_section(read_run(write_run(Path("run"))))
    rows = section.tables[0].rows
    assert [row[0] for row in rows[:2]] == ["4", "5"] and rows[0][3:5] == ["0.75", "0.133"]
    suspected = {card["index"]: card for card in section.cards if "suspected" in card["lists"]}
    assert set(suspected) == {4, 5} and suspected[4]["facts"]["suggested"].endswith("(0.75)")
    hardest = [float(row[5]) for row in rows[2:]]
    assert hardest == sorted(hardest, reverse=True) and section.text[0] == "2 label errors are suspected."
    assert "--relabel takes that file" in section.text[2]


def test_cards_are_sorted_from_hard_to_easy():
    section = sample_section(read_run(write_run(Path("run"))))
    losses = [float(card["facts"]["loss"]) for card in section.cards]
    assert losses == sorted(losses, reverse=True)
    assert {name for card in section.cards for name in card["lists"]} == {"suspected", "hardest", "easiest"}


def test_the_loss_of_a_text_is_the_mean_of_its_tokens_and_nothing_is_said_of_labels():
    run = read_run(write_text_run(Path("run")))
    section, words = sample_section(run), "Each card has the end of the prompt, in grey, and the answer. "
    assert section.tables[0].header == ["index", "loss", "weight"]
    losses = {row[0]: float(row[1]) for row in section.tables[0].rows}
    assert losses == pytest.approx({"0": 5.3 / 3, "1": 0.2, "2": 4.0}, rel=1e-2)
    assert section.text == [words + "The darker a token of it, the more weight it has."]
    assert section.tables[0].caption == "3 of 3 samples: by loss" and len(weight_section(run).text) == 1
    assert all(card["facts"].keys() == {"loss", "weight"} for card in section.cards)
    run.weights = None
    assert sample_section(run).text == ["There are no losses to sort by."]


def test_texts_can_be_filtered_by_where_they_come_from():
    run = read_run(write_text_run(Path("run")))
    run.evidence.tensors |= {"text/source": torch.tensor([1, 0, 2]), "text/length": torch.tensor([3, 2, 1])}
    run.evidence.words["sources"] = ["book", "web"]  # of a third one only the number of samples is kept
    section = sample_section(run)
    assert section.group == "source" and section.tables[0].header == ["index", "source", "tokens", "loss", "weight"]
    assert [row[:3] for row in section.tables[0].rows] == [
        ["2", "other sources", "1"], ["0", "web", "3"], ["1", "book", "2"],
    ]  # fmt: skip
    assert {card["index"]: card["class"] for card in section.cards} == {0: "web", 1: "book", 2: "other sources"}
    assert section.tables[0].classes == ["other sources", "web", "book"]


def test_without_losses_and_labels_that_is_said_of_images():
    run = RunFiles(Path(), evidence=Evidence({"labels": torch.arange(3)}))
    assert sample_section(run).text == ["There are no losses and no suspected label errors to sort by."]


def test_labels_of_another_data_set_are_not_used():
    run = read_run(write_run(Path("run")))
    run.evidence.tensors["labels"] = torch.zeros(5)
    assert run.labels is None and "Without labels" in weight_section(run).text[1]
