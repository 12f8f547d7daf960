"""The fine-tuned model in the format of the library that it comes from.

In: a module of any class. Out: a folder that timm, transformers or peft loads, else safetensors. Next: `callbacks/`.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from safetensors.torch import save_file
from torch import Tensor, nn

from flow_lightning.contract import module_contract


def save_pretrained(module: LightningModule, folder: str | Path, merge: bool = False) -> None:
    """Write the model of a module into a folder.

    Who writes it: the module's own `save_pretrained`; else timm, transformers or peft, if all parameters belong to one
    model of theirs. Otherwise it is the module's `state_dict`, in `model.safetensors`. Of a model with adapters of peft
    the adapters alone are written, or with `merge` a copy of the model with the adapters in it.
    """
    own, model = module_contract(module).save_pretrained, _only_model(module)
    if own is not None:
        own(folder, merge=merge)
    elif model is None:
        tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        # Copies, as safetensors takes no tensors that share their memory.
        copies = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(copies, Path(folder) / "model.safetensors")
    elif hasattr(model, "save_pretrained"):
        merged = deepcopy(model).merge_and_unload() if merge and hasattr(model, "merge_and_unload") else model
        merged.save_pretrained(folder)
    else:
        save_timm(model, folder)


def save_timm(model: nn.Module, folder: str | Path) -> None:
    """Write a model of timm: `model.safetensors` and `config.json`.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads the folder (recent versions of timm do), and
    `timm.create_model(NAME, pretrained=True, num_classes=C, pretrained_cfg_overlay={"file": FILE, "num_classes": C})`
    the file.
    """
    import timm  # slow to import

    copy = deepcopy(model).cpu().to(memory_format=torch.contiguous_format)  # safetensors takes no other
    timm.models.save_for_hf(copy, str(folder), safe_serialization=True)


def _only_model(module: nn.Module) -> Any:
    """Return the one model of another library that holds all parameters of a module; None if there is none."""
    found = list(_outermost(module))
    if len(found) != 1 or {*map(id, module.parameters())} != {*map(id, found[0].parameters())}:
        return None
    return getattr(found[0], "_orig_mod", found[0])  # what torch.compile has wrapped


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if hasattr(child, "save_pretrained") or hasattr(child, "pretrained_cfg"):
            yield child
        else:
            yield from _outermost(child)
