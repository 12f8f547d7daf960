"""Responses after the prompts of others, against loops over lists; which belong, against probabilities of Bayes."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

import flow_lightning as fl
from flow_lightning.data.label_noise import LabelNoise, with_wrong_responses
from flow_lightning.method.losses import IGNORED
from flow_lightning.method.matching import belongs, swap_prompts
from tests.examples import fit
from tests.language import TOKENIZER, instructions, language_data, language_module, write_jsonl


def rows_of(batch):
    """The prompt and the response of each row, as lists."""
    pairs = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        places = [at for at, label in enumerate(labels) if label != IGNORED]
        if not places:
            pairs.append(([], []))
            continue
        assert [labels[at] for at in places] == [ids[at] for at in places]
        pairs.append((ids[: places[0]], ids[places[0] : places[-1] + 1]))
    return pairs


def test_each_response_follows_the_prompt_of_the_next_row_and_is_read_as_alone(tmp_path):
    data = language_data(tmp_path, 9)
    data.setup("fit")
    batch = next(iter(data.scoring_dataloader()))
    swapped, module = swap_prompts(batch), language_module()
    own, others, width = rows_of(batch), rows_of(swapped), batch["input_ids"].shape[1]
    losses = module.sample_losses(swapped).detach()
    for row, (prompt, response) in enumerate(others):
        wanted = own[(row + 1) % len(own)][0]
        assert response == own[row][1] and prompt == wanted[max(0, len(wanted) - (width - len(response))) :]
        logits = module(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        alone = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(response))
        assert float(losses[row]) == pytest.approx(float(alone.detach()), rel=1e-5)
    assert len({len(prompt) for prompt, _ in others}) > 1


def test_where_there_is_no_other_prompt_nothing_is_supervised():
    ids, labels = torch.tensor([[1, 2, 3]]), torch.tensor([[IGNORED, 2, 3]])
    assert (swap_prompts({"input_ids": ids, "labels": labels})["labels"] == IGNORED).all()
    two = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([[1, 2], [IGNORED, 4]])}
    assert rows_of(swap_prompts(two)) == [([], []), ([], [])]  # no room before the first, no prompt for the second


def test_equal_prompts_are_passed_over_and_padding_on_the_left_is_left_out():
    ids = torch.tensor([[5, 1, 7, 0], [5, 1, 8, 9], [0, 0, 2, 3]])
    labels = torch.tensor([[IGNORED, IGNORED, 7, IGNORED], [IGNORED, IGNORED, 8, 9], [IGNORED, IGNORED, IGNORED, 3]])
    assert rows_of(swap_prompts({"input_ids": ids[:2], "labels": labels[:2]})) == [([], []), ([], [])]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]])
    swapped = swap_prompts({"input_ids": ids, "labels": labels, "attention_mask": mask})
    assert rows_of(swapped) == [([2], [7]), ([2], [8, 9]), ([5, 1], [3])]
    assert swapped["attention_mask"].sum(1).tolist() == [2, 3, 3]
    with pytest.raises(ValueError, match="joined"):
        swap_prompts({"input_ids": ids, "labels": labels, "position_ids": ids})


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_probabilities_are_those_of_bayes_where_gains_are_normal(share):
    draw = np.random.default_rng(0)
    wrong = draw.random(4000) < share
    gains = np.where(wrong, draw.normal(0, 0.1, 4000), draw.normal(0.6, 0.15, 4000))
    bayes = (1 - share) * norm.pdf(gains, 0.6, 0.15)
    bayes /= bayes + share * norm.pdf(gains, 0, 0.1)
    found = belongs(torch.tensor(gains))
    assert found.dtype == torch.float32
    near = (gains > -0.3) & (gains < 1.2)  # further out the wider of two normal distributions wins by its shape alone
    np.testing.assert_allclose(found.numpy()[near], bayes[near], atol=0.12)
    assert abs(float(found.mean()) - (1 - share)) < 0.02
    assert (found[torch.tensor(gains).argsort()].diff() >= 0).all()


def test_of_clean_data_all_belong_and_what_is_not_known_has_the_share_of_the_others():
    gains = torch.randn(500, generator=torch.Generator().manual_seed(0)).mul(0.2).add(1).clamp_min(0.01)
    assert torch.equal(belongs(gains), torch.ones(500))
    assert torch.equal(belongs(torch.full((3,), torch.nan)), torch.ones(3))
    mixed = torch.cat([torch.tensor([-0.1, 0.1, torch.nan]), gains])
    assert belongs(mixed)[2] == pytest.approx(1 - 2 / 502) and belongs(mixed)[0] < 0.01
    assert torch.equal(belongs(-gains), torch.zeros(500))
    assert belongs(torch.tensor([-0.1, 1, 1, 1, 1])).round().tolist() == [0, 1, 1, 1, 1]


class Reader(fl.CausalLanguageModule):
    """A language model that finds a response the likelier, the more of its pairs of tokens are in the prompt."""

    def sample_losses(self, batch):
        losses = []
        for prompt, response in rows_of(batch):
            seen = set(itertools.pairwise(prompt))
            known = np.mean([pair in seen for pair in itertools.pairwise(response)]) if response else 2.0
            losses.append(2.0 - known + 0.01 * (sum(response) % 7))
        return torch.tensor(losses)


def records():
    """Questions that hold their answers."""
    words = [record["query"].split() for record in instructions(100)]
    texts = [" ".join(np.random.default_rng(i).permutation(words[i][:6] + [f"{i}-{i * i}"] * 6)) for i in range(100)]
    return [{"query": text, "response": text} for text in texts]


def fit_with_misplaced_responses(folder, weighting, weights_file=None, **settings):
    """Fit a step of each epoch with 30 % of the responses at other prompts; return the weights and the Trainer."""
    source = write_jsonl(folder / "train.jsonl", records())
    given = {"template": "Q: {instruction} A: ", "tokenizer": TOKENIZER, "validation_fraction": 0}
    flow = fl.FlowWeightingCallback(weighting=weighting, weights_file=weights_file)
    module = Reader(language_module().model, TOKENIZER, learning_rate=1e-3)
    data = fl.InstructionDataModule(source, label_noise=LabelNoise(0.3), **given)
    _, trainer = fit(flow, fl.ReportCallback(), module=module, data=data, limit_train_batches=1, **settings)
    return flow.weights, trainer


@pytest.mark.parametrize("weighting", ["posterior", "drop"])
def test_misplaced_responses_lose_their_weight_are_listed_and_the_file_is_used_again(weighting, tmp_path):
    given, file = records(), tmp_path / "weights.safetensors"
    wrong = [a != b for a, b in zip(given, with_wrong_responses(given, "response", LabelNoise(0.3)))]
    weights, _ = fit_with_misplaced_responses(tmp_path, weighting, file)
    right = weights.weights.numpy()
    assert sum(wrong) == 30 and roc_auc_score(wrong, -right) > 0.95
    assert right[wrong].mean() < 0.3 and right[~np.array(wrong)].mean() > 0.8
    table = [line.split(",") for line in Path("run/text_issues.csv").read_text().splitlines()]
    assert table[0][2] == "label_score"
    scores = np.array([float(row[2]) for row in table[1:]])
    assert ((scores < 0.5) <= np.array([row[1] == "True" for row in table[1:]])).all()
    assert "Answers that look as if they belong to another prompt" in Path("run/report.html").read_text()
    again, _ = fit_with_misplaced_responses(tmp_path, weighting, file)
    torch.testing.assert_close(again.weights, weights.weights)
    assert json.loads(Path("run/metrics.json").read_text())["flow/mean_weight"] < 0.85


def test_a_model_that_does_not_read_prompts_is_not_believed(tmp_path):
    flow = fl.FlowWeightingCallback(weighting="posterior")
    with pytest.warns(UserWarning, match="cannot tell which belong to their prompts"):
        fit(flow, module=language_module(), data=language_data(tmp_path, 30))
    assert (flow.weights.weights == 1).all()


def test_where_no_batch_has_two_prompts_that_is_an_error(tmp_path):
    data = language_data(tmp_path, 5, tokens_per_batch=1)  # one sample in each batch
    with pytest.raises(
        ValueError, match=r"No batch of scoring has two samples with different prompts.*weighting='flow'"
    ):
        fit(fl.FlowWeightingCallback(weighting="posterior"), module=language_module(), data=data)


def test_a_resumed_fit_still_lists_the_misplaced_responses(tmp_path):
    _, trainer = fit_with_misplaced_responses(tmp_path, "posterior")
    trainer.save_checkpoint("x.ckpt", weights_only=False)
    table = Path("run/text_issues.csv").read_text()
    Path("run/text_issues.csv").unlink()
    fit_with_misplaced_responses(tmp_path, "posterior", max_epochs=2, ckpt_path="x.ckpt")
    assert "label_score" in table and Path("run/text_issues.csv").read_text() == table
