"""What a page says of instruction data."""

from pathlib import Path

import torch

from flow_lightning.report.page.evidence import Evidence
from flow_lightning.report.page.files import RunFiles, read_run
from flow_lightning.report.page.render import page
from flow_lightning.report.page.text_section import text_section
from tests.report.page.example import EVIL, Parsed, write_text_run


def write_findings(folder):
    """Write a run of three texts: the first has no end, the last is like it."""
    run = read_run(write_text_run(folder))
    run.evidence.tensors |= {
        "text/length": torch.tensor([3, 2, 1]),
        "text/unended": torch.tensor([True, False, True]),
        "text/repeats": torch.tensor([False, False, False]),
        "text/twin": torch.tensor([-1, -1, 0]),
        "text/likeness": torch.tensor([0.0, 0.0, 0.97]),
    }
    run.evidence.words["answers"] = {"0": f"and {EVIL} then", "2": "end"}
    run.evidence.save(folder)
    return folder


def test_findings_are_tables_from_high_to_low_loss_with_their_words():
    section = text_section(read_run(write_findings(Path("run"))))
    text = "Of 3 texts, 1 are like an earlier one. 2 answers end in the middle of a sentence, and 0 repeat a part of"
    assert section.text == [f"{text} their prompt."]
    lengths, unended, twins = section.tables
    assert lengths.rows == [["1 to 1", "1", "4.000"], ["2 to 2", "1", "0.200"], ["3 to 3", "1", "1.767"]]
    assert unended.rows == [["2", "4", "1", "0 (0.97)", "end"], ["0", "1.77", "3", "–", f"and {EVIL} then"]]
    assert twins.rows == unended.rows[:1]


def test_words_are_escaped_on_the_page_and_a_run_without_texts_has_no_such_section():
    html = page(write_findings(Path("run")))
    assert EVIL not in html and f"and {EVIL} then" in Parsed(html).text
    assert text_section(RunFiles(Path(), evidence=Evidence())) is None


def test_without_losses_samples_come_in_their_order():
    run = read_run(write_findings(Path("run")))
    run.weights = None
    unended, _ = text_section(run).tables
    assert [row[:2] for row in unended.rows] == [["0", "–"], ["2", "–"]]
