"""What a page says of instruction data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flow_lightning.method.weights import SampleWeights
from flow_lightning.report.page.evidence import Evidence
from flow_lightning.report.page.files import RunFiles, read_run
from flow_lightning.report.page.render import page
from flow_lightning.report.page.text_section import text_section
from flow_lightning.report.texts import source_ranks
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
    text = "Of 3 texts like an earlier one: 1; whose answer ends in the middle of a sentence: 2; whose answer repeats a"
    assert section.text[0] == f"{text} part of the prompt: 0." and "--drop-issues text_issues.csv" in section.text[1]
    lengths, unended, twins = section.tables
    assert lengths.rows == [["1 to 1", "1", "4.000"], ["2 to 2", "1", "0.200"], ["3 to 3", "1", "1.767"]]
    assert unended.rows == [["2", "4", "1", "0 (0.97)", "end"], ["0", "1.77", "3", "–", f"and {EVIL} then"]]
    assert twins.rows == unended.rows[:1]


def test_words_are_escaped_on_the_page_and_a_run_without_texts_has_no_such_section():
    html = page(write_findings(Path("run")))
    assert EVIL not in html and f"and {EVIL} then" in Parsed(html).text
    assert text_section(RunFiles(Path(), evidence=Evidence())) is None


def write_sources(folder, counts):
    """Write a run of texts from `counts` sources, the most frequent first, as the callback leaves it."""
    sources = [f"{EVIL} {rank}" for rank, count in enumerate(counts) for _ in range(count)]
    order = np.random.default_rng(0).permutation(len(sources))
    sources = [sources[at] for at in order]
    losses = torch.rand(len(sources), generator=torch.Generator().manual_seed(0)) + 0.1
    evidence = Evidence()
    evidence.tensors["text/source"], evidence.words["sources"] = source_ranks(sources)
    evidence.tensors |= {f"text/{name}": torch.zeros(len(sources), dtype=torch.bool) for name in ("unended", "repeats")}
    evidence.tensors |= {"text/length": torch.arange(len(sources)), "text/twin": torch.full((len(sources),), -1)}
    weights = SampleWeights.from_losses(losses)
    weights.save(folder / "flow_weights.safetensors")
    evidence.save(folder)
    return np.array(sources), weights


def test_losses_and_weights_of_each_source_are_those_of_numpy():
    sources, scored = write_sources(Path(), [30, 20, 9, 1])
    section = text_section(read_run(Path()))
    assert section.tables[1].caption == "Loss by source" and section.charts[0].caption == "Losses by source"
    losses, weights = scored.losses.double().numpy(), scored.weights.double().numpy()
    for rank, row in enumerate(section.tables[1].rows):
        own = sources == f"{EVIL} {rank}"
        numbers = (losses[own].mean(), np.median(losses[own]), weights[own].mean())
        assert row[:2] == [f"{EVIL} {rank}", str(own.sum())]
        assert [float(cell) for cell in row[2:]] == pytest.approx(numbers, abs=6e-4)
    assert len(section.tables[1].rows) == 4 and EVIL not in page(Path())
    hovers = [text.removeprefix(f"{EVIL} 0: ") for text in section.charts[0].hovers.values() if f"{EVIL} 0: " in text]
    assert sum(float(text.partition("%")[0]) for text in hovers) == pytest.approx(100, abs=1)


def test_of_many_sources_the_most_frequent_are_rows_and_the_others_are_one():
    sources, scored = write_sources(Path(), [3] * 20 + [2] * 45)
    section = text_section(read_run(Path()))
    rows, names = section.tables[1].rows, [f"{EVIL} {rank}" for rank in range(50)]
    kept = {row[0] for row in rows[:-1]}
    assert len(rows) == 51 and rows[-1][:2] == ["15 other sources", "30"] and {*names[:20]} <= kept
    own = ~np.isin(sources, list(kept))
    assert float(rows[-1][2]) == pytest.approx(scored.losses.numpy()[own].mean(), abs=6e-4)
    assert sum(int(row[1]) for row in rows) == len(sources) == 150
    assert section.charts[0].caption == "Losses by source (the 16 most frequent)"


def test_without_losses_samples_come_in_their_order():
    run = read_run(write_findings(Path("run")))
    run.weights = None
    unended, _ = text_section(run).tables
    assert [row[:2] for row in unended.rows] == [["0", "–"], ["2", "–"]]
