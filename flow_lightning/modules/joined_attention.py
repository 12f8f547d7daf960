"""Attention of samples that are joined in one row, each alone, so that no work goes into pairs of samples.

In: a model of transformers. Out: the same model, the same outputs. Next: `causal_language.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

#: What transformers calls this attention, as `attn_implementation`.
NAME = "flow_lightning_by_sample"


def attend_by_sample(model: Any) -> None:
    """Let a model on a CPU with `sdpa` attend within each joined sample; leave any other model as it is.

    `sdpa` computes all pairs of tokens of a row and masks those of two samples: T * T for T tokens. In samples of about
    S tokens this takes T * S. On a GPU flex or flash attention do that; `sdpa` warns.
    """
    if model.config._attn_implementation != "sdpa":
        return
    if model.device.type != "cpu":
        rank_zero_warn(
            "Samples are joined in one row, and `sdpa` attends to all pairs of a row here. To attend within each "
            "sample set --model.attention flex_attention, or flash_attention_2 if flash-attn is installed."
        )
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _by_sample)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


@contextmanager
def with_plain_attention(model: Any) -> Iterator[None]:
    """Let a model attend by `sdpa` for a while: flash attention needs a GPU and 16 bits, and flex attention compiles.

    It serves models that look their attention up in each pass, as most do; those that choose it when they are built
    keep theirs.
    """
    parts = [getattr(model.config, name, None) for name in model.config.sub_configs]
    own = [(part, part._attn_implementation) for part in (model.config, *parts) if part is not None]
    for part, name in own:
        if "flash" in str(name) or "flex" in str(name):
            part._attn_implementation = "sdpa"  # of its parts, too
    try:
        yield
    finally:
        for part, name in own:
            if part._attn_implementation != name:
                part._attn_implementation = name


def _by_sample(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attend with `sdpa` of transformers, to one sample after the other if the row has several.

    Query, key and value are `[B, H, T, D]`, the result is `[B, T, H, D]`. Samples begin where `position_ids` are 0.
    Each has its own part of the mask, so that windows stay.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    positions: Tensor | None = settings.get("position_ids")
    length = query.shape[2]
    if attention_mask is None or positions is None or positions.shape != (1, length) or key.shape[2] != length:
        return sdpa(module, query, key, value, attention_mask, **settings)  # type: ignore[no-any-return]
    ends = sorted({0, *(positions[0] == 0).nonzero()[:, 0].tolist(), length})
    parts = [
        sdpa(module, *(each[:, :, a:b] for each in (query, key, value)), attention_mask[..., a:b, a:b], **settings)[0]
        for a, b in pairwise(ends)
    ]
    return torch.cat(parts, dim=1), None
