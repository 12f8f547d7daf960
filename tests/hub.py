"""Tiny copies of the hub's data sets by which the paper measures language models, in the working folder.

Their fields are those that the tasks of lm-evaluation-harness read; the texts are our own.
"""

import json
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

#: Of MMLU, one of each of its four parts.
SUBJECTS = ["astronomy", "marketing", "philosophy", "sociology"]
SOLUTION = "def double(number):\n    return 2 * number\n"
CHOICES = {"text": ["two", "three", "four", "five"], "label": ["A", "B", "C", "D"]}
LETTER = {"question": "How many?", "question_stem": "How many?", "choices": CHOICES, "answerKey": "B"}
PHYSICAL = {"goal": "Buy apples", "sol1": "in a shop", "sol2": "in a train", "label": 0}
SOCIAL = {"context": "Anna buys apples.", "question": "Why?", "label": "3"}
SOCIAL |= {f"answer{name}": text for name, text in zip("ABC", ("to sell", "to run", "to eat"))}
STORY = {"ctx_a": "Anna buys", "ctx_b": "apples and", "activity_label": "Shopping", "label": "2"}
STORY |= {"endings": ["flies.", "sleeps.", "eats them.", "swims."]}
SUM = {"question": "Anna has 2 apples and buys 2. How many?", "answer": "2 + 2 = 4\n#### 4"}
CODE = {"task_id": 11, "text": "Write a function that doubles a number.", "code": SOLUTION}
CODE |= {"test_list": [f"assert double({number}) == {2 * number}" for number in (1, 2, 3)]}

#: A metric of `evaluate`: the share of programs that pass their tests. It runs them here and now: for tests only.
CODE_EVAL = """
import datasets
import evaluate

class CodeEval(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="", citation="", inputs_description="",
                                   features=datasets.Features(features))

    def _compute(self, predictions, references, k):
        return {"pass@1": sum(map(passes, predictions, references)) / len(references)}, {}

def passes(programs, test):
    try:
        exec(programs[0] + "\\n" + test, {})
    except Exception:
        return False
    return True
"""


def write_hub() -> None:
    """Write all data sets, and the metric for code, into the working folder."""
    question = {"question": "How many apples?", "choices": CHOICES["text"], "answer": 2}
    _write("cais/mmlu", SUBJECTS, test=[question], dev=[question] * 5)
    _write("allenai/ai2_arc", ["ARC-Easy", "ARC-Challenge"], train=[LETTER], validation=[LETTER], test=[LETTER])
    _write("allenai/openbookqa", ["main"], train=[LETTER], validation=[LETTER], test=[LETTER])
    _write("baber/piqa", ["default"], train=[PHYSICAL], validation=[PHYSICAL])
    _write("lighteval/siqa", ["default"], train=[SOCIAL], validation=[SOCIAL])
    _write("Rowan/hellaswag", ["default"], train=[STORY], validation=[STORY])
    _write("openai/gsm8k", ["main"], train=[SUM] * 6, test=[SUM] * 2)
    _write("google-research-datasets/mbpp", ["full"], test=[CODE] * 2)
    Path("code_eval").mkdir()
    Path("code_eval/code_eval.py").write_text(CODE_EVAL)


def index_of_hub() -> TaskManager:
    """Return the harness's index of the tasks on these data sets alone: that of all takes many seconds to read."""
    names = "arc", "gsm8k", "hellaswag", "mbpp", "openbookqa", "piqa", "siqa"
    folder = Path(lm_eval.__file__).parent / "tasks"
    own = Path("tasks/mmlu")
    own.mkdir(parents=True, exist_ok=True)
    for file in (folder / "mmlu" / "default").iterdir():
        if file.name.startswith("_") or file.stem.removeprefix("mmlu_") in SUBJECTS:
            (own / file.name).write_text(file.read_text())
    paths = [*(folder / name for name in names), own]
    return TaskManager(include_path=[str(path) for path in paths], include_defaults=False)


def _write(name: str, configurations: list[str], **splits: list[dict[str, Any]]) -> None:
    folder = Path(name)
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    card = {"configs": [{"config_name": each, "data_files": files} for each in configurations]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")  # an alias for what repeats: quick to read
