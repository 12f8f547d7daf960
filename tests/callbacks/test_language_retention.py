"""The language report: measured before and after, from the model as it is then, resumed without measuring anew."""

import json
import math
from copy import deepcopy

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib import image

import flow_lightning as fl
from flow_lightning.callbacks.language_retention import LanguageRetentionCallback
from flow_lightning.report.metrics import METRICS, plot_comparison, plot_retention, read_metrics
from tests.examples import LinearRegression, RegressionData, fit
from tests.language import instructions, tiny_model
from tests.measures.test_text import TEXT, TOKENIZER, Answers
from tests.measures.test_text import tasks as tasks  # a fixture

TEMPLATE = "Q: {instruction} A: "


class StateAtTrainEnd(Callback):
    def on_train_end(self, trainer, pl_module):
        self.state = deepcopy(pl_module.state_dict())
        self.modes = [module.training for module in pl_module.modules()]
        self.rng = torch.get_rng_state()


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def language_data(test=True):
    for name, records in (("train", instructions(9)), ("test", instructions(12)[9:])):
        with open(f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    held_out = "test.jsonl" if test else None
    return fl.InstructionDataModule("train.jsonl", held_out, template=TEMPLATE, tokenizer=TOKENIZER)


def language_fit(callbacks, module=None, data=None, **settings):
    if module is None:
        module = fl.CausalLanguageModule(tiny_model(len(TOKENIZER)), TOKENIZER, learning_rate=1e-2)
    data = language_data() if data is None else data
    return fit(*callbacks, module=module, data=data, **({"max_epochs": 2, "limit_val_batches": 0} | settings))[0]


@torch.no_grad()
def own_loss(model, rows):
    """Mean token loss over rows of (ids, tokens of the prompt)."""
    total, count = 0.0, 0
    for ids, prompt in rows:
        labels = torch.tensor([ids])
        labels[:, :prompt] = -100
        total += model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * (len(ids) - prompt)
        count += len(ids) - prompt
    return total / count


def held_out_rows():
    rows = []
    for record in instructions(12)[9:]:
        prompt = TOKENIZER(TEMPLATE.replace("{instruction}", record["query"]))["input_ids"]
        rows.append(([*prompt, *TOKENIZER(record["response"])["input_ids"], TOKENIZER.eos_token_id], len(prompt)))
    return rows


def text_rows(window):
    ids = TOKENIZER(TEXT)["input_ids"]
    parts = [ids[start : start + window] for start in range(0, len(ids), window)]
    return [(part, 1) for part in parts if len(part) > 1]


def test_loss_and_perplexity_before_and_after_are_those_of_transformers(text):
    module = language_fit([LanguageRetentionCallback([text], window=20, batch_size=2)])
    metrics = read_metrics("run/metrics.json")
    before, after = tiny_model(len(TOKENIZER)).eval(), module.causal_lm.eval()
    for target, kept, model in (("target/before/", "before", before), ("target/", "after", after)):
        assert metrics[f"{target}loss"] == pytest.approx(own_loss(model, held_out_rows()), rel=1e-5)
        expected = math.exp(own_loss(model, text_rows(20)))
        assert metrics[f"retention/{kept}/perplexity"] == pytest.approx(expected, rel=1e-4)
    assert metrics["target/loss"] < metrics["target/before/loss"]
    assert metrics["target/samples"] == 3
    assert metrics["retention/tokens"] == sum(len(ids) - 1 for ids, _ in text_rows(20))
    assert set(metrics) <= {metric.key for metric in METRICS}
    with open("run/retention.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_before_is_the_base_model_without_adapters(text):
    torch.manual_seed(0)
    module = fl.CausalLanguageModule(
        tiny_model(len(TOKENIZER)), TOKENIZER, tune="lora", learning_rate=1e-2, lora_r=4, lora_alpha=8
    )
    for name, parameter in module.named_parameters():
        if "lora_B" in name:  # which adapters start with is 0: they would say the same
            torch.nn.init.normal_(parameter)
    language_fit([LanguageRetentionCallback([text])], module)
    metrics = read_metrics("run/metrics.json")
    model = tiny_model(len(TOKENIZER)).eval()
    expected = math.exp(own_loss(model, text_rows(256)))  # as many positions as the model has, not 1024
    assert metrics["retention/before/perplexity"] == pytest.approx(expected, rel=1e-4)
    after = math.exp(own_loss(module.causal_lm.eval(), text_rows(256)))
    assert metrics["retention/after/perplexity"] == pytest.approx(after, rel=1e-4)
    assert metrics["retention/after/perplexity"] != pytest.approx(expected, rel=1e-2)


def test_answers_and_tasks(tasks, capsys):
    records = instructions(12)[9:]
    queries = [TEMPLATE.replace("{instruction}", record["query"]) for record in records]
    module = Answers("I do not know", {queries[0]: f"The answer is: {9 + 2}"})
    callback = LanguageRetentionCallback(tasks=["tiny:0", "tiny_too"], tasks_path=tasks, limit_tasks=4, answer_tokens=8)
    language_fit([callback], module)
    metrics = read_metrics("run/metrics.json")
    assert metrics["target/before/exact_match"] == metrics["target/exact_match"] == pytest.approx(1 / 3)
    for when in ("before", "after"):
        scores = [metrics[f"retention/{when}/task/{name}"] for name in ("tiny", "tiny_too")]
        assert metrics[f"retention/{when}/accuracy"] == pytest.approx(sum(scores) / 2)
        assert all(4 * score == round(4 * score) for score in scores)
    assert metrics["average"] == pytest.approx((1 / 3 + metrics["retention/after/accuracy"]) / 2)
    assert "task tiny_too" in capsys.readouterr().out


def test_measuring_leaves_no_trace(text, tasks):
    plain, probe = StateAtTrainEnd(), StateAtTrainEnd()
    language_fit([plain])
    callback = LanguageRetentionCallback([text], tasks=["tiny"], tasks_path=tasks, answer_tokens=3)
    module = language_fit([probe, callback])
    assert torch.equal(torch.get_rng_state(), probe.rng) and torch.equal(plain.rng, probe.rng)
    assert [submodule.training for submodule in module.modules()] == probe.modes == plain.modes
    for name, value in module.state_dict().items():
        assert torch.equal(value, probe.state[name]) and torch.equal(value, plain.state[name]), name


def test_a_resumed_fit_keeps_what_was_measured_before(text, tmp_path):
    whole, resumed = (LanguageRetentionCallback([text], window=20) for _ in range(2))
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    language_fit([whole, checkpoint], enable_checkpointing=True)
    path = str(tmp_path / "epoch=0.ckpt")
    torch.load(path, weights_only=True)
    first = read_metrics("run/metrics.json")
    language_fit([resumed], ckpt_path=path)
    assert resumed.state.before == whole.state.before  # the seconds it took included: not measured again
    second = read_metrics("run/metrics.json")
    assert second["retention/before/perplexity"] == first["retention/before/perplexity"]
    assert second["retention/after/perplexity"] == pytest.approx(first["retention/after/perplexity"], rel=1e-4)


def test_a_resumed_fit_with_other_data_is_refused(text, tasks, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    language_fit([LanguageRetentionCallback([text], window=20), checkpoint], enable_checkpointing=True)
    path = str(tmp_path / "epoch=0.ckpt")
    with pytest.raises(ValueError, match=r"retention/tokens is \d+ .* but \d+ now"):
        language_fit([LanguageRetentionCallback([text], window=10)], ckpt_path=path)
    with pytest.raises(ValueError, match=r"the tasks \[\] were measured, but now they are \['tiny'\]"):
        language_fit([LanguageRetentionCallback([text], window=20, tasks=["tiny"], tasks_path=tasks)], ckpt_path=path)


def test_a_checkpoint_without_measurement_is_named(text, tmp_path):
    language_fit([ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)], enable_checkpointing=True)
    with pytest.warns(UserWarning, match="written without LanguageRetentionCallback"):
        language_fit([LanguageRetentionCallback([text])], ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    metrics = read_metrics("run/metrics.json")
    assert "retention/after/perplexity" in metrics and "retention/before/perplexity" not in metrics
    assert metrics["target/samples"] == 3


def test_without_test_set_only_the_text_is_measured(text):
    with pytest.warns(UserWarning, match="no test set"):
        language_fit([LanguageRetentionCallback([text])], data=language_data(test=False))
    metrics = read_metrics("run/metrics.json")
    assert "retention/after/perplexity" in metrics and "target/loss" not in metrics


def test_numbers_go_to_the_loggers(text, tmp_path):
    language_fit([LanguageRetentionCallback([text])], logger=CSVLogger(tmp_path, name="", version="run"))
    assert "retention/after/perplexity" in (tmp_path / "run" / "metrics.csv").read_text()


def test_two_processes_measure_what_one_does(text):
    found = []
    for settings in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        module = fl.CausalLanguageModule(tiny_model(len(TOKENIZER)), TOKENIZER, learning_rate=0.0)
        language_fit([LanguageRetentionCallback([text], 20, answer_tokens=3)], module, max_epochs=1, **settings)
        found.append(read_metrics("run/metrics.json"))
    one, two = ({key: value for key, value in run.items() if "time/" not in key} for run in found)
    assert two == pytest.approx(one, rel=1e-6)


def test_the_callback_for_images_stands_aside(text, tmp_path, capsys):
    callback = fl.RetentionCallback("absent", every_n_epochs=1)
    language_fit([callback])
    assert not list(tmp_path.glob("run/[!.]*"))  # but for the lock
    assert not callback.state.before and not callback.state.epochs
    assert "What was learned" not in capsys.readouterr().out
    language_fit([LanguageRetentionCallback([text]), fl.RetentionCallback("absent")])
    assert "retention/after/perplexity" in read_metrics("run/metrics.json")


def test_another_module_is_refused():
    with pytest.raises(TypeError, match="LinearRegression has no token_losses"):
        fit(LanguageRetentionCallback(), module=LinearRegression(), data=RegressionData())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window is 1"),
        ({"limit_tokens": 1}, "limit_tokens is 1"),
        ({"limit_tasks": 0}, "limit_tasks is 0"),
        ({"answer_tokens": 0}, "answer_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"tasks": ["mmlu", "mmlu:5"]}, "more than once"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LanguageRetentionCallback(**arguments)


LOSS_ONLY = {"target/before/loss": 1.2, "target/loss": 0.3, "retention/after/perplexity": 21.0}
WHOLE = LOSS_ONLY | {
    "target/exact_match": 0.4,
    "retention/before/perplexity": 17.0,
    "retention/before/accuracy": 0.5,
    "retention/after/accuracy": 0.45,
    "average": 0.425,
}


@pytest.mark.parametrize(
    "runs",
    [
        {"plain": [WHOLE], "flow": [WHOLE, WHOLE | {"target/exact_match": 0.5}]},
        {"plain": [LOSS_ONLY], "flow": [LOSS_ONLY, LOSS_ONLY | {"target/loss": 0.2}]},
        {"plain": [WHOLE], "diverged": [LOSS_ONLY | {"target/loss": None, "retention/after/perplexity": None}]},
        {"plain": [{"target/loss": 0.3}]},
    ],
)
def test_pictures(runs):
    plot_comparison(runs, "comparison.png")
    plot_retention(next(iter(runs.values()))[0], "retention.png")
    for name in ("comparison.png", "retention.png"):
        pixels = image.imread(name)
        assert min(pixels.shape[:2]) > 200 and pixels.max() - pixels.min() > 0.5
