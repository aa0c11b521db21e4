"""The command that looks for what costs an artifact most, and tries what helps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .commands import as_json_option, cli, folder_argument
from .run import Outcome, run, terminal

if TYPE_CHECKING:
    from ..progress import Progress


@cli.command(short_help="Find the layers that cost most, try remedies, write a better recipe.")
@folder_argument
@click.option("--data", required=True, metavar="D", help="Calibration data; labels are ignored.")
@click.option("--eval", "evaluation", metavar="D", help="Data that confirms what was chosen on the other.")
@click.option("--metric", metavar="M", help="Metric on --eval (see 'bitport list metrics').")
@click.option(
    "--top", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Layers to treat."
)
@click.option(
    "--out",
    metavar="FILE.toml",
    type=click.Path(path_type=Path),
    help="New file for the recipe; default: DIR-doctor.toml beside DIR.",
)
@as_json_option
def doctor(
    folder: Path,
    data: str,
    evaluation: str | None,
    metric: str | None,
    top: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Rank the layers of the artifact DIR by what they cost, and try remedies for the worst on its runtime.

    What is worth its cost becomes a recipe that 'bitport compress' runs as it is, written once it is confirmed
    on data that it wasn't chosen by. DIR stays as it is; where nothing helps, nothing is written.
    """
    if metric is not None and evaluation is None:
        raise click.UsageError("--metric needs --eval: it is of that data")
    if out is not None and out.suffix != ".toml":
        raise click.BadParameter(f"{str(out)!r} must end in .toml", param_hint="--out")

    def work(progress: Progress) -> Outcome:
        from .. import doctor

        found = doctor.diagnose(
            folder, data, evaluation=evaluation, metric=metric, top=top, out=out, progress=progress
        )
        return Outcome(found.record, lambda: terminal().diagnosis(found.record))

    run(work, as_json)
