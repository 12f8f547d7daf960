import operator
import re

from flow_lightning.data.instructions.records import read_records
from flow_lightning.quickstart.arithmetic import word_problems


def test_every_calculation_is_right():
    for record in word_problems(500, seed=0):
        steps = re.findall(r"(\d+) ([*+/-]) (\d+) = (\d+)", record["response"])
        assert len(steps) == 2
        for left, sign, right, result in steps:
            calculate = {"*": operator.mul, "+": operator.add, "-": operator.sub, "/": operator.truediv}[sign]
            assert calculate(int(left), int(right)) == int(result)
        assert record["response"].endswith(f"#### {steps[1][3]}")
        numbers = re.findall(r"\d+", record["query"])
        assert steps[0][0] in numbers and steps[0][2] in numbers


def test_splits_differ_and_stay():
    splits = ("train", "test", "train")
    train, test, again = (read_records("generated:arithmetic:200", split, ["query", "response"]) for split in splits)
    assert train == again and train[:20] != test[:20] and len({record["query"] for record in train}) > 190
