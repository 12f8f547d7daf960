"""Target loss and perplexity, each against the losses that transformers computes."""

import math

import pytest
import torch

import flow_lightning as fl
from flow_lightning.measures import GeneralText, TargetLoss
from flow_lightning.report.metrics import METRICS, read_metrics
from tests.examples import LinearRegression, RegressionData, fit
from tests.language import TOKENIZER, instructions, language_module, tiny_model
from tests.retention import TEMPLATE, TEXT, language_data, language_fit, measured, text_file


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
    parts = torch.tensor(TOKENIZER(TEXT)["input_ids"]).split(window)
    return [(part.tolist(), 1) for part in parts if len(part) > 1]


def test_loss_and_perplexity_before_and_after_are_those_of_transformers():
    text = GeneralText([text_file()], window=20, batch_size=2)
    module, _ = language_fit(fl.RetentionCallback(measures=[TargetLoss(), text]))
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


def test_before_is_the_base_model_without_adapters():
    torch.manual_seed(0)
    module = language_module(tune="lora", lora_r=4, lora_alpha=8)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:  # which adapters start with is 0: they would say the same
            torch.nn.init.normal_(parameter)
    language_fit(fl.RetentionCallback(measures=[GeneralText([text_file()])]), module=module)
    metrics = read_metrics("run/metrics.json")
    expected = math.exp(own_loss(tiny_model(len(TOKENIZER)).eval(), text_rows(256)))  # the model's positions, not 1024
    assert metrics["retention/before/perplexity"] == pytest.approx(expected, rel=1e-4)
    after = math.exp(own_loss(module.causal_lm.eval(), text_rows(256)))
    assert metrics["retention/after/perplexity"] == pytest.approx(after, rel=1e-4)
    assert metrics["retention/after/perplexity"] != pytest.approx(expected, rel=1e-2)


def test_two_processes_measure_what_one_does():
    for measure in (TargetLoss(), GeneralText([text_file()], window=10, limit_tokens=130, batch_size=3)):
        (one,) = measured(measure)
        two = measured(measure, devices=2, strategy="ddp_fork")
        assert two[0] == two[1]
        assert two[0] == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize(("loss", "expected"), [(800.0, math.inf), (math.nan, math.nan)])
def test_a_model_that_diverged_has_no_perplexity(loss, expected):
    class Diverged(fl.CausalLanguageModule):
        def token_losses(self, batch):
            return torch.full(((batch["labels"][:, 1:] != -100).sum(),), loss)

    module = Diverged(tiny_model(len(TOKENIZER)), TOKENIZER)
    (values,) = measured(GeneralText([text_file()]), module)
    assert values["perplexity"] == pytest.approx(expected, nan_ok=True)


def test_without_test_set_there_is_no_loss_and_another_module_is_refused():
    with pytest.warns(UserWarning, match=r"no test_dataloader\(\)"):
        assert measured(TargetLoss(), data=language_data(test=False)) == [{}]
    with pytest.raises(TypeError, match="LinearRegression has no token_losses"):
        fit(fl.RetentionCallback(measures=[TargetLoss()]), module=LinearRegression(), data=RegressionData())
