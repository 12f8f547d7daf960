"""Word problems made by a program: a small task for a first try, with answers that can be checked.

In: a number and a seed. Out: records of question and answer. Next: `data/instructions/records.py`.
"""

from random import Random

_NAMES = ("Ada", "Ben", "Chloe", "Dev", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leo")
_THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "tickets", "tiles")


def word_problems(count: int, seed: int) -> list[dict[str, str]]:
    """Make records of `query` and `response`: a line for each of two steps, then `#### result`, as in GSM8K."""
    draw, records = Random(seed), []
    for _ in range(count):
        problem = draw.choice((_buys, _shares, _sells))
        query, first, second, result = problem(draw, draw.choice(_NAMES), draw.choice(_THINGS))
        records.append({"query": query, "response": f"{first}\n{second}\n#### {result}"})
    return records


def _buys(draw: Random, name: str, thing: str) -> tuple[str, str, str, int]:
    had, boxes, each = draw.randint(2, 40), draw.randint(2, 9), draw.randint(2, 12)
    return (
        f"{name} has {had} {thing} and buys {boxes} boxes with {each} {thing} each. "
        f"How many {thing} does {name} have now?",
        f"The boxes hold {boxes} * {each} = {boxes * each} {thing}.",
        f"Together that is {had} + {boxes * each} = {had + boxes * each} {thing}.",
        had + boxes * each,
    )


def _shares(draw: Random, name: str, thing: str) -> tuple[str, str, str, int]:
    friends, each, kept = draw.randint(2, 9), draw.randint(2, 12), draw.randint(1, 20)
    total = friends * each + kept
    return (
        f"{name} has {total} {thing}, keeps {kept} of them and shares the rest equally among {friends} friends. "
        f"How many {thing} does each friend get?",
        f"There are {total} - {kept} = {total - kept} {thing} to share.",
        f"Each friend gets {total - kept} / {friends} = {each} {thing}.",
        each,
    )


def _sells(draw: Random, name: str, thing: str) -> tuple[str, str, str, int]:
    sold, price, spent = draw.randint(3, 20), draw.randint(2, 9), draw.randint(1, 6)
    return (
        f"{name} sells {sold} {thing} for {price} dollars each and spends {spent} dollars. How many dollars are left?",
        f"{name} earns {sold} * {price} = {sold * price} dollars.",
        f"There are {sold * price} - {spent} = {sold * price - spent} dollars left.",
        sold * price - spent,
    )
