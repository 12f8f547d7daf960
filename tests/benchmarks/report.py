"""Size, time and memory of the page of 50,000 samples, and of the look at as many texts.

python -m tests.benchmarks.report page [--samples 50000 --classes 10]
python -m tests.benchmarks.report texts [--samples 50000]
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from flow_lightning.callbacks.report import choose
from flow_lightning.method.weights import SampleWeights
from flow_lightning.report.metrics import write_metrics
from flow_lightning.report.page.evidence import Evidence, describe
from flow_lightning.report.page.render import write_page
from flow_lightning.report.texts import look_at_texts
from tests.benchmarks.measure import measured, memory

_MIB = 2**20 / 1e6  #: in MB


def make(folder: Path, n: int, classes: int) -> None:
    """Write the files of a run of `n` samples with random pictures, half of the thumbnails' cost in the worst case."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=generator)
    losses = -torch.rand(n, generator=generator).log() * (1 + labels / classes)
    SampleWeights.from_losses(losses).save(folder / "flow_weights.safetensors")
    answers = {
        f"{part}/{when}": labels.int() for part in ("target", "retention") for when in ("given", "before", "after")
    }
    answers["target/after"] = torch.randint(classes, (n,), generator=generator).int()
    shown = {}
    for index in choose(losses, labels, 24):
        seen = describe((torch.rand(3, 64, 64, generator=generator), 0))
        shown[str(index)] = seen | {"before": [index % classes, 0.5], "after": [index % classes, 0.9]}
    words = {"class_names": [f"class {number}" for number in range(classes)]}
    curve = [{"step": float(step), "loss": 1 / (1 + step)} for step in range(1000)]
    Evidence({"labels": labels.int(), **answers}, shown, [], curve, words).save(folder)
    rows = [f"{i},{i % 20 == 0},{i % 997 / 997},{labels[i]},{i % classes},0.9" for i in range(n)]
    header = "index,is_label_issue,label_score,given_label,predicted_label,probability"
    (folder / "label_issues.csv").write_text("\n".join([header, *rows]) + "\n")
    write_metrics(folder / "metrics.json", {"target/top1": 0.9, "target/before/top1": 0.5, "target/samples": 10_000})


class Texts:
    """Samples of 200 random tokens, the frequent ones frequent; each tenth is like the one before it."""

    def __init__(self, n: int, vocabulary: int) -> None:
        shares = 1 / torch.arange(1.0, vocabulary + 1)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.multinomial(shares, 200 * n, True, generator=generator).int().view(n, 200)
        self.tokens[9::10, :190] = self.tokens[8::10, :190][: len(self.tokens[9::10])]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index].long(), "prompt_length": 60}


def page(samples: int = 50_000, classes: int = 10) -> None:
    """Print size, time and memory of the page of a run with random pictures."""
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), samples, classes)
        path, seconds, _ = measured(write_page, Path(name))
        size, most = path.stat().st_size / 2**20, memory("VmHWM") / _MIB
        print(f"{samples} samples, {classes} classes: {size:.2f} MiB, {seconds:.1f} s, {most:.0f} MiB at most")


def texts(samples: int = 50_000) -> None:
    """Print time and memory of the look at texts of 200 tokens."""
    from tests.language import tiny_tokenizer  # transformers takes memory, which is not the page's

    tokenizer = tiny_tokenizer()
    (found, _), seconds, above = measured(look_at_texts, Texts(samples, len(tokenizer)), tokenizer)
    alike = int((found["text/twin"] >= 0).sum())
    print(f"{samples} texts, {alike} like an earlier one: {seconds:.1f} s, {above / _MIB:.0f} MiB above the imports")


if __name__ == "__main__":
    auto_cli([page, texts], as_positional=False)
