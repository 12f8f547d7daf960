"""The parts of a page, as the template takes them.

In: text, charts, samples. Out: `Section`. Next: `run_page.py`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from flow_lightning.report.page.charts import Chart


class Table(NamedTuple):
    """A table; `classes` has the class of each row for a filter, if there is one."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    classes: list[str] = []


@dataclass
class Section:
    """A part of the page: sentences, charts, cards of samples, tables; `group` is what a filter goes by."""

    title: str
    text: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    cards: list[dict[str, Any]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    group: Literal["class", "source"] = "class"


def percent(value: float) -> str:
    """Write a share in percent."""
    return f"{100 * value:.1f}\u00a0%"
