"""A penalty on how far a language model's predictions move from the pre-trained ones on text that is no training data.

In: text files, or text that the pre-trained model writes itself. Out: a term of the loss. Next: `distillation.py`, for
images.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from flow_lightning.callbacks.anchored import PretrainedCallback
from flow_lightning.callbacks.around_step import AroundStep
from flow_lightning.contract import module_contract
from flow_lightning.data.texts import TextWindows, read_texts
from flow_lightning.distributed import data_rank
from flow_lightning.measures.base import check_at_least
from flow_lightning.measures.text import padding_id
from flow_lightning.method.losses import answer_change
from flow_lightning.scoring.evaluation import evaluation
from flow_lightning.scoring.fingerprint import model_fingerprints

#: Draw from the model's own distribution, whatever its generation settings are.
_SAMPLED: dict[str, Any] = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
_BATCH = 16  # texts that are written at one time


class TextAnchorCallback(AroundStep, PretrainedCallback):
    """Add `strength` times the mean of KL(before || now) over the tokens of a window of text to the loss of each step.

    The text is that of files (rehearsal), or by default what the pre-trained model writes before training from an empty
    context. On the latter the mean estimates how far the whole distribution of the model has moved (Bansal and
    Sanghavi, "Context-free synthetic data mitigates forgetting", arXiv 2505.13811). They train on the text itself; the
    divergence of the predictions has the same mean and less noise. Measure what was kept on other text. Sample weights
    do not apply.

    It is for modules that declare `causal_lm` and `tokenizer`, as CausalLanguageModule does. Each micro-batch takes the
    next window, on each process another one. It costs a forward pass of the frozen model and one with gradient of the
    model in training. Where adapters alone are trained, the frozen model is the one without them; otherwise it is a
    whole copy on each device. A checkpoint carries the text, not the copy: for a resumed fit build the module from
    the same weights.

    Args:
        texts: UTF-8 files, or the word `packaged` (see `read_texts`); None for text of the model's own.
        strength: The factor of the term.
        window: Most tokens of a window, at least 2; at most as many as the model has positions.
        count: Windows in all. Those of files are drawn at random.

    Raises:
        ValueError: If an argument is out of range, or a file cannot be read. In the fit, if the tokenizer has no token
            that starts a text. In a resumed fit, if the module was built from other weights.
        TypeError: In the fit, if the module is no language model.
        RuntimeError: If a fit resumes from a checkpoint that was written without this callback.
    """

    def __init__(
        self, texts: Sequence[str] | None = None, *, strength: float = 1.0, window: int = 256, count: int = 64
    ) -> None:
        if not 0 < strength < float("inf"):
            raise ValueError(f"strength is {strength}; expected a number above 0.")
        check_at_least(2, window=window)
        check_at_least(1, count=count)
        self.texts, self.strength, self.window, self.count = texts, strength, window, count
        self._windows: list[Tensor] = []  # of tokens, [T]
        self._taken = 0  # windows, by each process
        self._frozen: Any = None  # a copy of the language model; None where adapters can be switched off

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the pre-trained model: the checkpoint of a fit that resumes is loaded after this."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        contract = module_contract(pl_module)
        if contract.causal_lm is None or contract.tokenizer is None:
            raise TypeError(
                f"TextAnchorCallback needs a module with causal_lm and tokenizer, as CausalLanguageModule has. "
                f"{type(pl_module).__name__} lacks one: add it, or use StayNearCallback."
            )
        self._windows, self._taken = [], 0
        trained = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        if not all(name.startswith(tuple(contract.new_parts)) for name in trained):
            self._frozen = deepcopy(contract.causal_lm).requires_grad_(False).eval()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the copy where the module is, and take or write the text; a resumed fit has it."""
        self.check_checkpoint(trainer, has_state=bool(self._windows))
        self.check_pretrained({} if self._frozen is None else model_fingerprints(self._frozen.state_dict()))
        if self._frozen is not None:
            trainer.precision_plugin.convert_module(self._frozen).to(pl_module.device)
        if not self.run.resumed:
            windows = self._written(trainer, pl_module) if self.texts is None else self._read(pl_module)
            self._windows = trainer.strategy.broadcast(windows)

    def term(self, trainer: Trainer, module: LightningModule, batch: Any) -> Tensor | None:
        """Compute the change on the next window."""
        rank, processes = data_rank(trainer)
        ids = self._windows[(self._taken * processes + rank) % len(self._windows)].to(module.device)[None]
        self._taken += 1
        with self._reference(module) as model:
            before = model(input_ids=ids, use_cache=False).logits[0]
        now = module_contract(module).causal_lm(input_ids=ids, use_cache=False).logits[0]
        return self.strength * answer_change(before, now).mean()

    @contextmanager
    def _reference(self, module: LightningModule) -> Iterator[Any]:
        """Give the pre-trained language model, without dropout and gradient."""
        contract = module_contract(module)
        if self._frozen is not None:
            with torch.no_grad():
                yield self._frozen
        else:
            with contract.frozen_reference(), evaluation(module):
                yield contract.causal_lm

    def _read(self, module: LightningModule) -> list[Tensor]:
        """Draw windows from the files."""
        contract = module_contract(module)
        window = min(self.window, contract.max_positions or self.window)
        windows = TextWindows(read_texts(self.texts or ()), contract.tokenizer, window).windows
        drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[: self.count]
        return [windows[position].long() for position in drawn.tolist()]

    def _written(self, trainer: Trainer, module: LightningModule) -> list[Tensor]:
        """Let the pre-trained model write texts, each from the token that starts a text to the one that ends it."""
        contract = module_contract(module)
        tokenizer, window = contract.tokenizer, min(self.window, contract.max_positions or self.window)
        end = tokenizer.eos_token_id
        start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ValueError(
                "The tokenizer has neither a BOS nor an EOS token to start a text with. Give texts=[FILE]."
            )
        texts: list[Tensor] = []
        with self._reference(module) as model, evaluation(model), trainer.precision_plugin.forward_context():
            torch.manual_seed(0)  # the same on every process
            while len(texts) < self.count:
                ids = torch.full((min(_BATCH, self.count - len(texts)), 1), start, device=module.device)
                written = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    **_SAMPLED,
                    **{"max_new_tokens": window - 1, "eos_token_id": end, "pad_token_id": padding_id(tokenizer)},
                    use_cache=True,
                )
                texts += [_until(row, end) for row in written.cpu()]
        return texts

    def state_dict(self) -> dict[str, Any]:
        """Return the text, how much of it was taken, and the fingerprints of the pre-trained model."""
        return {**super().state_dict(), "windows": self._windows, "taken": self._taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state_dict(state_dict)
        self._windows, self._taken = state_dict["windows"], state_dict["taken"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the memory."""
        super().teardown(trainer, pl_module, stage)
        self._frozen, self._windows = None, []


def _until(ids: Tensor, end: int | None) -> Tensor:
    """Return token ids `[T]` up to the first `end` behind the first token, what follows is padding.

    >>> _until(torch.tensor([0, 5, 0, 0]), end=0)
    tensor([0, 5, 0])
    """
    found = (ids[1:] == end).nonzero() if end is not None else ids[:0]
    return ids[: int(found[0]) + 2].clone() if len(found) else ids
