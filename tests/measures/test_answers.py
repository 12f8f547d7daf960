"""Generated answers: what counts as one, and that batches and processes do not change them."""

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from flow_lightning.measures import Answers
from flow_lightning.measures.answers import final_answer
from tests.language import TOKENIZER, instructions, language_module, tiny_model, tiny_tokenizer
from tests.processes import launch
from tests.retention import TEMPLATE, Scripted, language_data, measured


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48 / 2 = 24\n#### 24", "24"),
        ("#### 1\n#### 1,234,567.50 \nand 7", "1234567.5"),
        ("The answer is: 72.0", "72"),
        ("So the answer is $18.", "18"),
        ("#### 5\nThe answer is: 6", "5"),
        ("The answer is: \\frac{1}{2}\n\n### Instruction: 3", "\\frac{1}{2}"),
        ("He runs 3-4 or 60 miles, then 1,080.", "1080"),
        ("It is -3.", "-3"),
        ("100", "100"),
        ("####", None),
        ("", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


def test_exact_match_counts_equal_final_answers():
    records = instructions(9)
    right = [0, 3, 4, 8]
    replies = {
        TEMPLATE.replace("{instruction}", record["query"]): f"Well.\n#### {i + i % 7 + (i not in right)}.0"
        for i, record in enumerate(records)
    }
    module = Scripted("", replies)
    (values,) = measured(Answers(max_new_tokens=8, batch_size=4), module, language_data(records))
    assert values == {"target/samples": 9, "exact_match": len(right) / 9}
    assert [len(ids) for ids in module.asked] == [4, 4, 1]


def test_left_padding_does_not_change_what_is_generated():
    """Each reference is what transformers says to its prompt alone."""
    model, records = tiny_model(len(TOKENIZER)).eval(), []
    for query in ("Anna", "A train goes 60 miles.", "How many?"):
        ids = torch.tensor([TOKENIZER(TEMPLATE.replace("{instruction}", query))["input_ids"]])
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        records.append({"query": query, "response": "#### 1" + TOKENIZER.decode(new, skip_special_tokens=True)})
    module, texts = language_module(), []
    module.tokenizer = tiny_tokenizer()
    batch_decode = module.tokenizer.batch_decode
    module.tokenizer.batch_decode = lambda *args, **kw: texts.extend(batch_decode(*args, **kw)) or texts[-3:]
    measured(Answers(max_new_tokens=6, batch_size=3), module, language_data(records))
    assert len(set(texts)) == 3
    assert {"#### 1" + text for text in texts} == {record["response"] for record in records}


def test_two_processes_answer_as_one():
    measure, data = Answers(max_new_tokens=4, batch_size=2), language_data(instructions(5))
    (one,) = measured(measure, Scripted("the answer is 2"), data)
    two = measured(measure, Scripted("the answer is 2"), data, devices=2, strategy="ddp_fork")
    assert two == [one, one] and one["exact_match"] == 1 / 5  # 1 and 1 more


def in_shards(samples):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    data = language_data(instructions(samples))
    measured(Answers(max_new_tokens=4, batch_size=1), data=data, strategy=strategy, devices=2)


@pytest.mark.parametrize("samples", [5, 1])
def test_a_model_in_shards_answers_on_all_processes_or_on_none(samples):
    """Ranks have 3 and 2 samples, or 1 and none; a rank that generates alone would wait for ever."""
    launch(in_shards, samples)
    one, two = (torch.load(f"answer{rank}.pt") for rank in (0, 1))
    assert one == two and one["target/samples"] == samples


def test_answers_need_a_reference_positions_and_records():
    with pytest.raises(ValueError, match="test sample 0 has no final answer"):
        measured(Answers(), data=language_data([{"query": "Hello?", "response": "Good day."}]))
    with pytest.raises(ValueError, match=r"256 positions\. Set max_new_tokens"):
        measured(Answers(max_new_tokens=250), data=language_data(instructions(2)))
    data = language_data()
    data.test_dataloader = lambda: DataLoader([1, 2])
    with pytest.raises(TypeError, match="a list without records"):
        measured(Answers(), data=data)
