"""What is found in instruction data, against the cosines of all pairs, and by hand."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from flow_lightning.report.texts import (
    answer_start,
    has_tokens,
    look_at_texts,
    repeats_prompt,
    twins,
    write_text_issues,
)
from tests.language import tiny_tokenizer

#: Answers, and whether they have several words and end without a mark or a number.
ANSWERS = {
    "It is seven, for three and four make seven in all.": False,
    "It is seven, for three and four make seven in": True,
    "seven": False,
    "First add three and four, and after that, multiply by two,": True,
    "First add three and four, and then we get 7": False,
    "": False,
}


def test_samples_are_found_with_the_beginning_of_their_answer():
    tokenizer = tiny_tokenizer()
    prompt = "What does the whole of this long question about three apples and four pears ask for? "
    answers = ["seven.", prompt + "seven.", *ANSWERS, "seven."]
    samples = []
    for index, answer in enumerate(answers):
        start, end = (tokenizer(text)["input_ids"] for text in (f"{prompt}{index if index < 8 else 0}", answer))
        samples.append({"input_ids": torch.tensor(start + end), "prompt_length": len(start)})
    found, words = look_at_texts(samples, tokenizer)
    texts = words["answers"]
    assert found["text/unended"].tolist() == [False, False, *ANSWERS.values(), False]
    assert found["text/repeats"].tolist() == [False, True] + [False] * 7
    assert found["text/length"].tolist() == [len(s["input_ids"]) - s["prompt_length"] for s in samples]
    assert found["text/twin"][8] == 0 and found["text/likeness"][8] == pytest.approx(1, abs=1e-5)
    assert texts["1"] == answers[1][:160] and {"3", "5", "8"} <= texts.keys() and "0" not in texts


def test_the_table_of_issues_has_a_row_for_each_text():
    found = {
        "text/length": torch.tensor([3, 9, 9]),
        "text/unended": torch.tensor([True, False, False]),
        "text/repeats": torch.tensor([False, False, False]),
        "text/twin": torch.tensor([-1, -1, 1]),
        "text/likeness": torch.tensor([0.0, 0.0, 0.97]),
    }
    words = {"answers": {"0": 'He\r\nsaid "and', "2": "=two\r"}, "fingerprint": "tokens-1"}
    write_text_issues(Path("issues.csv"), found, words, torch.tensor([0.5, 1.0, 2.0]), ["web", "book", "web"])
    with open("issues.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["is_text_issue"] for row in rows] == ["True", "False", "True"]
    assert [row["like_sample"] + row["likeness"] for row in rows] == ["", "", "10.97"]
    assert [(row["loss"], row["source"]) for row in rows] == [("0.5", "web"), ("1", "book"), ("2", "web")]
    assert [row["answer"] for row in rows] == ['He said "and', "", "=two"]
    write_text_issues(Path("issues.csv"), found, words)
    assert "loss" not in Path("issues.csv").read_text()


def test_labels_or_the_length_of_the_prompt_say_where_the_answer_begins():
    ids = torch.arange(5)
    assert answer_start({"input_ids": ids, "prompt_length": 3}) == 3
    assert answer_start({"input_ids": ids, "labels": torch.tensor([-100, -100, 2, 3, 4])}) == 2
    assert has_tokens([{"input_ids": ids}]) and not has_tokens([(ids, 0)]) and not has_tokens([])


def test_twins_are_those_of_all_cosines_of_tf_idf(monkeypatch):
    monkeypatch.setattr("flow_lightning.report.texts._ROWS", 17)
    monkeypatch.setattr("flow_lightning.report.texts._COLUMNS", 13)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(500, (80,), generator=generator) for _ in range(60)]
    for index in range(20, 60, 2):  # copies with some tokens changed
        changed = torch.rand(80, generator=generator) < (index - 20) / 200
        texts[index] = torch.where(changed, texts[index], texts[index - 20])
    twin, likeness = twins(texts, 0.9)
    counts = np.stack([np.bincount(text, minlength=500) for text in texts])
    rare = np.log(60 / np.maximum(1, (counts > 0).sum(0))) + 1e-6
    alike = np.tril(cosine_similarity(counts * rare), -1)
    sure = np.abs(alike.max(1) - 0.9) > 0.04  # the projection errs by 0.02 there
    assert (alike.max(1) > 0.9).sum() >= 5 and sure.sum() > 45
    assert ((twin >= 0).numpy() == (alike.max(1) > 0.9))[sure].all()
    near = (twin >= 0).numpy() & sure
    assert (twin.numpy() == alike.argmax(1))[near].all()
    np.testing.assert_allclose(likeness.numpy()[near], alike.max(1)[near], atol=0.04)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 25), st.integers(1, 25), st.integers(0, 1000))
def test_blocks_of_any_size_find_the_twins_of_one_block(n, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(30, (int(torch.randint(1, 50, (), generator=generator)),), generator=generator)]
    for _ in range(n - 1):  # some are copies with a token changed
        text = texts[int(torch.randint(len(texts), (), generator=generator))].clone()
        text[: int(torch.randint(3, (), generator=generator))] = int(torch.randint(30, (), generator=generator))
        texts.append(text)
    whole = twins(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flow_lightning.report.texts._ROWS", rows)
        patch.setattr("flow_lightning.report.texts._COLUMNS", columns)
        blocks = twins(texts)
    torch.testing.assert_close(blocks[1], whole[1], atol=1e-5, rtol=0)
    assert torch.equal(blocks[0] >= 0, whole[0] >= 0)
    assert all(twin < index for index, twin in enumerate(blocks[0].tolist()))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1), max_size=60), st.lists(st.integers(0, 1), max_size=60), st.integers(0, 40))
def test_an_answer_repeats_its_prompt_if_20_tokens_in_order_are_there(prompt, answer, copied):
    answer = answer[:7] + prompt[3 : 3 + copied] + answer[7:]
    runs = [{tuple(ids[at : at + 20]) for at in range(len(ids) - 19)} for ids in (prompt, answer)]
    tokens = torch.tensor([*prompt, *answer]).int()
    assert repeats_prompt(tokens, len(prompt)) == bool(runs[0] & runs[1])
