"""Text that a user gives in a file: passages between blank lines, for calibration and for measuring."""

from __future__ import annotations

import json
import re
from pathlib import Path

from accel.errors import InputError

MAX_TEXT_BYTES = 256 << 20
CHARACTERS = 64  # per token, at most: the rest of a very long passage is not even tokenized


def read_passages(path: Path, name: str) -> tuple[str, ...]:
    """The passages of a UTF-8 file, in order; none is empty, but there may be none.

    Args:
        path: The file.
        name: What it is for, in messages: ``the calibration text``.

    Raises:
        InputError: It cannot be read, is larger than 256 MiB, no UTF-8, binary, or JSON.
    """
    text = _read(path, name)
    where = str(path)
    if "\0" in text:
        remedy = "Give plain text, with blank lines between passages"
        raise InputError(f"{name} is binary: it holds null characters", where=where, remedy=remedy)
    if _is_json(text):
        remedy = "Write the texts themselves, with blank lines between them; in Python, give a list of passages"
        raise InputError(f"{name} is JSON, whose brackets and keys are no text", where=where, remedy=remedy)
    return split_passages(text)


def split_passages(text: str) -> tuple[str, ...]:
    """What stands between blank lines."""
    parts = re.split(r"\n[^\S\n]*\n", text.replace("\r\n", "\n"))
    return tuple(part.strip() for part in parts if part.strip())


def _read(path: Path, name: str) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise InputError(f"{name} is larger than 256 MiB", where=str(path), remedy="Take a part of it")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8", where=str(path), remedy="Convert the file") from error
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        remedy = "Check the path; a text itself goes into a file or a list"
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name} cannot be read: {reason}", where=str(path), remedy=remedy) from error


def _is_json(text: str) -> bool:
    """Whether all of it is one JSON array or object, or its first line an object (JSON Lines)."""
    start = text.lstrip()
    if not start.startswith(("[", "{")):
        return False
    return isinstance(_parsed(start.partition("\n")[0]), dict) or isinstance(_parsed(start), dict | list)


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


__all__ = ["CHARACTERS", "MAX_TEXT_BYTES", "read_passages", "split_passages"]
