"""Sums of the bits of a tensor, by which any change of it shows, at the speed of memory and on any device."""

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

#: Columns in which the bits of a tensor are summed, and rows of a block that is summed at once.
_COLUMNS, _ROWS = 2**11, 2**9


def checksums(tensor: Tensor) -> Tensor:
    """Add up the bits of a tensor, row by row, each column times an odd number of its own.

    Whichever element changes, a sum changes, and so it does if elements change places.

    Args:
        tensor: Any shape, type and device. One in shards is gathered first, for which all ranks must call.

    Returns:
        Type and shape as a hash, then the sums, and the elements that are too few for a row, `[K]` int64, on the CPU.
    """
    head = int.from_bytes(
        hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=7).digest(), "big"
    )
    whole = tensor.detach()
    whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
    if whole.is_complex():
        whole = torch.view_as_real(whole)
    bits = whole.flatten() if whole.dtype == torch.bool else whole.flatten().view(_integers(whole))
    in_rows = bits.numel() // _COLUMNS * _COLUMNS
    blocks = bits[:in_rows].view(-1, _COLUMNS).split(_ROWS)
    factors = torch.randint(2**62, (_COLUMNS,), generator=torch.Generator().manual_seed(0)).to(bits.device) * 2 + 1
    sums = [(block * factors).sum(1) for block in blocks]  # wraps at 64 bits
    return torch.cat([torch.tensor([head]), torch.cat([*sums, bits[in_rows:].long()]).cpu()])


def _integers(tensor: Tensor) -> torch.dtype:
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
