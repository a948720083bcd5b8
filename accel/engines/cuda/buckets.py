"""Sizes that steps are padded up to, so that a recorded run serves many."""

from __future__ import annotations

_ROUGH = 256  # tokens up to which a product takes about as long as one of twice as many: it reads the weights


def power_of_two(size: int) -> int:
    """The least that is no smaller."""
    return 1 << max(0, size - 1).bit_length()


def token_bucket(count: int) -> int:
    """Tokens of a step: up to 256 powers of two, then four sizes from one of these to the next, a tenth more each."""
    size = power_of_two(count)
    step = size if count <= _ROUGH else size // 8
    return -(-count // step) * step


__all__ = ["power_of_two", "token_bucket"]
