"""The commands for an artifact whose float network is gone: `requantize` and `dequantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .commands import as_json_option, check_limit, cli, folder_argument, read_record
from .run import Outcome, measured, run, shown

if TYPE_CHECKING:
    from ..progress import Progress


@cli.command(short_help="Store an artifact in other formats, without its original.")
@folder_argument
@click.option(
    "--recipe", required=True, metavar="R", help="Preset (see 'bitport list recipes') or .toml file."
)
@click.option("--data", required=True, metavar="D", help="Calibration data; labels are ignored.")
@click.option("--target", metavar="T", help="Another runtime than the artifact's.")
@click.option("--eval", "evaluation", metavar="D", help="Evaluation data: decides whether the result holds.")
@click.option("--metric", metavar="M", help="Metric on that data (see 'bitport list metrics').")
@click.option(
    "--max-drop", type=float, metavar="X", help="Largest further loss allowed, in the metric's unit."
)
@click.option("--effort", metavar="E", help="plain, fast (default), balanced or best.")
@click.option(
    "--out", required=True, metavar="DIR2", type=click.Path(path_type=Path), help="Artifact folder."
)
@as_json_option
def requantize(
    folder: Path,
    recipe: str,
    data: str,
    target: str | None,
    evaluation: str | None,
    metric: str | None,
    max_drop: float | None,
    effort: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Store the network of the artifact DIR in the formats of another recipe, as the artifact DIR2.

    The float original isn't needed: weights start from the numbers that DIR holds, so every loss that is
    measured comes on top of DIR's own, which the record repeats.
    """
    check_limit(max_drop)

    def work(progress: Progress) -> Outcome:
        from .. import recover

        recover.requantize(
            folder,
            recipe,
            data=data,
            out=out,
            target=target,
            evaluation=evaluation,
            metric=metric,
            max_drop=max_drop,
            effort=effort,
            progress=progress,
        )
        return measured(read_record(out), out)

    run(work, as_json)


@cli.command(short_help="Write an artifact's network as floats again.")
@folder_argument
@click.option("--data", metavar="D", help="Data like that of the calibration, to correct the layers with.")
@click.option("--no-correct", is_flag=True, help="The numbers as they are stored; needs no data.")
@click.option(
    "--out", required=True, metavar="FILE.pt2", type=click.Path(path_type=Path), help="New file to write."
)
@as_json_option
def dequantize(folder: Path, data: str | None, no_correct: bool, out: Path, as_json: bool) -> None:
    """Write the network of the artifact DIR as a float network, which 'bitport compress' takes again.

    With --data each layer gets the mean and the deviation per channel that the float network had. A file
    that is there already is never replaced.
    """
    if no_correct == (data is not None):
        raise click.UsageError("give --data to correct the layers, or --no-correct; one of the two")
    if out.suffix != ".pt2":
        raise click.BadParameter(f"{str(out)!r} must end in .pt2", param_hint="--out")

    def work(progress: Progress) -> Outcome:
        from .. import recover, store
        from ..graph.archive import save_pt2

        with store.new_file(out) as place:
            graph = recover.dequantize(folder, data, correct=not no_correct, progress=progress)
            save_pt2(graph, place)
        document = {
            "model": str(out),
            "bytes": out.stat().st_size,
            "parameters": sum(p.numel() for p in graph.gm.parameters()),
            "corrected": not no_correct,
            "notes": list(graph.notes),
        }
        return Outcome(document, lambda: click.echo(shown(out)))

    run(work, as_json)
