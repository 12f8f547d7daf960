"""What a page says of answers before and after training."""

from pathlib import Path

from flow_lightning.report.page.answer_section import answer_section
from flow_lightning.report.page.files import RunFiles, read_run
from tests.report.page.example import EVIL, write_run


def test_lost_and_mended_answers_are_counted_and_listed_by_pair_and_class():
    section = answer_section(read_run(write_run(Path("run"))))
    what = "3 of 6 answers changed; 2 right ones were lost, 1 wrong ones were mended."
    assert section.text == [f"Pre-trained task: {what}", f"Target: {what}"]
    pairs, classes = section.tables[:2]
    assert sorted(pairs.rows) == sorted([["cat", "dog", "1"], [EVIL, "dog", "1"], [EVIL, "cat", "1"]])
    assert [row for row in classes.rows if row[0] == "dog"] == [["dog", "2", "50.0", "100.0", "+50.0"]]
    assert classes.rows[-1][0] == "dog"  # those that lost most come first
    (card,) = section.cards
    assert card["facts"] == {"given": "cat", "before": "cat", "after": "dog"} and card["picture"].startswith(
        "data:image"
    )


def test_unknown_answers_are_said_to_be_unknown():
    assert all("not both known" in sentence for sentence in answer_section(RunFiles(Path())).text)
