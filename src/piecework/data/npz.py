"""Archives of numpy arrays: .npz, read without pickle, large arrays mapped where they lie."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from ..training import BadInput
from .checks import some
from .source import Array

MAP_FROM = 256 * 1024 * 1024
"""Bytes from which an uncompressed array is mapped instead of read."""


def names(path: Path) -> list[str]:
    """The names of the arrays in an archive."""
    with _opened(path) as archive:
        return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]


def read(path: Path, wanted: Sequence[str], *, map_from: int = MAP_FROM) -> list[Array]:
    """The wanted arrays of an archive, which must be there.

    No array of Python objects is read, so nothing is unpickled. An array of at least `map_from` bytes that was saved
    without compression (`numpy.savez`) is mapped in place, copy on write; its start may lie at any byte, so its memory
    is not aligned as numpy's own is. Raises BadInput for what is truncated, damaged or no array."""
    with _opened(path) as archive:
        return [_array(path, archive, name, map_from) for name in wanted]


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, ValueError, struct.error) as error:
        raise BadInput(f"{path} is truncated or not an .npz archive: {error}") from error
    except NotImplementedError as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Header:
    """What a .npy file says about itself; size: bytes of the header."""

    shape: tuple[int, ...]
    by_column: bool
    dtype: np.dtype[np.generic]
    size: int


def _array(path: Path, archive: zipfile.ZipFile, name: str, map_from: int) -> Array:
    try:
        info = archive.getinfo(name + ".npy")
    except KeyError:
        raise BadInput(f"{path} has no array '{name}'; its arrays are {some(archive.namelist())}") from None
    try:
        with archive.open(info) as file:
            header = _header(file, path, name)
            num_bytes = math.prod(header.shape) * header.dtype.itemsize
            if num_bytes != info.file_size - header.size:
                raise BadInput(
                    f"{path}: array '{name}' of shape {header.shape} and type {header.dtype} needs {num_bytes} bytes "
                    f"and has {info.file_size - header.size}; the file is damaged"
                )
            if info.compress_type == zipfile.ZIP_STORED and num_bytes >= max(1, map_from):
                return _mapped(path, info, name, header, num_bytes)
            return _in_memory(file, path, name, header, num_bytes)
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
        raise BadInput(f"{path}: array '{name}' is truncated or damaged: {error}") from error
    except (NotImplementedError, RuntimeError) as error:  # an unknown compression, or an encrypted member
        raise BadInput(f"{path}: array '{name}' cannot be read: {error}") from error
    except MemoryError as error:
        raise BadInput(
            f"{path}: array '{name}' does not fit in memory; save it with numpy.savez, uncompressed"
        ) from error
    except OSError as error:
        raise BadInput(f"{path}: array '{name}' cannot be read: {error.strerror or error}") from error


def _header(file: IO[bytes], path: Path, name: str) -> _Header:
    try:
        version = npy.read_magic(file)
        if version == (1, 0):
            shape, by_column, dtype = npy.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, by_column, dtype = npy.read_array_header_2_0(file)
        else:
            raise BadInput(f"{path}: array '{name}' has .npy version {version}; save plain numbers")
    except BadInput:
        raise
    except (ValueError, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise BadInput(f"{path}: '{name}' is not a whole numpy array: {str(error).splitlines()[0]}") from error
    if dtype.hasobject:
        raise BadInput(
            f"{path}: array '{name}' holds Python objects, which are not read because reading them can run code; "
            "save numbers or text, for example numpy.savez(path, x=x.astype('float32'), y=y)"
        )
    return _Header(tuple(shape), bool(by_column), dtype, file.tell())


def _in_memory(file: IO[bytes], path: Path, name: str, header: _Header, num_bytes: int) -> Array:
    data = bytearray(num_bytes)
    view, done = memoryview(data), 0
    while done < num_bytes:
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise BadInput(f"{path}: array '{name}' ends after {done} of {num_bytes} bytes; the file is truncated")
        done += got
    file.read(1)  # so that the checksum of the whole member is compared
    array: Array = np.frombuffer(data, dtype=header.dtype) if num_bytes else np.empty(0, header.dtype)
    array = array.reshape(header.shape, order="F" if header.by_column else "C")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return np.ascontiguousarray(array) if array.ndim else array


def _mapped(path: Path, info: zipfile.ZipInfo, name: str, header: _Header, num_bytes: int) -> Array:
    """The array in the file itself: behind the member's local header (30 bytes, name, extra field) and its own."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
        length = file.seek(0, 2)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise BadInput(f"{path}: array '{name}' has no local header; the file is damaged")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    offset = info.header_offset + 30 + name_length + extra_length + header.size
    if offset + num_bytes > length:
        raise BadInput(f"{path}: array '{name}' ends beyond the end of the file; the file is truncated")
    mapped: Array = np.memmap(
        path, header.dtype, mode="c", offset=offset, shape=header.shape, order="F" if header.by_column else "C"
    )
    return mapped
