"""A run's directory as a fit leaves it, with hostile names, for the tests of the page."""

from html.parser import HTMLParser
from pathlib import Path

import torch

from flow_lightning.method.weights import SampleWeights, TokenWeights
from flow_lightning.report.metrics import write_metrics
from flow_lightning.report.page.evidence import Evidence, describe

EVIL = "<script>document.title='broken'</script>"
NAMES = [EVIL, "b\x00\x1b\u202e$x_1$", 'c" onload="x']
METRICS = {
    **{"target/before/top1": 0.5, "target/top1": 0.75, "target/samples": 40, "time/after_s": 1.0},
    **{"retention/before/top1": 0.9, "retention/after/top1": 0.8, "retention/samples": 50},
    "retention/epochs": [{"epoch": 1, "step": 5, "top1": 0.85}, {"epoch": 2, "step": 10, "top1": 0.8}],
    "path/points": [
        {"alpha": 0.0, "kept": 1.0, "bound": 1.0, "target_loss": 1.0, "target_top1": 0.5},
        {"alpha": 1.0, "kept": 0.8, "bound": 0.7, "target_loss": 0.5, "target_top1": 0.8},
    ],
}


def write_run(folder: Path, n: int = 30) -> Path:
    """Write a whole run of images of three classes: class 2 has high losses, so it is starved."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = torch.arange(n) % 3
    losses = torch.linspace(0.1, 1.0, n) + 8.0 * (labels == 2)
    SampleWeights.from_losses(losses).save(folder / "flow_weights.safetensors")
    generator = torch.Generator().manual_seed(0)
    shown = {
        str(i): describe((torch.rand(3, 8, 8, generator=generator), 0))
        | {"before": [1, 0.6], "after": [int(labels[i]), 0.9]}
        for i in [*range(6), *range(n - 6, n)]
    }
    shown["0"] = {"note": f"cannot be read: {EVIL}"}
    shown["1"] = {"text": f"{EVIL}\x07 a text\ud800"}
    given = torch.tensor([0, 0, 1, 1, 2, 2])
    answers = {"given": given, "before": torch.tensor([0, 0, 1, 2, 2, 2]), "after": torch.tensor([0, 1, 1, 1, 2, 0])}
    tensors = {f"{part}/{when}": chosen.int() for part in ("target", "retention") for when, chosen in answers.items()}
    lost = [{"index": 1, "given": 0, "before": 0, "after": 1, **describe(torch.rand(3, 8, 8, generator=generator))}]
    words = {"class_names": NAMES, "pretrained_names": ["cat", "dog", EVIL]}
    curve = [{"step": float(step), "loss": 1 / step} for step in range(1, 20)]
    Evidence({"labels": labels.int(), **tensors}, shown, lost, curve, words).save(folder)
    rows = [f"{i},{i in (4, 5)},{i / n},{labels[i]},{1 - min(1, int(labels[i]))},0.75" for i in range(n)]
    header = "index,is_label_issue,label_score,given_label,predicted_label,probability"
    (folder / "label_issues.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "config.yaml").write_text(f"# {EVIL}\nmethod: flow\n")
    write_metrics(folder / "metrics.json", METRICS)
    return folder


def write_text_run(folder: Path) -> Path:
    """Write a run of three answers with token weights."""
    folder.mkdir(parents=True, exist_ok=True)
    losses = torch.tensor([0.1, 0.2, 5.0, 0.3, 0.1, 4.0])
    TokenWeights.from_losses(losses, torch.tensor([0, 3, 5, 6])).save(folder / "flow_weights.safetensors")
    answers = [["two", " and", f" {EVIL}"], ["a", "b"], ["end"]]
    shown = {
        str(i): {"tokens": {"prompt": f"Q{i}: {EVIL}", "answer": each, "cut": False}} for i, each in enumerate(answers)
    }
    Evidence(shown=shown).save(folder)
    return folder


class Parsed(HTMLParser):
    """The tags of a page with their attributes, its text, and that of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._open = "", [], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts.append(data)
        elif self._open != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
