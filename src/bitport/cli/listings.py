"""What `bitport list` tells: names for recipes and flags, each with one line, read from where they are made."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..formats import Format

Listing = dict[str, Any]
_SAMPLES = (
    *("int8", "int8n", "uint8", "int16", "int4", "int2", "int[-16,15]"),
    *("e4m3", "e5m2", "e2m1", "log2(4)", "codebook(16)"),
)
_FORMS: Mapping[str, str] = {
    "intN, intNn, uintN": "N = 1 … 32 bits; intNn is narrow (without the lowest code); uintN: N = 1 … 16",
    "int[LOW,HIGH]": "any range of integers, both ends included",
    "eXmY": "a small float of X exponent and Y mantissa bits, X = 1 … 8, Y = 0 … 10",
    "log2(N)": "N = 2 … 8 bits: a sign and a power of two, or 0",
    "codebook(N)": "N = 2 … 256 values that are learned from the tensor",
}
_SHARED: Mapping[str, str] = {
    "global": "one scale for all weights, or all activations, of the network",
    "tensor": "one scale per tensor",
    "channel": "one scale per output channel; channel(AXIS) per index of another axis",
    "group": "one scale per SIZE consecutive values of a channel: group(SIZE), group(SIZE,AXIS)",
}
_STORED: Mapping[str, str] = {
    "float32": "32 bits; the default",
    "float16": "16 bits",
    "bfloat16": "16 bits",
    "e8m0": "8 bits: powers of two (OCP MX)",
    "e4m3": "8 bits, beside one float32 for the tensor (NVFP4)",
}


def _targets() -> Listing:
    from .. import api

    return dict(api.targets())


def _recipes() -> Listing:
    from .. import api
    from ..forecast import ways
    from ..recipe import Recipe

    runtimes = [name for name, found in api.targets().items() if found["available"]]
    return {
        name: {"summary": summary, "targets": ways(Recipe.preset(name), runtimes)}
        for name, summary in Recipe.presets().items()
    }


def _steps() -> Listing:
    from .. import registry

    return {name: {"summary": registry.summary("steps", name)} for name in registry.names("steps")}


def _formats() -> Listing:
    """Names that can be written as they are, then the forms that have numbers in them, then the options."""
    from ..formats import ALIASES, FLOATS, GRANULARITIES, SCALES, TABLES, Format

    found: Listing = {}
    for name in dict.fromkeys((*_SAMPLES, *TABLES, *ALIASES, *FLOATS)):
        fmt = Format.parse(name)
        found[name] = {"summary": _format(fmt), "bits": fmt.bits, "kind": fmt.kind}
    found |= {form: {"summary": text} for form, text in _FORMS.items()}
    found["symmetric"] = {
        "summary": "option: the zero point is fixed, at 0 or at the centre of codes from 0 on"
    }
    found["bits(N)"] = {"summary": "option: stored in N bits, more than the codes need"}
    found |= {shared: {"summary": f"option: {_SHARED[shared]}"} for shared in GRANULARITIES}
    found |= {f"scale({name})": {"summary": f"option: a scale takes {_STORED[name]}"} for name in SCALES}
    return found


def _format(fmt: Format) -> str:
    return f"{''.join(_words(fmt))}, stored in {fmt.bits} bit{'' if fmt.bits == 1 else 's'}"


def _words(fmt: Format) -> Iterator[str]:
    if fmt.is_int:
        yield f"{fmt.low} … {fmt.high}"
    elif fmt.is_float:
        yield f"floating point of {fmt.exponent} exponent and {fmt.mantissa} mantissa bits"
    elif fmt.kind == "log2":
        yield "0 and powers of two of either sign"
    else:
        yield f"{fmt.size} values {'learned from the tensor' if fmt.table == 'learned' else 'of a fixed table'}"
    if fmt.granularity == "group":
        yield f" with a scale in {fmt.scale} per {fmt.group} values"


def _ranges() -> Listing:
    from ..numerics import ranges

    return {name: {"summary": summary} for name, summary in ranges.known().items()}


def _metrics() -> Listing:
    from .. import metrics

    return {name: {"summary": summary} for name, summary in metrics.known().items()}


def _criteria() -> Listing:
    # pruning criteria are the public functions of one file; a version without pruning has none
    if find_spec("bitport.numerics.importance") is None:
        return {}
    known = importlib.import_module("bitport.numerics.importance").known()
    return {name: {"summary": summary} for name, summary in known.items()}


LISTINGS: Mapping[str, Callable[[], Listing]] = {
    "targets": _targets,
    "recipes": _recipes,
    "steps": _steps,
    "formats": _formats,
    "ranges": _ranges,
    "metrics": _metrics,
    "criteria": _criteria,
}
