"""Data as bitport reads it: checked, re-iterable streams of batches, from Python objects or from files."""

from bitport.data.batch import Batch, InputLike, check_inputs, to_flat
from bitport.data.files import open_data, read_arrays
from bitport.data.images import Preprocessing
from bitport.data.source import Source

__all__ = [
    "Batch",
    "InputLike",
    "Preprocessing",
    "Source",
    "check_inputs",
    "open_data",
    "read_arrays",
    "to_flat",
]
