"""The IDX files of MNIST and its kin (LeCun, Cortes and Burges: "The MNIST database of handwritten digits")."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ..training import BadInput
from .source import Array

UNSIGNED_BYTES = 0x08


def read(path: Path, num_dimensions: int) -> Array:
    """An array of bytes with this many dimensions, plain or gzipped.

    Raises BadInput for a wrong magic number or length. The header is two zero bytes, the type, the
    number of dimensions, and each dimension in four bytes, most significant first."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * num_dimensions)
            expected = bytes((0, 0, UNSIGNED_BYTES, num_dimensions))
            if header[:4] != expected:
                raise BadInput(
                    f"{path} starts with {header[:4].hex() or 'nothing'}, an IDX file of bytes in "
                    f"{num_dimensions} dimensions starts with {expected.hex()}"
                )
            if len(header) < 4 + 4 * num_dimensions:
                raise BadInput(f"{path} is truncated in its header")
            shape = struct.unpack(f">{num_dimensions}I", header[4:])
            data = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{path} is truncated or not a gzip archive: {error}") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) != math.prod(shape):
        raise BadInput(f"{path} should hold {shape} bytes, {math.prod(shape)} in all, and holds {len(data)}")
    return np.frombuffer(bytearray(data), dtype=np.uint8).reshape(shape)
