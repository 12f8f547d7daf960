"""From a directory to one HTML file, and the command `report`.

In: a run's directory or a board's folder. Out: `report.html`. Next: `page.html`, the template.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flow_lightning.configurations import OptionError, Parser
from flow_lightning.files import write_bytes
from flow_lightning.report.page import charts
from flow_lightning.report.page.board_page import board_sections, configuration, is_board
from flow_lightning.report.page.files import read_run
from flow_lightning.report.page.run_page import sections

_HERE = Path(__file__).parent


def write_page(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a run or a board, by default as `report.html` in its folder, and return its path.

    Raises:
        OptionError: If there is no such folder, or neither a run nor a board in it.
    """
    path = folder / "report.html" if output is None else output
    write_bytes(path, page(folder).encode("utf-8", "replace"))
    return path


def page(folder: Path) -> str:
    """Return the HTML of a run or a board."""
    if not folder.is_dir():
        raise OptionError(f"{folder} is no folder. Give the directory of a run, or the folder of a board.")
    if is_board(folder):
        parts, missing = board_sections(folder)
        words, kind = configuration(folder), "board"
    else:
        run = read_run(folder)
        if not (run.metrics or run.weights or run.evidence.tensors or run.issues):
            runs = sorted({file.parent for file in folder.rglob("metrics.json")})
            hint = f"Did you mean {runs[-1]}?" if runs else "A run writes metrics.json there."
            raise OptionError(f"{folder} holds neither a run nor a board. {hint}")
        parts, missing, words, kind = list(sections(run)), run.missing, run.configuration, "run"
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = charts.visible
    source, style = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        title=_title(folder), kind=kind, place=str(folder), sections=parts, missing=missing, configuration=words,
        script=Markup(source), script_hash=digest, style=Markup(style),
    )  # fmt: skip


def _title(folder: Path) -> str:
    """Return the last folders of a path, which name a run, without those that all runs have."""
    return " / ".join([part for part in folder.resolve().parts[1:] if part != "lightning_logs"][-3:])


def command(words: Sequence[str]) -> None:
    """Run `flow-lightning report DIRECTORY [--output FILE]`."""
    parser = Parser(usage="flow-lightning report DIRECTORY [--output FILE]", add_help=False)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--output", type=Path)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"report does not know {unknown[0]}")
    path = write_page(options.directory, options.output)
    print(f"Report: {path.absolute()}")
