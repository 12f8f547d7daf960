"""Perplexity, target loss, generated answers and the evaluation harness, each against another way to get there."""

import json
import logging
import math
from functools import partial

import pytest
import torch
from lightning import Callback
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.data.instructions import InstructionDataset, collate
from flow_lightning.data.texts import TextWindows
from flow_lightning.measures.text import (
    exact_match,
    final_answer,
    harness_scores,
    perplexity,
    split_task,
    target_loss,
)
from tests.examples import make_trainer
from tests.language import SENTENCES, instructions, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = " ".join(SENTENCES)
TEMPLATE = "Q: {instruction} A: "
QUESTIONS = [
    {"question": "Anna has three apples and buys", "choices": ["four more", "miles"], "label": 0},
    {"question": "A train goes 60", "choices": ["apples", "miles in one hour", "request"], "label": 1},
    {"question": "How many", "choices": ["apples does she have", "train"], "label": 0},
    {"question": "She has", "choices": ["completes", "hour", "seven"], "label": 2},
    {"question": "Below is an instruction", "choices": ["that describes", "apples apples"], "label": 1},
]


class Ask(Callback):
    """Calls a function where measurements are made; processes do not share memory, so the answer is a file."""

    def __init__(self, function):
        self.function = function

    def on_fit_start(self, trainer, pl_module):
        torch.save(self.function(trainer, pl_module), f"answer{trainer.global_rank}.pt")


class Data(fl.InstructionDataModule):
    def __init__(self):
        with open("train.jsonl", "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in instructions(4))
        super().__init__("train.jsonl", template=TEMPLATE, tokenizer=TOKENIZER)


def language_module(model=None, **settings):
    torch.manual_seed(0)
    return fl.CausalLanguageModule(tiny_model(len(TOKENIZER)) if model is None else model, TOKENIZER, **settings)


def ask(function, module=None, **settings):
    trainer = make_trainer(Ask(function), max_epochs=0, **settings)
    trainer.fit(language_module() if module is None else module, datamodule=Data())
    return [torch.load(f"answer{rank}.pt") for rank in range(trainer.world_size)]


def windows_loader(window=10, batch_size=3, texts=(TEXT,)):
    windows = TextWindows(texts, TOKENIZER, window, limit_tokens=130)
    return DataLoader(windows, batch_size=batch_size, collate_fn=partial(collate, pad_id=TOKENIZER.pad_token_id))


def held_out(records):
    return fl.IndexedDataset(InstructionDataset(records, TOKENIZER, template=TEMPLATE, keep_records=True))


@torch.no_grad()
def own_loss(samples):
    """Sum and number of the token losses that transformers computes, sample by sample."""
    model, total, count = tiny_model(len(TOKENIZER)).eval(), 0.0, 0
    for sample in samples:
        ids = sample["input_ids"][None]
        labels = ids.clone()
        labels[:, : sample["prompt_length"]] = -100
        tokens = ids.shape[1] - sample["prompt_length"]
        total += model(input_ids=ids, labels=labels).loss.item() * tokens
        count += tokens
    return total, count


def test_perplexity_is_that_of_transformers():
    loader = windows_loader(texts=(TEXT, "Anna has a train."))  # windows of several lengths
    (found,) = ask(lambda trainer, module: perplexity(trainer, module, loader))
    total, count = own_loss([loader.dataset[i] for i in range(len(loader.dataset))])
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)


def test_target_loss_is_that_of_transformers():
    dataset = held_out(instructions(7))
    loader = DataLoader(dataset, batch_size=3, collate_fn=partial(collate, pad_id=0))
    (found,) = ask(lambda trainer, module: target_loss(trainer, module, loader))
    total, count = own_loss([dataset[i] for i in range(len(dataset))])
    assert count == int(dataset.dataset.supervised.sum())
    assert found == pytest.approx(total / count, rel=1e-5)


def test_two_processes_measure_what_one_does():
    loader, dataset = windows_loader(), held_out(instructions(5))
    assert len(loader.dataset) % 2 == 1

    def measure(trainer, module):
        return perplexity(trainer, module, loader), exact_match(trainer, module, dataset, 4, 2)

    one = ask(measure, Answers("the answer is 2"))
    two = ask(measure, Answers("the answer is 2"), devices=2, strategy="ddp_fork")
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one[0], rel=1e-9)
    assert two[0][1] == 1 / 5  # 1 and 1 more


@pytest.mark.parametrize(("loss", "expected"), [(800.0, math.inf), (math.nan, math.nan)])
def test_a_model_that_diverged_has_no_perplexity(loss, expected):
    class Diverged(fl.CausalLanguageModule):
        def token_losses(self, batch):
            return torch.full(((batch["labels"][:, 1:] != -100).sum(),), loss)

    module = Diverged(tiny_model(len(TOKENIZER)), TOKENIZER)
    (found,) = ask(lambda trainer, module: perplexity(trainer, module, windows_loader()), module)
    assert found == pytest.approx(expected, nan_ok=True)


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


class Answers(fl.CausalLanguageModule):
    """Says what `replies` has for a prompt, else always the same, and writes down what it is asked."""

    def __init__(self, default, replies=None):
        super().__init__(tiny_model(len(TOKENIZER)), TOKENIZER)
        self.default, self.replies, self.asked = default, replies or {}, []
        self.causal_lm.generate = self.generate

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, **settings):
        assert not do_sample and not self.causal_lm.training
        self.asked.append(input_ids)
        prompts = [TOKENIZER.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask)]
        answers = [TOKENIZER(self.replies.get(prompt, self.default))["input_ids"] for prompt in prompts]
        width = max(map(len, answers))
        padded = [answer + [settings["pad_token_id"]] * (width - len(answer)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def test_exact_match_counts_equal_final_answers():
    records = instructions(9)
    right = [0, 3, 4, 8]
    replies = {
        TEMPLATE.replace("{instruction}", record["query"]): f"Well.\n#### {i + i % 7 + (i not in right)}.0"
        for i, record in enumerate(records)
    }
    module = Answers("", replies)
    (found,) = ask(lambda trainer, module: exact_match(trainer, module, held_out(records), 8, 4), module)
    assert found == len(right) / 9
    assert [len(ids) for ids in module.asked] == [4, 4, 1]


def test_left_padding_does_not_change_what_is_generated():
    """Each reference is what transformers says to its prompt alone."""
    prompts = [TEMPLATE.replace("{instruction}", text) for text in ("Anna", "A train goes 60 miles.", "How many?")]
    model, records = tiny_model(len(TOKENIZER)).eval(), []
    for instruction, prompt in zip(("Anna", "A train goes 60 miles.", "How many?"), prompts):
        ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        records.append({"query": instruction, "response": "#### 1" + TOKENIZER.decode(new, skip_special_tokens=True)})
    texts = []

    def measure(trainer, module):
        batch_decode = TOKENIZER.batch_decode
        module.tokenizer = tiny_tokenizer()
        module.tokenizer.batch_decode = lambda *args, **kw: texts.extend(batch_decode(*args, **kw)) or texts[-3:]
        return exact_match(trainer, module, held_out(records), 6, 3)

    ask(measure)
    assert len(set(texts)) == 3
    assert {"#### 1" + text for text in texts} == {record["response"] for record in records}


def test_answers_need_a_reference_room_and_records():
    without = [{"query": "Hello?", "response": "Good day."}]
    with pytest.raises(ValueError, match="test sample 0 has no final answer"):
        ask(lambda trainer, module: exact_match(trainer, module, held_out(without), 4, 2))
    with pytest.raises(ValueError, match=r"256 positions\. Set answer_tokens"):
        ask(lambda trainer, module: exact_match(trainer, module, held_out(instructions(2)), 250, 2))
    with pytest.raises(TypeError, match="without records"):
        ask(lambda trainer, module: exact_match(trainer, module, [1, 2], 4, 2))


@pytest.fixture
def tasks(tmp_path):
    """Two local multiple-choice tasks, which differ in their name only, and one that generates."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    choice = (
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_target: label\ndoc_to_choice: choices\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    for name in ("tiny", "tiny_too"):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{choice}")
    (folder / "words.yaml").write_text(
        f"task: words\n{common}output_type: loglikelihood\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[label]}}"\nmetric_list: [{metric: perplexity}]\n'
    )
    return str(folder)


@torch.no_grad()
def own_accuracy():
    """Take the choice with the highest log-likelihood after the question and a space."""
    model, right = tiny_model(len(TOKENIZER)).eval(), []
    for question in QUESTIONS:
        start = len(TOKENIZER(question["question"])["input_ids"])
        scores = []
        for choice in question["choices"]:
            ids = torch.tensor(TOKENIZER(f"{question['question']} {choice}")["input_ids"])
            log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
            scores.append(log_p[start - 1 :].sum().item())
        right.append(max(range(len(scores)), key=scores.__getitem__) == question["label"])
    return right


def test_the_harness_measures_the_live_model(tasks):
    right = own_accuracy()
    assert 0 < sum(right) < len(right)

    def measure(trainer, module):
        module.causal_lm.model.layers[0].eval()
        before = [submodule.training for submodule in module.modules()], torch.get_rng_state()
        pad, level = module.tokenizer.pad_token, logging.getLogger("lm_eval").level
        scores = harness_scores(trainer, module, ["tiny_too:0", "tiny"], tasks, batch_size=2)
        assert [submodule.training for submodule in module.modules()] == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        assert (module.tokenizer.pad_token, logging.getLogger("lm_eval").level) == (pad, level)
        return scores

    (scores,) = ask(measure)
    assert list(scores) == ["tiny_too", "tiny"]
    assert scores == {name: pytest.approx(sum(right) / len(right)) for name in scores}


def test_the_harness_runs_on_one_process_and_tells_the_others(tasks):
    ranks = ask(
        lambda trainer, module: harness_scores(trainer, module, ["tiny"], tasks, limit=2),
        devices=2,
        strategy="ddp_fork",
    )
    assert ranks[0] == ranks[1] == {"tiny": sum(own_accuracy()[:2]) / 2}


def test_a_task_without_a_score_is_named(tasks):
    with pytest.raises(ValueError, match=r"'words' has no metric .* but \['perplexity,none'\]"):
        ask(lambda trainer, module: harness_scores(trainer, module, ["words"], tasks))


def test_an_unknown_task_is_named_with_similar_ones(monkeypatch):
    """The harness's own tasks are many files: a stand-in for its index."""

    class Manager:
        all_tasks = ("hellaswag", "piqa")

        def __init__(self, **settings):
            pass

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    with pytest.raises(ValueError, match=r"no task 'helaswag'; similar ones are \['hellaswag'\]"):
        ask(lambda trainer, module: harness_scores(trainer, module, ["helaswag"]))


@pytest.mark.parametrize("entry", ["", ":5"])
def test_a_task_needs_a_name(entry):
    with pytest.raises(ValueError, match="expected the name of a task"):
        split_task(entry)
