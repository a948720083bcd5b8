"""Sizes as people write them: ``20G``, ``512 MiB``, ``16Gi``."""

from __future__ import annotations

import re

from accel.errors import AccelError, InputError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?(?:([kmgt])(i?))?b?")
REMEDY = "Write bytes, or a size such as 500M, 2.5GB, 16GiB"


def parse_size(value: int | str, where: str, *, least: int = 0, error: type[AccelError] = InputError) -> int:
    """Bytes of a size: K, M, G and T are powers of 1000, Ki to Ti of 1024; a B may follow. A number is bytes.

    Args:
        value: What somebody wrote.
        where: For the error.
        least: The smallest size that means something here.
        error: What to raise.

    Raises:
        error: It is no size, or smaller than ``least``.
    """
    found = None if isinstance(value, bool) else _SIZE.fullmatch(str(value).strip().lower())
    if found is None:
        raise error(f"{value!r} is no size", where=where, remedy=REMEDY)
    number, unit, binary = found.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))
    if size < least:
        raise error(f"{value!r} is less than {least} bytes", where=where, remedy=REMEDY)
    return size


__all__ = ["parse_size"]
