"""The page of a run: what is gathered during a fit, and that the fit does not notice."""

import base64
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import flow_lightning as fl
from flow_lightning.callbacks.report import choose, lost_samples
from flow_lightning.measures import PretrainedImages
from flow_lightning.report.page.evidence import Evidence
from flow_lightning.report.page.render import page, write_page
from tests import unchanged
from tests.examples import Kill, chain, fit
from tests.images import PictureData, tiny_module
from tests.language import instructions, language_data, language_module
from tests.retention import unlabelled_images


def fit_pictures(*others, report=True, **settings):
    callbacks = [fl.ReportCallback(samples=3)] * report
    callbacks += [fl.LinearProbeCallback(), fl.FlowWeightingCallback(), fl.RetentionCallback()]
    return fit(*callbacks, *others, module=tiny_module(), data=PictureData(), **settings)


def test_labels_answers_and_pictures_of_the_shown_samples_are_those_of_the_model():
    module, _ = fit_pictures()
    evidence, data = Evidence.load(Path("run")), PictureData()
    assert evidence.tensors["labels"].tolist() == data.train_set.dataset.targets
    module.eval()
    assert len(evidence.shown) >= 6
    for index, seen in evidence.shown.items():
        with torch.no_grad():
            shares = module(data.train_set[int(index)]["image"][None]).softmax(1)[0]
        choice, share = seen["after"]
        assert choice == shares.argmax() and share == pytest.approx(shares.max().item(), abs=1e-4)
        picture = Image.open(io.BytesIO(base64.b64decode(seen["picture"].partition(",")[2])))
        assert picture.size == (96, 96) and picture.format == "JPEG"
        means = np.asarray(picture).reshape(-1, 3).mean(0)
        assert means.argmax() == data.train_set.dataset.targets[int(index)]  # class c has most of colour c
    tested = [module(sample["image"][None]).argmax().item() for sample in data.test_set.dataset]
    assert evidence.tensors["target/after"].tolist() == tested
    assert (Path("run") / "report.html").exists() and [row["step"] for row in evidence.curve] == [1, 2, 3, 4]


def test_answers_before_training_are_those_of_the_pretrained_body_with_the_probe():
    fitted, _ = fit(fl.LinearProbeCallback(refit=False), module=tiny_module(), data=PictureData(), max_epochs=0)
    fit_pictures()
    fitted.eval()
    for index, seen in Evidence.load(Path("run")).shown.items():
        logits = fitted(PictureData().train_set[int(index)]["image"][None])
        assert seen["before"][0] == logits.argmax()


def test_a_fit_with_the_callback_is_the_fit_without_it():
    with_page, _ = fit_pictures(max_epochs=2)
    without, _ = fit_pictures(max_epochs=2, report=False)
    torch.testing.assert_close(with_page.state_dict(), without.state_dict(), rtol=0, atol=0)


def test_two_processes_write_one_whole_page_with_the_answers_of_one_process(monkeypatch):
    def noted(folder):
        with open("writes.txt", "a") as file:
            file.write(f"{os.getpid()}\n")
        return write_page(folder)

    monkeypatch.setattr("flow_lightning.report.page.render.write_page", noted)
    fit_pictures()
    one = Evidence.load(Path("run"))
    Path("run/report.html").unlink()
    Path("writes.txt").unlink()
    fit_pictures(devices=2, strategy="ddp_fork")
    two, html = Evidence.load(Path("run")), Path("run/report.html").read_text()
    assert len(Path("writes.txt").read_text().split()) == 1
    assert html.rstrip().endswith("</html>") and html.count("<!DOCTYPE html>") == 1
    assert html == page(Path("run")) and not list(Path("run").glob(".report*"))
    assert two.shown.keys() == one.shown.keys() and torch.equal(two.tensors["labels"], one.tensors["labels"])
    for index, seen in two.shown.items():
        assert seen["before"] == pytest.approx(one.shown[index]["before"], abs=1e-4) and len(seen["after"]) == 2
        assert f">{index}</dd>" in html and seen["picture"] in html


@pytest.mark.slow
def test_a_resumed_run_gathers_what_an_unbroken_one_does():
    def fit_once(*others, ckpt_path=None):
        checkpoints = fl.ExactResumeCallback(), ModelCheckpoint(dirpath="ckpt", save_last=True, every_n_train_steps=1)
        fit_pictures(*checkpoints, *others, ckpt_path=ckpt_path, max_epochs=2, enable_checkpointing=True)
        return Evidence.load(Path("run"))

    whole, resumed = chain(fit_once), chain(fit_once, 3)
    assert resumed.shown == whole.shown and resumed.curve == whole.curve
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(value, resumed.tensors[name]) for name, value in whole.tensors.items())


def test_a_killed_run_leaves_what_it_has_seen():
    with pytest.raises(SystemExit):
        fit_pictures(Kill(2))
    evidence = Evidence.load(Path("run"))
    assert "labels" in evidence.tensors and "target/after" not in evidence.tensors
    assert all("before" in seen and "after" not in seen for seen in evidence.shown.values())


def test_retention_samples_that_changed_are_kept_with_their_answers():
    measure, report = PretrainedImages(unlabelled_images(Path()), image_size=32), fl.ReportCallback(samples=2)
    module = tiny_module(learning_rate=0.1)
    fit(report, fl.RetentionCallback(measures=[measure]), module=module, data=PictureData(), max_epochs=4)
    answers = measure.answers
    lost = lost_samples(answers).tolist()
    assert answers is not None and lost and [each["index"] for each in report.evidence.lost] == lost[:2]
    assert all(each["before"] == answers["before"][each["index"]] for each in report.evidence.lost)
    assert len(report.evidence.words["pretrained_names"]) == 1000


def test_a_module_without_classes_and_labels_has_a_page_that_says_so():
    fit(fl.ReportCallback(), fl.FlowWeightingCallback())
    evidence = Evidence.load(Path("run"))
    assert "not known" in evidence.words["note"] and "labels" not in evidence.tensors and evidence.shown


def test_the_callback_may_stand_before_or_after_the_weights_of_an_unchanged_module():
    def answers(*callbacks):
        unchanged.fit(unchanged.Classifier(), unchanged.data(), *callbacks, default_root_dir="run")
        return Evidence.load(Path("run")).shown

    first = answers(fl.ReportCallback(samples=3), fl.FlowWeightingCallback())
    assert first and all("before" in seen and "after" in seen for seen in first.values())
    assert answers(fl.FlowWeightingCallback(), fl.ReportCallback(samples=3)) == first


def test_an_unreadable_image_is_named_and_the_fit_goes_on(monkeypatch):
    def unreadable(*_, **__):
        raise OSError("image file is truncated")

    monkeypatch.setattr("flow_lightning.callbacks.report.describe", unreadable)
    fit(fl.ReportCallback(), fl.FlowWeightingCallback())
    notes = {seen["note"] for seen in Evidence.load(Path("run")).shown.values()}
    assert notes == {"cannot be read: image file is truncated"}


def test_without_weights_no_sample_is_shown_and_the_page_is_written():
    fit(fl.ReportCallback())
    assert Evidence.load(Path("run")).shown == {} and (Path("run") / "report.html").exists()


def test_a_fit_that_only_scores_shows_the_pretrained_answers():
    fit_pictures(max_epochs=0)
    evidence = Evidence.load(Path("run"))
    assert evidence.shown and all("before" in seen and "after" not in seen for seen in evidence.shown.values())


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="samples is 0"):
        fl.ReportCallback(samples=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 4)), min_size=1, max_size=40), st.integers(1, 5))
def test_the_hardest_and_easiest_are_shown_overall_and_one_of_each_class(samples, most):
    losses, labels = (torch.tensor(column) for column in zip(*samples))
    chosen = choose(losses, labels, most)
    assert chosen == sorted(set(chosen))
    assert losses[chosen].max() == losses.max() and losses[chosen].min() == losses.min()
    for each in set(labels.tolist()):
        own = losses[labels == each]
        shown = losses[[i for i in chosen if labels[i] == each]]
        assert shown.max() == own.max() and shown.min() == own.min()


def test_lost_answers_are_right_ones_that_became_wrong_and_without_labels_all_changed_ones():
    answers = {"given": [0, 1, 2, 3], "before": [0, 1, 0, 3], "after": [1, 1, 2, 3]}
    tensors = {name: torch.tensor(values) for name, values in answers.items()}
    assert lost_samples(tensors).tolist() == [0]
    del tensors["given"]
    assert lost_samples(tensors).tolist() == [0, 2]


def test_texts_without_an_end_and_duplicates_of_a_language_run_are_on_the_page(tmp_path):
    records = instructions(6)
    records[2]["response"] = "Step one is to add the numbers and then we"
    records.append(records[4])
    data = language_data(tmp_path, records=records)
    fit(fl.ReportCallback(samples=2), fl.FlowWeightingCallback(), module=language_module(), data=data)
    evidence = Evidence.load(Path("run"))
    assert evidence.tensors["text/unended"].nonzero().flatten().tolist() == [2]
    assert evidence.tensors["text/twin"].tolist()[6] == 4
    assert "numbers and then we" in Path("run/report.html").read_text()
    table = Path("run/text_issues.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in table[1:]] == [[str(i), str(i in (2, 6))] for i in range(7)]
    rows = f"{table[0]},action", f"{table[1]},drop", f"{table[3]},keep", f"{table[7]},"
    Path("mine.csv").write_text("\n".join(rows))
    for options, kept in (({"edits": "mine.csv"}, [1, 2, 3, 4, 5, 6]), ({"drop_issues": "mine.csv"}, [1, 2, 3, 4, 5])):
        again = language_data(tmp_path, records=records, **options)
        again.setup("fit")
        rows = [again.train_set[i]["input_ids"].tolist() for i in range(len(again.train_set))]
        assert rows == [data.train_set[i]["input_ids"].tolist() for i in kept]
        assert again.train_set.dataset.lengths.tolist() == [len(row) for row in rows]
    fit(fl.FlowWeightingCallback(), module=language_module(), data=again)
    assert json.loads(Path("run/metrics.json").read_text())["edits/dropped"] == 2
    Path("mine.csv").rename("run/text_issues.csv")
    with pytest.raises(FileExistsError, match="your edits"):
        fit(fl.ReportCallback(), module=language_module(), data=data)


def test_losses_of_a_language_run_are_shown_by_source_of_the_samples(tmp_path):
    records = [record | {"origin": f"book {index % 3}"} for index, record in enumerate(instructions(12))]
    del records[4]["origin"]
    data = language_data(tmp_path, records=records, source_field="origin")
    flow = fl.FlowWeightingCallback()
    fit(fl.ReportCallback(samples=2), flow, module=language_module(), data=data)
    evidence, losses = Evidence.load(Path("run")), flow.weights.losses.numpy()
    places = [evidence.words["sources"][rank] for rank in evidence.tensors["text/source"].tolist()]
    assert places == [record.get("origin", "none") for record in records]
    html = Path("run/report.html").read_text()
    assert re.search(rf"book 2</bdi></td><td><bdi>4</bdi></td><td><bdi>{losses[2::3].mean():.3f}</bdi>", html)
    assert re.search(rf"none</bdi></td><td><bdi>1</bdi></td><td><bdi>{losses[4]:.3f}</bdi>", html)


def test_sources_of_another_number_than_the_samples_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(fl.InstructionDataModule, "sample_sources", ["web"])
    with pytest.raises(ValueError, match="sample_sources of the data module has 1 values, but there are 13 training"):
        fit(fl.ReportCallback(), fl.FlowWeightingCallback(), module=language_module(), data=language_data(tmp_path))


def test_the_last_line_names_all_files_of_the_run(caplog):
    with caplog.at_level("INFO"):
        fit_pictures()
    names = ("metrics.json", "flow_weights.safetensors", "flow_weights.png", "retention.png", "report.html")
    assert f"Files in run: {', '.join(names)}\n" in caplog.text
    assert all((Path("run") / name).exists() for name in names)
