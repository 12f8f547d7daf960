"""Tasks of the evaluation harness on the live model, against likelihoods computed here."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

import flow_lightning as fl
from flow_lightning.measures import Answers, HarnessTasks, TargetTasks
from flow_lightning.report.metrics import read_metrics
from tests.language import TOKENIZER, instructions, language_module, tiny_model
from tests.retention import TEMPLATE, OnFitStart, Scripted, language_fit, measured

QUESTIONS = [
    {"question": "Anna has three apples and buys", "choices": ["four more", "miles"], "label": 0},
    {"question": "A train goes 60", "choices": ["apples", "miles in one hour", "request"], "label": 1},
    {"question": "How many", "choices": ["apples does she have", "train"], "label": 0},
    {"question": "She has", "choices": ["completes", "hour", "seven"], "label": 2},
    {"question": "Below is an instruction", "choices": ["that describes", "apples apples"], "label": 1},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two local multiple-choice tasks, which differ in their name only."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # lists all packages by pip
    data, task = tmp_path / "tasks" / "questions.jsonl", {"test_split": "test", "dataset_path": "json"}
    data.parent.mkdir()
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task |= {
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    task |= {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
    }
    for name in ("tiny", "tiny_too"):
        (data.parent / f"{name}.yaml").write_text(json.dumps(task | {"task": name}))  # JSON is YAML, too
    return str(data.parent)


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


def test_the_harness_measures_the_live_model_and_leaves_no_trace(folder):
    right = own_accuracy()
    assert 0 < sum(right) < len(right)
    measure = HarnessTasks(["tiny_too:0", "tiny"], tasks_path=folder, batch_size=2)

    def traces(module):
        modes = [submodule.training for submodule in module.modules()]
        return modes, torch.get_rng_state().tolist(), module.tokenizer.pad_token, logging.getLogger("lm_eval").level

    def function(trainer, module):
        module.causal_lm.model.layers[0].eval()
        measure.prepare(trainer, module)
        before = traces(module)
        values = measure.measure(trainer, module, "before")
        assert traces(module) == before
        return values

    language_fit(OnFitStart(function), max_epochs=0)
    values = torch.load("answer0.pt")
    assert list(values) == ["accuracy", "task/tiny_too", "task/tiny"]
    assert values == {name: pytest.approx(sum(right) / len(right)) for name in values}


def test_the_harness_runs_on_one_process_and_tells_the_others(folder):
    ranks = measured(HarnessTasks(["tiny"], tasks_path=folder, limit=2), devices=2, strategy="ddp_fork")
    score = sum(own_accuracy()[:2]) / 2
    assert ranks == [{"retention/tasks": ["tiny"], "accuracy": score, "task/tiny": score}] * 2


def test_answers_and_tasks_before_and_after(folder, capsys, monkeypatch):
    scores, asked = {"tiny": 0.25, "tiny_too": 0.75}, []

    def evaluate(model, tasks, num_fewshot, limit, **settings):
        asked.append((tasks, num_fewshot, limit))
        return {"results": {name: {"acc,none": scores[name]} for name in tasks}}

    monkeypatch.setattr("lm_eval.simple_evaluate", evaluate)
    query = TEMPLATE.replace("{instruction}", instructions(12)[9]["query"])
    module = Scripted("I do not know", {query: f"The answer is: {9 + 2}"})
    tasks = HarnessTasks(["tiny:0", "tiny_too"], tasks_path=folder, limit=4)
    language_fit(fl.RetentionCallback(measures=[tasks, Answers(max_new_tokens=8)]), module=module)
    metrics = read_metrics("run/metrics.json")
    assert metrics["target/before/exact_match"] == metrics["target/exact_match"] == pytest.approx(1 / 3)
    for when in ("before", "after"):
        assert {name: metrics[f"retention/{when}/task/{name}"] for name in scores} == scores
        assert metrics[f"retention/{when}/accuracy"] == 0.5
    assert asked == [(["tiny"], 0, 4), (["tiny_too"], None, 4)] * 2
    assert metrics["average"] == pytest.approx((1 / 3 + 0.5) / 2)
    assert "task tiny_too" in capsys.readouterr().out


def test_groups_have_the_mean_of_their_tasks_and_equal_shares_in_the_accuracy(folder, monkeypatch):
    scores = {"a": 0.25, "b": 0.75, "tiny": 0.0}
    monkeypatch.setattr(HarnessTasks, "_scores", lambda *_: scores)
    monkeypatch.setattr("flow_lightning.measures.harness._find_tasks", lambda *_: None)
    tasks = {"both": ["a", "b:2"], "tiny": ["tiny:0"]}
    expected = {"accuracy": 0.25, "group/both": 0.5, "group/tiny": 0.0, **{f"task/{k}": v for k, v in scores.items()}}
    for kind, part in ((HarnessTasks, "retention"), (TargetTasks, "target")):
        assert measured(kind(tasks)) == [{f"{part}/tasks": ["a", "b", "tiny"], **expected}]


def test_an_unknown_task_is_named_with_similar_ones(monkeypatch):
    """The harness's own tasks are many files: a stand-in for its index."""
    index = SimpleNamespace(all_tasks=("hellaswag", "piqa"))
    monkeypatch.setattr("flow_lightning.measures.harness._own_index", lambda: index)
    with pytest.raises(ValueError, match=r"no task 'helaswag'; similar ones are \['hellaswag'\]"):
        measured(HarnessTasks(["helaswag"]))


def test_a_task_without_a_score_is_named(folder, monkeypatch):
    results = {"tiny": {"alias": "tiny", "perplexity,none": 3.0, "perplexity_stderr,none": "N/A"}}
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *args, **settings: {"results": results})
    with pytest.raises(ValueError, match=r"'tiny' has no metric .* but \['perplexity,none'\]"):
        measured(HarnessTasks(["tiny"], tasks_path=folder))


def test_a_model_in_shards_is_refused():
    trainer = SimpleNamespace(strategy=SimpleNamespace(restore_checkpoint_after_setup=True), world_size=2)
    with pytest.raises(TypeError, match="the model is in shards, so rank 0 cannot evaluate it alone"):
        HarnessTasks(["piqa"]).prepare(trainer, language_module())
