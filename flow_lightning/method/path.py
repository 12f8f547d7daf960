"""The path of one fit: models between the pre-trained and the fine-tuned one.

In: two state dicts of one model. Out: the state dict of a point between them. Next: `budget.py`.

Sources: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT, arXiv 2109.01903), for the straight line;
Wang et al., "LiNeS" (arXiv 2410.17146), for factors that grow with depth.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

Shape = Literal["even", "depth"]

#: The block of a parameter: all up to the first number, and further numbers right behind it.
_BLOCK = re.compile(r"(.*?\.\d+(?:\.\d+)*)\.")
#: Parameters of the two factors of a low-rank adapter, in the names of peft.
_FIRST_FACTOR, _SECOND_FACTOR = re.compile(r"\.lora_(embedding_)?A\b"), re.compile(r"\.lora_(embedding_)?B\b")


def point(
    pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], alpha: float, shape: Shape = "even"
) -> dict[str, Tensor]:
    """Compute `pretrained + alpha * factor * (finetuned - pretrained)` for each tensor; 0 and 1 give them to the bit.

    All tensors lie on the same straight line, BatchNorm's running mean and variance as well. Frozen ones do not move,
    because both ends have them. Integers, such as BatchNorm's number of batches, are those of the fine-tuned model
    wherever `alpha * factor` is not 0.

    A low-rank adapter adds `B A` to a weight. The pre-trained model is the one without adapters. So `B` alone is
    scaled, from 0: with both factors scaled, the update would grow by `alpha ** 2`.

    Args:
        pretrained: Tensors by name, of any floating type.
        finetuned: The same names and shapes.
        alpha: The position, from 0 (pre-trained) to 1 (fine-tuned).
        shape: `even`: the factor is 1. `depth`: it grows from block to block, see `depth_factors`.

    Raises:
        ValueError: If names or shapes differ, or `shape` is unknown.

    >>> point({"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([1.0, 4.0])}, 0.5)
    {'w': tensor([0.5000, 3.0000])}
    """
    check_path(pretrained, finetuned)
    check_shape(shape)
    factors = depth_factors(pretrained) if shape == "depth" else dict.fromkeys(pretrained, 1.0)
    return {
        name: _between(name, value, finetuned[name].to(value.device), alpha * factors[name])
        for name, value in pretrained.items()
    }


def depth_factors(names: Iterable[str]) -> dict[str, float]:
    """Return the factor of each tensor, `(block - 1) / (blocks - 1)`: 0 in the first block, 1 in the last (LiNeS).

    Blocks are in the order of the names, as a state dict has them: the order in which a model defines its parts. A
    block is what has the same numbers in its name (`layers.5`, `blocks.3.1`); a part without a number is its own block.

    >>> depth_factors(["stem.weight", "blocks.0.conv.weight", "blocks.0.bn.weight", "blocks.1.conv.weight"])
    {'stem.weight': 0.0, 'blocks.0.conv.weight': 0.5, 'blocks.0.bn.weight': 0.5, 'blocks.1.conv.weight': 1.0}
    """
    numbers = block_numbers(names)
    last = max(numbers.values(), default=0)
    return {name: number / last if last else 1.0 for name, number in numbers.items()}


def block_numbers(names: Iterable[str]) -> dict[str, int]:
    """Return the number of each tensor's block, from 0, see `depth_factors`.

    >>> block_numbers(["stem.weight", "blocks.0.conv.weight", "blocks.0.bn.weight", "head.weight"])
    {'stem.weight': 0, 'blocks.0.conv.weight': 1, 'blocks.0.bn.weight': 1, 'head.weight': 2}
    """
    blocks = {name: match[1] if (match := _BLOCK.match(name)) else name.rpartition(".")[0] for name in names}
    numbers = {block: number for number, block in enumerate(dict.fromkeys(blocks.values()))}
    return {name: numbers[block] for name, block in blocks.items()}


def check_path(pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> None:
    """Refuse, with a ValueError, two models between which there is no path."""
    for name, value in pretrained.items():
        other = finetuned.get(name)
        if other is None or other.shape != value.shape:
            found = "missing" if other is None else f"of shape {list(other.shape)}"
            raise ValueError(
                f"There is no path from the pre-trained to the fine-tuned model: {name} had shape {list(value.shape)} "
                f"and is {found} now. Change the model before the fit, not in it."
            )


def check_shape(shape: str) -> None:
    """Refuse an unknown shape with a ValueError."""
    if shape not in get_args(Shape):
        raise ValueError(f"shape is {shape!r}; expected one of {', '.join(get_args(Shape))}.")


def _between(name: str, start: Tensor, end: Tensor, factor: float) -> Tensor:
    if _SECOND_FACTOR.search(name):
        return end * factor if factor else torch.zeros_like(start)
    if factor == 0:  # also where the end is NaN
        return start.clone()
    if factor == 1 or _FIRST_FACTOR.search(name) or not start.is_floating_point():
        return end.clone()
    wide = start.float() if start.dtype.itemsize < 4 else start
    return torch.lerp(wide, end.to(wide.dtype), factor).to(start.dtype)
