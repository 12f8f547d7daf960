"""What a page needs and no other file of a run has: labels, answers, thumbnails, texts, the curve of training.

In: samples and answers, during a fit. Out: `report.safetensors` in the run's directory. Next: `run_page.py`.
"""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flow_lightning.files import load_tensors, save_tensors
from flow_lightning.report.texts import answer_start

EVIDENCE_FILE = "report.safetensors"
_FORMAT = "flow_lightning.Evidence/1"
#: Pixels of the longer side of a thumbnail.
_PIXELS = 96
#: Most tokens of a text that a page shows, of the prompt and of the answer each.
_TOKENS = 160


@dataclass
class Evidence:
    """What `ReportCallback` has gathered so far.

    Attributes:
        tensors: `labels` of the training samples, `[n]`; the classes chosen by measures, such as `target/before`;
            of instruction data what `report/texts.py` found.
        shown: What is shown of a training sample, by its index as a string: `picture`, `text` or `tokens`, and the
            answers `before` and `after`, each a class and its probability.
        lost: The same of retention samples whose answer changed for the worse, with `given`, `before` and `after`.
        curve: Rows of `step` and `loss`.
        words: Names of classes (`class_names`, `pretrained_names`), `answers` in which something was found,
            the `sources` by the rank in `text/source`, and a `note` on what is not known.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    shown: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    words: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the file, atomically."""
        rest = {name: value for name, value in vars(self).items() if name != "tensors"}
        save_tensors(folder / EVIDENCE_FILE, _FORMAT, self.tensors, {"json": json.dumps(rest)})

    @classmethod
    def load(cls, folder: Path) -> "Evidence":
        """Read the file; a ValueError says what is wrong with a damaged one."""
        tensors, metadata = load_tensors(folder / EVIDENCE_FILE, _FORMAT)
        return cls(tensors, **json.loads(metadata["json"]))


def describe(sample: Any, tokenizer: Any = None, mean: Any = None, std: Any = None) -> dict[str, Any]:
    """Return what a page can show of a sample: its `picture`, `text` or `tokens`; nothing if it has neither.

    Args:
        sample: As a data set gives it: a dict, `(x, y)`, an `IndexedSample`.
        tokenizer: Turns `input_ids` back into text.
        mean: Of each channel, pixels in `[0, 1]`; without it a picture is stretched to the range of its values.
        std: Of each channel.
    """
    parts = _parts(sample)
    if tokenizer is not None and isinstance(sample, Mapping) and "input_ids" in sample:
        return {"tokens": _tokens(sample, tokenizer)}
    for part in parts:
        if isinstance(part, Image.Image):
            return {"picture": _jpeg(part)}
        if isinstance(part, Tensor) and part.ndim == 3 and part.shape[0] in (1, 3):
            if part.dtype == torch.uint8:
                return {"picture": _jpeg(Image.fromarray(part.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()))}
            if part.is_floating_point():
                return {"picture": _jpeg(_image(part, mean, std))}
    text = next((part for part in parts if isinstance(part, str)), None)
    return {} if text is None else {"text": text[:2000]}


def _parts(sample: Any) -> list[Any]:
    inner = list(sample.values()) if isinstance(sample, Mapping) else sample
    if not isinstance(inner, list | tuple):
        return [inner]
    return [part for each in inner for part in (_parts(each) if isinstance(each, list | tuple) else [each])]


def _image(pixels: Tensor, mean: Any, std: Any) -> Image.Image:
    if mean is not None and std is not None and len(mean) in (1, pixels.shape[0]):
        pixels = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    else:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp_min(1e-8)
    array = (255 * pixels.nan_to_num().clamp(0, 1)).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0)
    return Image.fromarray(array.contiguous().numpy())


def _jpeg(image: Image.Image) -> str:
    """Return a thumbnail as a data URI; a small picture is enlarged without smoothing."""
    scale = _PIXELS / max(image.size)
    size = tuple(max(1, round(scale * side)) for side in image.size)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    content = io.BytesIO()
    image.convert("RGB").resize((size[0], size[1]), method).save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def _tokens(sample: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the end of the prompt, and the supervised tokens, each as text; `cut` says that there are more."""
    ids = torch.as_tensor(sample["input_ids"])
    start = answer_start(sample)
    answer = ids[start : start + _TOKENS].tolist()
    prompt = tokenizer.decode(ids[max(0, start - _TOKENS) : start].tolist())
    return {
        "prompt": prompt,
        "answer": [tokenizer.decode([each]) for each in answer],
        "cut": len(ids) - start > _TOKENS,
    }
