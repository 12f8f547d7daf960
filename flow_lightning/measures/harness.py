"""Tasks of the lm-evaluation-harness, on the model as it is in memory.

In: Trainer, module, names of tasks. Out: a score for each. Next: `callbacks/retention.py`.
"""

import difflib
import fnmatch
import logging
import re
import statistics
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule, Trainer

from flow_lightning.contract import module_contract
from flow_lightning.distributed import from_rank_zero, on_rank_zero
from flow_lightning.measures.base import Measure, Metric, Panel, When, check_at_least
from flow_lightning.measures.text import check_language_model
from flow_lightning.optional import optional_import
from flow_lightning.scoring.evaluation import evaluation

#: What can be a task's score, as metric,filter of the harness; the first that a task has counts.
_SCORES = ("exact_match,*", "acc,none", "acc_norm,none", "pass@1,*", "pass_at_1,*")


class HarnessTasks(Measure):
    """What was kept: scores of tasks of the lm-evaluation-harness, and their mean; `retention/tasks` lists the names.

    Tasks may be in groups, such as `{"commonsense": ["piqa", "hellaswag"], "mmlu": ["mmlu:5"]}`. The score of a
    group is the mean of its tasks, and the accuracy is the mean of the groups, as in the paper.

    Without network, start the run in a folder that holds the data sets below their names at the hub, such as
    `Rowan/hellaswag/`. Code tasks also need `code_eval/`, the metric of Hugging Face's `evaluate`.

    Rank 0 evaluates and the other ranks wait. If that takes longer than the timeout of the process group (30 minutes by
    default), raise it, for instance with `DDPStrategy(timeout=...)`.

    Args:
        tasks: Tasks of the harness, or its own groups, as `name` or `name:shots`; or lists of them by group.
        tasks_path: Folder with YAML files of tasks of one's own.
        limit: Samples per task; None for all.
        batch_size: Sequences per forward pass.
        run_unsafe_code: Whether tasks may run code that the model wrote, as MBPP does. Some also ask for the
            environment variable HF_ALLOW_CODE_EVAL=1.
    """

    part: ClassVar[Literal["target", "retention"]] = "retention"
    metrics = (
        Metric("retention/before/accuracy", "mean accuracy of the tasks before training", "fraction", "up"),
        Metric("retention/after/accuracy", "mean accuracy of the tasks", "fraction", "up"),
        Metric("retention/after/group/*", "*", "fraction", "up"),
        Metric("retention/after/task/*", "task *", "fraction", "up"),
    )
    panels = (Panel("accuracy on general tasks", "fraction", "up", "retention/after/accuracy"),)

    def __init__(
        self,
        tasks: list[str] | dict[str, list[str]],
        *,
        tasks_path: str | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        run_unsafe_code: bool = False,
    ) -> None:
        check_at_least(1, limit=limit, batch_size=batch_size)
        grouped = tasks if isinstance(tasks, dict) else {"": tasks}  # those of a list are one group without a name
        self.groups = {name: [split_task(task) for task in of] for name, of in grouped.items()}
        listed = [task for group in self.groups.values() for task in group]
        self.shots = dict(listed)
        if len(self.shots) < len(listed):
            raise ValueError(f"tasks {tasks} names one more than once; expected each once, as 'name' or 'name:shots'.")
        if not self.groups or not all(self.groups.values()):
            raise ValueError(f"tasks is {tasks}; expected at least one task, and at least one in each group.")
        self.tasks_path, self.limit, self.batch_size = tasks_path, limit, batch_size
        self.run_unsafe_code = run_unsafe_code
        self.index: Any = None

    def prepare(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Refuse a module that is no language model or in shards, and tasks that the harness does not know."""
        check_language_model(module, type(self).__name__)
        if trainer.strategy.restore_checkpoint_after_setup and trainer.world_size > 1:
            raise TypeError(
                f"Under {type(trainer.strategy).__name__} the model is in shards, so rank 0 cannot evaluate it alone. "
                f"Leave out {type(self).__name__}, and evaluate the model that SavePretrainedCallback writes."
            )
        self.index = on_rank_zero(trainer, lambda: _find_tasks(self.shots, self.tasks_path))
        return {f"{self.part}/tasks": sorted(self.shots)}

    def measure(self, trainer: Trainer, module: LightningModule, when: When) -> dict[str, float]:
        """Score the tasks, and take the means."""
        scores = from_rank_zero(trainer, lambda: self._scores(trainer, module))
        means = {name: statistics.fmean(scores[task] for task, _ in group) for name, group in self.groups.items()}
        groups = {f"group/{name}": mean for name, mean in means.items() if name}
        tasks = {f"task/{name}": scores[name] for name in self.shots}
        return {"accuracy": statistics.fmean(means.values())} | groups | tasks

    def _scores(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        harness, logger = _import_harness("lm_eval"), logging.getLogger("lm_eval")
        scores: dict[str, float] = {}
        with evaluation(module), ExitStack() as stack:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)  # it warns of what is intended here, such as a ready model
            model = _harness_model(trainer, module, self.batch_size)
            for shots in dict.fromkeys(self.shots.values()):
                names = [name for name in self.shots if self.shots[name] == shots]
                settings = {"num_fewshot": shots, "limit": self.limit, "confirm_run_unsafe_code": self.run_unsafe_code}
                settings |= {"task_manager": self.index, "bootstrap_iters": 0, "log_samples": False}
                results = harness.simple_evaluate(model, tasks=names, **settings)
                by_name = {**results["results"], **results.get("groups", {})}
                scores |= {name: _main_metric(name, by_name.get(name, {})) for name in names}
        return scores


class TargetTasks(HarnessTasks):
    """What was learned: the same for tasks of the target, such as "gsm8k:5" after MetaMathQA."""

    part = "target"
    metrics = (
        Metric("target/before/accuracy", "mean accuracy of the target's tasks before training", "fraction", "up"),
        Metric("target/accuracy", "mean accuracy of the target's tasks", "fraction", "up"),
        Metric("target/group/*", "*", "fraction", "up"),
        Metric("target/task/*", "task *", "fraction", "up"),
    )
    panels = (Panel("accuracy on the target's tasks", "fraction", "up", "target/accuracy"),)


def split_task(entry: str) -> tuple[str, int | None]:
    """Split `name:shots` into the name of a task and its number of examples, None if the task's own.

    >>> split_task("mmlu:5"), split_task("piqa")
    (('mmlu', 5), ('piqa', None))
    """
    if match := re.fullmatch(r"([^:].*?)(?::(\d+))?", entry):
        return match[1], None if match[2] is None else int(match[2])
    raise ValueError(f"A task is {entry!r}; expected the name of a task, or name:shots, such as 'mmlu:5'.")


def _import_harness(name: str) -> Any:
    return optional_import(name, "eval", "tasks of the lm-evaluation-harness")


def _find_tasks(names: Iterable[str], include_path: str | None) -> Any:
    """Return the harness's index of tasks: that of `include_path` alone if all are there, as its own takes seconds."""
    managers = _import_harness("lm_eval.tasks")
    if include_path is not None:
        manager = managers.TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = managers.TaskManager(include_path=include_path) if include_path else _own_index()
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks)
            raise ValueError(
                f"The evaluation harness has no task {name!r}; similar ones are {close or 'not there either'}. See "
                "`lm_eval ls tasks`, or set tasks_path to the folder of its YAML file."
            )
    return manager


@lru_cache
def _own_index() -> Any:
    """Return the harness's index of its own tasks, read once: it takes seconds."""
    return _import_harness("lm_eval.tasks").TaskManager()


def _harness_model(trainer: Trainer, module: LightningModule, batch_size: int) -> Any:
    models, contract = _import_harness("lm_eval.models.huggingface"), module_contract(module)
    device = contract.causal_lm.device.type
    with trainer.precision_plugin.forward_context():  # the harness turns autocast off unless it is told the type
        mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return models.HFLM(
        pretrained=contract.causal_lm,
        tokenizer=deepcopy(contract.tokenizer),  # it may get a padding token
        backend="causal",
        batch_size=batch_size,
        max_length=contract.max_positions,
        mixed_precision_dtype=mixed,
    )


def _main_metric(task: str, results: Mapping[str, Any]) -> float:
    """Return a task's score, by `metric,filter`: its `exact_match`, else `acc`, else `acc_norm`, else `pass@1`."""
    for pattern in _SCORES:
        if keys := fnmatch.filter(results, pattern):
            return float(results[keys[0]])
    metrics = sorted(key for key in results if "," in key and "_stderr," not in key)
    raise ValueError(
        f"The task {task!r} has no metric exact_match, acc, acc_norm or pass@1, but {metrics or 'none of its own'}. "
        "Choose another task; instead of a tag, name its tasks."
    )
