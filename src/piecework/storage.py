"""Reading and writing the files of a run: no link is followed, and no file is ever half replaced."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from .training import BadInput

JSON_LIMIT = 16 * 2**20
"""Bytes of the largest recipe or summary that is read."""

HISTORY_LIMIT = 2**30
"""Bytes of the longest history that is read."""

_BLOCK = 64 * 2**20


def is_there(path: Path) -> bool:
    """Whether there is anything of this name, a dangling link included."""
    return os.path.lexists(path)


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The content of a regular file. Raises BadInput if it is missing, a link, a device, or has more bytes."""
    try:
        about = os.lstat(path)
        if not stat.S_ISREG(about.st_mode):
            raise BadInput(f"{path} is not an ordinary file (a link, a folder or a device), so it is not read")
        if limit is not None and about.st_size > limit:
            raise BadInput(f"{path} has {about.st_size} bytes; at most {limit} are read")
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return file.read() if limit is None else file.read(limit)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except MemoryError:
        raise BadInput(f"{path} is larger than the memory") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Make a new file and wait until it is on the disk. Something of that name, a link too, is removed first."""
    try:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view[:_BLOCK]) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error


def replace_bytes(path: Path, content: bytes) -> None:
    """Give the file a new content, in such a way that a reader, or a killed writer, leaves the old or the new one."""
    new = path.with_name(path.name + ".part")
    write_bytes(new, content)
    rename(new, path)


def rename(old: Path, new: Path) -> None:
    """Give a file another name, in place of what had it."""
    try:
        os.replace(old, new)
    except OSError as error:
        raise BadInput(f"{new} cannot be replaced: {error.strerror}") from error


def settle(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written: {error.strerror}") from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a file and hand it to the system, so that it outlives this process."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o644), "ab") as file:
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error


def parse_json(content: bytes | str, path: Path) -> Any:
    """The value of a JSON text, without NaN and infinity, which JSON does not have. Raises BadInput naming the file."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not readable JSON ({str(error)[:100] or type(error).__name__})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a small file. Raises BadInput naming the file."""
    value = parse_json(read_bytes(path, JSON_LIMIT), path)
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds a JSON {type(value).__name__} where an object belongs")
    return value


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as a file that a person can read."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot hold this: {error}") from None
    replace_bytes(path, text.encode() + b"\n")
