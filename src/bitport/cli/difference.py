"""The command that holds two artifacts of one network side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .commands import as_json_option, cli
from .run import Outcome, run, terminal

if TYPE_CHECKING:
    from ..progress import Progress

_FOLDER = click.Path(path_type=Path)


@cli.command(short_help="Layer by layer, where two artifacts of one network part.")
@click.argument("first", metavar="DIR_A", type=_FOLDER)
@click.argument("second", metavar="DIR_B", type=_FOLDER)
@click.option("--data", metavar="D", help="Inputs to compare on; default: the golden sample of DIR_A.")
@as_json_option
def diff(first: Path, second: Path, data: str | None, as_json: bool) -> None:
    """Compare the artifacts DIR_A and DIR_B of one network, layer by layer; their recipes and targets may differ.

    Each layer's values are held against the float network's, and against each other. Both folders stay as they are.
    """

    def work(progress: Progress) -> Outcome:
        from ..difference import diff as compared

        found = compared(first, second, data, progress=progress).record
        return Outcome(found, lambda: terminal().difference(found))

    run(work, as_json)
