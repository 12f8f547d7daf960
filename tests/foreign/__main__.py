"""Run all projects that are installed, and print their table: `python -m tests.foreign [WORD of a name]`."""

import logging
import sys
import traceback
import warnings
from importlib.metadata import PackageNotFoundError

from tests.foreign import basic, extra_pictures, extra_sequences, pictures
from tests.foreign.project import Project, measure


def row(project: Project) -> str:
    """Measure a project, and return its line of the table."""
    losses = gradient = "-"
    lines, note = str(project.lines), project.note
    try:
        errors = measure(project)
        losses, gradient = f"{errors.losses:.0e}", f"{errors.gradient:.0e}"
        note = f"NOT REFUSED. {note}" if project.refused else note
    except Exception as error:
        lines = "refused"
        if not project.refused or project.refused.split("|")[0] not in str(error):
            traceback.print_exc()
            note = f"FAILED: {type(error).__name__}: {error}"
    return f"| {project.package} | {project.version} | {project.name} | {lines} | {losses} | {gradient} | {note} |"


def main(word: str = "") -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for project in [p for part in (basic, pictures, extra_pictures, extra_sequences) for p in part.PROJECTS]:
        if word not in f"{project.package} {project.name}":
            continue
        try:
            project.version  # noqa: B018
        except PackageNotFoundError:
            continue
        rows.append(row(project))
        print(rows[-1], file=sys.stderr, flush=True)
    print(
        "| package | version | module and loss | lines | losses | gradient | note |\n|---|---|---|---:|---:|---:|---|"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
