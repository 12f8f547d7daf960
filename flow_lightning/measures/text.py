"""What a fit of a language model is measured on: general text, held-out instructions, the evaluation harness."""

import difflib
import importlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from flow_lightning.data.instructions import IGNORED
from flow_lightning.scoring.evaluation import evaluation
from flow_lightning.scoring.score import progress, score_dataset

#: Metrics of the evaluation harness that can be a task's score, the first that it has counts. None: any filter.
_MAIN_METRICS = (
    ("exact_match", None),
    ("acc", "none"),
    ("acc_norm", "none"),
    ("pass@1", None),
    ("pass_at_1", None),
)
_MARKS = (re.compile(r"####"), re.compile(r"the answer is", re.IGNORECASE))
_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:,\d{3})*(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TASK = re.compile(r"([^:].*?)(?::(\d+))?")


def perplexity(
    trainer: Trainer, module: LightningModule, loader: DataLoader[Any], description: str = "General text"
) -> float:
    """Compute the perplexity of a text: `exp(sum of -log p / tokens)`, over all supervised tokens.

    Args:
        trainer: Gives devices, precision and ranks.
        module: Has `token_losses`.
        loader: Gives windows of the text, see `TextWindows`.
        description: What the progress bar says.

    Returns:
        A number of at least 1, the same on every rank; infinite or NaN if the model diverged.
    """
    loss = target_loss(trainer, module, loader, description)
    return math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf


def target_loss(
    trainer: Trainer, module: LightningModule, loader: DataLoader[Any], description: str = "Target loss"
) -> float:
    """Compute the mean loss per supervised token, over all samples of a loader's data set.

    Args:
        trainer: Gives devices, precision and ranks.
        module: Has `token_losses`.
        loader: Gives batches of `input_ids` `[B, T]`, `labels` `[B, T]` and `index` `[B]`.
        description: What the progress bar says.

    Returns:
        Nats per token, the same on every rank.
    """
    sums, counts = score_dataset(trainer, module, loader, partial(_sums_and_counts, module), description)
    return (sums.sum() / counts.sum()).item()


def _sums_and_counts(module: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of the token losses, float64, and the number of supervised tokens of each row, both `[B]`."""
    counts = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).cpu()
    losses = module.token_losses(batch).cpu().double()  # some devices have no float64
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.zeros(len(counts), dtype=torch.float64).index_add(0, rows, losses), counts


def final_answer(text: str) -> str | None:
    r"""Return the final answer of a worked solution, in a form that can be compared.

    It is the rest of the line after the last `####`; without one the rest of the line after the last "The answer is";
    without that the last number. Separators of thousands, dollar signs, and a period at the end do not count, nor do
    zeros at the end of a decimal fraction.

    Returns:
        The answer, or None if there is none.

    >>> final_answer("48 + 24 = 72 clips.\n#### 72"), final_answer("The answer is: $1,200.00.")
    ('72', '1200')
    >>> final_answer("She pays 2.50 for 3 of them"), final_answer("I do not know.")
    ('3', None)
    """
    for mark in _MARKS:
        found = list(mark.finditer(text))
        if found:
            return _normalised(text[found[-1].end() :].strip(": \n").partition("\n")[0])
    numbers = _NUMBER.findall(text)
    return _normalised(numbers[-1]) if numbers else None


def _normalised(answer: str) -> str | None:
    answer = _THOUSANDS.sub("", answer.replace("$", "")).strip().rstrip(". ")
    if re.fullmatch(r"-?\d*\.\d+", answer):
        answer = answer.rstrip("0").rstrip(".")
    return answer or None


def exact_match(
    trainer: Trainer,
    module: Any,
    dataset: Any,
    max_new_tokens: int,
    batch_size: int,
    response_field: str = "response",
    description: str = "Generated answers",
) -> float:
    """Let the model answer the instructions of a data set, greedily, and compare final answers (see `final_answer`).

    Rank r answers samples r, r + world, r + 2 world, ...

    Args:
        trainer: Gives devices, precision and ranks.
        module: Has `causal_lm`, `tokenizer` and `max_positions`.
        dataset: An `IndexedDataset(InstructionDataset(..., keep_records=True))`.
        max_new_tokens: Most tokens of an answer.
        batch_size: Prompts per batch.
        response_field: Field of the records with the reference's worked solution.
        description: What the progress bar says.

    Returns:
        The fraction of equal final answers, the same on every rank.

    Raises:
        TypeError: If the data set has no records.
        ValueError: If a reference has no final answer, or prompts and answers are too long for the model.
    """
    references = _references(dataset, response_field)
    lengths = dataset.dataset.prompt_lengths.tolist()
    _check_room(max(lengths), max_new_tokens, module.max_positions)
    mine = sorted(range(trainer.global_rank, len(dataset), trainer.world_size), key=lambda i: -lengths[i])
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    show = trainer.is_global_zero and trainer.progress_bar_callback is not None
    correct = 0
    with evaluation(module):
        bar = progress(len(batches), description, show)
        for indices in batches:
            bar.update()
            prompts = [dataset[index]["input_ids"][: lengths[index]] for index in indices]
            answers = _generate(trainer, module, prompts, max_new_tokens)
            correct += sum(final_answer(text) == references[index] for index, text in zip(indices, answers))
    total = trainer.strategy.reduce(torch.tensor(correct, device=trainer.strategy.root_device), reduce_op="sum")
    return int(total) / len(dataset)


def _references(dataset: Any, field: str) -> list[str]:
    records = getattr(getattr(dataset, "dataset", None), "records", None)
    if records is None:
        raise TypeError(
            f"The test set is a {type(dataset).__name__} without records, so generated answers cannot be compared. Use "
            "InstructionDataModule(test=...), or set answer_tokens to None."
        )
    answers = [final_answer(record[field]) for record in records]
    if None in answers:
        number = answers.index(None)
        raise ValueError(
            f"The response of test sample {number} has no final answer: {records[number][field]!r:.200}. Expected one "
            "after '####', after 'The answer is', or at least a number. Set answer_tokens to None for such data."
        )
    return [answer for answer in answers if answer is not None]


def _check_room(prompt: int, answer: int, positions: int | None) -> None:
    if positions is not None and prompt + answer > positions:
        raise ValueError(
            f"The longest prompt has {prompt} tokens and an answer up to answer_tokens={answer}, but the model has "
            f"{positions} positions. Set answer_tokens to {max(positions - prompt, 1)} or less, or give the data "
            "module a smaller max_length."
        )


def _generate(trainer: Trainer, module: Any, prompts: Sequence[Tensor], max_new_tokens: int) -> list[str]:
    """Continue prompts `[T]`, greedily; return the text of what is new."""
    tokenizer, width = module.tokenizer, max(map(len, prompts))
    pad = padding_id(tokenizer)
    # On the left, so that each answer follows its prompt.
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0), value=pad) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    batch = trainer.strategy.batch_to_device({"input_ids": ids, "attention_mask": mask})
    settings = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    with trainer.precision_plugin.forward_context():
        output = module.causal_lm.generate(
            **batch,
            **settings,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
        )
    texts: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts


def padding_id(tokenizer: Any) -> int:
    """Return a token to pad with; which one is all the same, for no supervised token sees it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


def split_task(entry: str) -> tuple[str, int | None]:
    """Split `name:shots` into the name of a task and its number of examples, None if the task's own.

    >>> split_task("mmlu:5"), split_task("piqa")
    (('mmlu', 5), ('piqa', None))
    """
    match = _TASK.fullmatch(entry)
    if match is None:
        raise ValueError(f"A task is {entry!r}; expected the name of a task, or name:shots, such as 'mmlu:5'.")
    name, shots = match.groups()
    return name, None if shots is None else int(shots)


def harness_scores(
    trainer: Trainer,
    module: Any,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    run_unsafe_code: bool = False,
) -> dict[str, float]:
    """Score the model on tasks of the lm-evaluation-harness.

    A task's score is its `exact_match`, else `acc`, else `acc_norm`, else `pass@1`; that of a group, its own. Rank 0
    evaluates and the others wait: where that takes longer than the timeout of the process group (30 minutes by
    default), raise it, say with DDPStrategy(timeout=...).

    Args:
        trainer: Gives precision and ranks.
        module: Has `causal_lm`, `tokenizer` and `max_positions`.
        tasks: Names of tasks or groups, as `name` or `name:shots`.
        include_path: Folder with YAML files of tasks of one's own. The harness's own tasks are only looked at if one
            of `tasks` is not there.
        limit: Samples per task; None for all.
        batch_size: Sequences per forward pass.
        run_unsafe_code: Whether tasks may run code that the model wrote.

    Returns:
        Name of the task to its score, a fraction, the same on every rank.

    Raises:
        ImportError: If the harness is not installed.
        ValueError: If a task is unknown or has none of these metrics.
    """
    scores: dict[str, float] = {}
    if trainer.is_global_zero:
        harness = _import_harness("lm_eval")
        with evaluation(module), _quiet("lm_eval"):
            manager = _task_manager([split_task(entry)[0] for entry in tasks], include_path)
            model = _harness_model(trainer, module, batch_size)
            for shots, names in _by_shots(tasks).items():
                results = harness.simple_evaluate(
                    model,
                    tasks=names,
                    num_fewshot=shots,
                    limit=limit,
                    task_manager=manager,
                    bootstrap_iters=0,
                    log_samples=False,
                    confirm_run_unsafe_code=run_unsafe_code,
                )
                found = {**results["results"], **results.get("groups", {})}
                scores |= {name: _main_metric(name, found.get(name, {})) for name in names}
    scores = trainer.strategy.broadcast(scores)
    return {name: scores[name] for name, _ in map(split_task, tasks)}


def _import_harness(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Tasks need the lm-evaluation-harness, which could not be imported ({error}). Install it: "
            'pip install "flow-lightning[eval]"'
        ) from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a logger say errors only: the harness warns of what is meant here, such as a model that is ready."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _task_manager(names: Sequence[str], include_path: str | None) -> Any:
    """Find the tasks, in `include_path` alone if all are there: reading the harness's own takes seconds."""
    managers = _import_harness("lm_eval.tasks")
    if include_path is not None:
        manager = managers.TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = managers.TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks)
            raise ValueError(
                f"The evaluation harness has no task {name!r}; similar ones are {close or 'not there either'}. See "
                "`lm_eval ls tasks`, or set tasks_path to the folder of its YAML file."
            )
    return manager


def _harness_model(trainer: Trainer, module: Any, batch_size: int) -> Any:
    models, model = _import_harness("lm_eval.models.huggingface"), module.causal_lm
    with trainer.precision_plugin.forward_context():
        # The harness turns autocast off unless it is told the type.
        device = model.device.type
        mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return models.HFLM(
        pretrained=model,
        tokenizer=deepcopy(module.tokenizer),  # it may get a padding token
        backend="causal",
        batch_size=batch_size,
        max_length=module.max_positions,
        mixed_precision_dtype=mixed,
    )


def _by_shots(tasks: Sequence[str]) -> dict[int | None, list[str]]:
    """Put tasks with the same number of examples together."""
    groups: dict[int | None, list[str]] = {}
    for name, shots in map(split_task, tasks):
        groups.setdefault(shots, []).append(name)
    return groups


def _main_metric(task: str, results: Mapping[str, Any]) -> float:
    found = {tuple(key.split(",", 1)): value for key, value in results.items() if "," in key}
    for name, wanted in _MAIN_METRICS:
        for (metric, kind), value in found.items():
            if metric == name and wanted in (kind, None):
                return float(value)
    metrics = sorted(key for key in results if "," in key and "_stderr," not in key)
    raise ValueError(
        f"The task {task!r} has no metric exact_match, acc, acc_norm or pass@1, but {metrics or 'none of its own'}. "
        "Choose another task; in the place of a tag, give its tasks."
    )
