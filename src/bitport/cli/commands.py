"""The commands: what each asks for, and which function of `bitport.api` answers.

Only click is imported here: `--help` must not wait for torch.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..errors import BitportError, LoadError
from .listings import LISTINGS
from .run import DEBUG, ERROR, GATE, HOLDS, Outcome, measured, run, terminal

if TYPE_CHECKING:
    from ..progress import Progress

_CALLABLE = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


# ---------------------------------------------------------------------------------------------- commands

as_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
_nonfinite = click.option(
    "--nonfinite",
    type=click.Choice(["refuse", "zero"]),
    default="refuse",
    help="Weights that are NaN or infinite: refuse them (default), or set them to zero and say so.",
)
folder_argument = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _, asked: _version(ctx) if asked else None,
    help="Show the version and exit.",
)
def cli() -> None:
    """Compress a trained network, move it to an integer runtime, and prove the result there.

    MODEL is a file (.pt2, .onnx, .keras, .tflite), a SavedModel folder or module:callable returning (model,
    example_inputs); data is a file (.npz), a folder of images by class, or module:callable returning an iterable of
    batches.

    Exit codes: 0 holds, 1 error, 2 usage, 3 a gate failed or is undecided, 75 interrupted (run again).
    """


@cli.command(short_help="Layers, MACs, and what a target would run in integers.")
@click.argument("model")
@click.option("--target", metavar="T", help="Runtime: also tell what it would run in integers.")
@_nonfinite
@as_json_option
def inspect(model: str, target: str | None, nonfinite: str, as_json: bool) -> None:
    """Layers, parameters, MACs; what a target would run in integers, and the speed to expect."""

    def work(progress: Progress) -> Outcome:
        from .. import api

        found = api.inspect(_load(model, progress, nonfinite), target=target)
        return Outcome(found, lambda: terminal().inspection(found))

    run(work, as_json)


@cli.command(short_help="Compress a network and prove the result.")
@click.argument("model")
@click.option("--target", required=True, metavar="T", help="Runtime that the network is for.")
@click.option(
    "--recipe", required=True, metavar="R", help="Preset (see 'bitport list recipes') or .toml file."
)
@click.option(
    "--data",
    required=True,
    metavar="D",
    help="Calibration data; labels are ignored. 'synthetic': inputs are made up, as a last resort.",
)
@click.option("--train", metavar="D", help="Training data, for recipes that train.")
@click.option("--eval", "evaluation", metavar="D", help="Evaluation data: decides whether the result holds.")
@click.option(
    "--metric", metavar="M", help="Metric (see 'bitport list metrics'); top1:NAME for one output of several."
)
@click.option(
    "--max-drop",
    type=float,
    metavar="X",
    help="Largest loss allowed, in the metric's unit (top1: 0.01 is a point).",
)
@click.option("--effort", metavar="E", help="plain, fast (default), balanced or best.")
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Artifact folder.")
@_nonfinite
@as_json_option
def compress(
    model: str,
    target: str,
    recipe: str,
    data: str,
    train: str | None,
    evaluation: str | None,
    metric: str | None,
    max_drop: float | None,
    effort: str | None,
    out: Path,
    nonfinite: str,
    as_json: bool,
) -> None:
    """Compress MODEL, run it on the target, and write the artifact with its proof to DIR.

    A result that misses its gate leaves DIR as it was and goes to DIR.rejected (exit code 3).
    """
    check_limit(max_drop)

    def work(progress: Progress) -> Outcome:
        from .. import api

        api.prepare(recipe, target, effort)  # a wrong name is told before a large network is loaded
        graph = _load(model, progress, nonfinite)
        api.compress(
            graph,
            recipe,
            target=target,
            data=data,
            train=train,
            evaluation=evaluation,
            metric=metric,
            max_drop=max_drop,
            out=out,
            effort=effort,
            progress=progress,
        )
        return measured(read_record(out), out)

    run(work, as_json)


@cli.command(short_help="Measure an artifact again, or judge a device's outputs.")
@folder_argument
@click.option("--data", metavar="D", help="Evaluation data; default: the artifact's own golden sample.")
@click.option("--metric", metavar="M", help="Metric on that data; default: the artifact's own.")
@click.option("--target", metavar="T", help="Another runtime than the artifact's.")
@click.option(
    "--outputs",
    metavar="NPZ",
    type=click.Path(path_type=Path),
    help="Run nothing: judge what a device made of the inputs in DIR/sample.npz.",
)
@as_json_option
def verify(
    folder: Path,
    data: str | None,
    metric: str | None,
    target: str | None,
    outputs: Path | None,
    as_json: bool,
) -> None:
    """Run the artifact in DIR again on this machine and measure it against its float network. DIR stays as it is.

    With --outputs nothing is run: the .npz holds an array output.<name> for each output, made on a device from
    the arrays input.<name> of DIR/sample.npz. Exit code 3 when they differ by more than two steps.
    """
    if outputs is not None and (data or metric or target):
        raise click.UsageError("--outputs is judged by the golden sample alone: leave out the other options")

    def work(progress: Progress) -> Outcome:
        from .. import api

        if outputs is not None:
            record = _as_mapping(api.verify(folder, outputs=outputs))
            return Outcome(
                record, lambda: _draw_outputs(record), HOLDS if record["verdict"]["passed"] else GATE
            )
        record = _as_mapping(api.verify(folder, data=data, metric=metric, target=target, progress=progress))
        return measured(record, folder, again=True)

    run(work, as_json)


@cli.command(short_help="Write the report.html of an artifact.")
@folder_argument
@as_json_option
def report(folder: Path, as_json: bool) -> None:
    """Write DIR/report.html from the records in DIR, and print its path."""

    def work(progress: Progress) -> Outcome:
        from .. import api

        path = api.report(folder)
        return Outcome({"report": str(path)}, lambda: click.echo(str(path)))

    run(work, as_json)


@cli.command(name="list")
@click.argument("kind", type=click.Choice(list(LISTINGS)))
@as_json_option
def list_(kind: str, as_json: bool) -> None:
    """Names that recipes and flags may use."""

    def work(progress: Progress) -> Outcome:
        found = LISTINGS[kind]()
        return Outcome({kind: found}, lambda: terminal().listing(kind, found))

    run(work, as_json)


@cli.command(short_help="See it work on handwritten digits.")
@click.option(
    "--out",
    default="out/demo",
    show_default=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder.",
)
@as_json_option
def demo(out: Path, as_json: bool) -> None:
    """Train a small net on handwritten digits, compress it to int8, prove it on ONNX Runtime."""

    def work(progress: Progress) -> Outcome:
        from .. import demo

        demo.run(out=out, progress=progress)
        return measured(read_record(out), out)

    run(work, as_json)


# ---------------------------------------------------------------------------------------- what they need


def _version(context: click.Context) -> NoReturn:
    try:
        found = metadata.version("bitport")
    except metadata.PackageNotFoundError:  # a source tree on the path
        found = "(not installed)"
    click.echo(f"bitport {found}")
    context.exit()


def _load(spec: str, progress: Progress, nonfinite: str) -> Any:
    """The graph of MODEL: a path, or `module:callable` looked up from the current folder."""
    from .. import api

    with progress.task(f"load {spec}"):
        given = (spec,) if Path(spec).exists() or not _CALLABLE.fullmatch(spec) else _call(spec)
        return api.load(*given, nonfinite=nonfinite)


def _call(spec: str) -> tuple[Any, Any]:
    """(model, example_inputs) from `module:callable`. Raises LoadError when that doesn't give them."""
    module_name, _, attribute = spec.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
        made = value()
    except BitportError:
        raise
    except (Exception, SystemExit) as error:
        raise LoadError(
            f"{spec!r} could not be called ({type(error).__name__}: {error}): it must name a function that "
            f"can be imported from the current folder and takes no arguments; {DEBUG}=1 shows the traceback"
        ) from error
    if not isinstance(made, tuple) or len(made) != 2:
        raise LoadError(f"{spec!r} returned {type(made).__name__}: return (model, example_inputs)")
    return made


def check_limit(max_drop: float | None) -> None:
    """Raise BadParameter for a limit that is no number."""
    if max_drop is not None and not math.isfinite(max_drop):
        raise click.BadParameter("must be a finite number", param_hint="--max-drop")


def read_record(folder: Path) -> Mapping[str, Any]:
    """The measurement record of an artifact."""
    from .. import records

    return _as_mapping(records.load(folder / "measurements.json"))


def _as_mapping(record: Any) -> Mapping[str, Any]:
    return record if isinstance(record, Mapping) else record.record


def _draw_outputs(record: Mapping[str, Any]) -> None:
    """Each output of a device: its verdict, and how far it is from what."""
    from .. import wording

    steps = {"scale": "of its scale", "range": "1/255 of its range", "integers": "an integer"}
    for row in record["outputs"]:
        verdict = {"equal": "equal", "within": f"within {row['max_steps']} steps", "differs": "differs"}
        click.echo(f"{wording.plain(row['name'])}: {verdict[row['verdict']]}")
        said = f"largest difference {row['max_abs_difference']:.4g}, {wording.count(row['max_steps'])} steps"
        click.echo(f"  from golden     {said} (a step is {row['step']:.4g}, {steps[row['step_of']]})")
        click.echo(f"  from simulated  largest difference {row['max_abs_difference_simulated']:.4g}")
        said = f"largest difference {row['max_abs_difference_float']:.4g}, SQNR {wording.decibel(row['sqnr_float_db'])}"
        click.echo(f"  from float      {said} (golden: {wording.decibel(row['golden_sqnr_float_db'])})")
        if row["top1_agreement"] is not None:
            shares = [wording.percent(row[key]) for key in ("top1_agreement", "top1_agreement_float")]
            click.echo(f"  same top class  {shares[0]} as golden, {shares[1]} as float")
    click.echo()
    click.echo(
        f"{'✓' if record['verdict']['passed'] else '✗'} {wording.plain(record['verdict']['sentence'], 1000)}"
    )


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Entry point of the `bitport` command."""
    # set before torch is imported: threads that spin while they wait make a busy machine three times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets "?" instead of a crash
    if not sys.warnoptions:
        # what torch and onnx tell their own developers
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", module=r"(torch|onnx|copyreg)")
    sys.path.insert(0, os.getcwd())  # module:callable is looked up where the user stands
    try:
        cli.main(prog_name="bitport")
    except BrokenPipeError:
        os._exit(ERROR)
    sys.exit(HOLDS)
