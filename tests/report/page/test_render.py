"""The page as one file: nothing from elsewhere, nothing that a name could break, and what is missing."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from flow_lightning.__main__ import main
from flow_lightning.configurations import OptionError
from flow_lightning.report.page.evidence import Evidence
from flow_lightning.report.page.render import page, write_page
from tests.report.page.example import EVIL, METRICS, Parsed, write_run, write_text_run
from tests.test_cli import error_of

pytestmark = pytest.mark.usefixtures("rendered")


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    """The page of a whole run."""
    return page(write_run(tmp_path_factory.mktemp("page") / "run"))


def test_a_page_is_one_file_that_loads_nothing(html):
    found, sources = Parsed(html), ("src", "href", "data", "action")
    links = [value for _, tags in found.tags for name, value in tags.items() if name in sources]
    assert all(re.match(r"#|data:", link) for link in links) and len(links) > 5
    assert not re.search(r"@import|url\((?!#)", html) and not found.all("iframe")
    (policy,) = (meta["content"] for meta in found.all("meta") if meta.get("http-equiv"))
    assert "default-src 'none'" in policy
    digest = base64.b64encode(hashlib.sha256(found.scripts[0].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy  # no other script runs


def test_names_with_markup_stay_text_wherever_they_stand(html):
    found = Parsed(html)
    assert len(found.scripts) == 1 and "broken" not in found.scripts[0]
    assert found.text.count(EVIL) > 5 and not any("onload" in tags for _, tags in found.tags)
    assert "b␀␛�$x_1$" in found.text and "␇ a text�" in found.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", html)


def test_every_picture_and_chart_has_words_for_those_who_do_not_see_it(html):
    found = Parsed(html)
    assert all(image["alt"] for image in found.all("img")) and len(found.all("img")) > 10
    assert all(chart["aria-label"] for chart in found.all("svg")) and len(found.all("svg")) >= 7
    marks = [tags for _, tags in found.tags if tags.get("class") == "mark"]
    assert all(mark["aria-label"] for mark in marks) and len(marks) > 60
    assert found.all("html")[0]["lang"] == "en" and len(found.all("h1")) == 1


def test_no_text_is_smaller_than_12_pixels(html):
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ?(?:[^;\"]*? )?([\d.]+)px", html)]
    assert sizes and min(sizes) >= 12


def test_ids_are_used_once(html):
    ids = [tags["id"] for _, tags in Parsed(html).tags if "id" in tags]
    assert len(ids) == len(set(ids))
    used = {each for pair in re.findall(r"url\(#([^)]*)\)|xlink:href=\"#([^\"]*)\"", html) for each in pair if each}
    assert used and used <= set(ids)


def test_tokens_are_shaded_by_their_weight():
    found = Parsed(page(write_text_run(Path("run"))))
    tokens = [tags for tag, tags in found.tags if tags.get("class") == "token"]
    losses = torch.tensor([0.1, 0.2, 5.0, 0.3, 0.1, 4.0])
    expected = sorted(torch.exp(-losses / losses.quantile(0.5)).tolist())
    assert sorted(float(tags["title"].removeprefix("weight ")) for tags in tokens) == pytest.approx(expected, abs=1e-3)
    assert "two and <script>" in found.text


def test_the_page_of_texts_asks_for_no_labels_and_of_few_classes_there_is_nothing_to_choose():
    found = Parsed(page(write_text_run(Path("run"))))
    assert not re.search("label|class", found.text) and "What changed" not in found.text
    names = [tags.get("name") for tags in found.all("select")]
    assert names == ["list"] and [tags for tags in found.all("input") if tags["name"] == "class"]
    evidence = Evidence.load(Path("run"))
    evidence.tensors |= {f"text/{name}": torch.zeros(3) for name in ("unended", "repeats")}
    evidence.tensors |= {"text/length": torch.tensor([3, 2, 1]), "text/twin": torch.full((3,), -1)}
    evidence.tensors |= {"text/source": torch.tensor([1, 0, 0]), "text/likeness": torch.ones(3)}
    evidence.words["sources"] = ["book", EVIL]
    evidence.save(Path("run"))
    found = Parsed(page(Path("run")))
    assert [tags.get("name") for tags in found.all("select")] == [
        "list",
        "class",
    ] and f"all sources{EVIL}book" in found.text


def test_a_killed_run_shows_what_is_there_and_names_what_is_missing():
    folder = write_run(Path("run"))
    (folder / "metrics.json").write_text(json.dumps({"target/before/top1": 0.5, "target/samples": 40}))
    (folder / "label_issues.csv").unlink()
    found = Parsed(page(folder))
    assert "was 50.0\u00a0% before training, and is not measured after it" in found.text
    assert "Results after training" in found.text and "label_issues.csv: no suspected" in found.text
    names = ("metrics.json", "report.safetensors", "config.yaml")
    for name in names:
        (folder / name).unlink()
    text = Parsed(page(folder)).text
    assert all(f"{name}: " in text for name in names)
    (folder / "flow_weights.safetensors").write_bytes(b"half a file")
    with pytest.raises(OptionError, match="neither a run nor a board"):
        page(folder)


def test_the_command_writes_the_page_and_says_where(capsys):
    write_run(Path("run"))
    main(["report", "run"])
    assert capsys.readouterr().out == f"Report: {Path('run/report.html').absolute()}\n"
    main(["report", "run", "--output", "other.html"])
    assert Path("other.html").read_bytes() == Path("run/report.html").read_bytes() == page(Path("run")).encode()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("report nowhere", "nowhere is no folder"),
        ("report .", "Did you mean run/version_0?"),
        ("report", "the following arguments are required: directory"),
        ("report run/version_0 --colour red", "does not know --colour"),
    ],
)
def test_a_wrong_folder_or_option_is_named(words, message, capsys):
    write_run(Path("run/version_0"))
    assert message in error_of(capsys, *words.split())


def test_a_page_of_twenty_thousand_samples_shows_two_thousand_rows():
    folder = write_run(Path("run"), 20_000)
    path = write_page(folder)
    rows = [tags for tags in Parsed(path.read_text(encoding="utf-8")).all("tr") if "data-class" in tags]
    assert len(rows) == 2000 and path.stat().st_size < 2 * 2**20 and METRICS
