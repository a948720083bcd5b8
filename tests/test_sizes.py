"""Sizes as people write them."""

from __future__ import annotations

import pytest

from accel.errors import InputError, RecipeError
from accel.sizes import parse_size


@pytest.mark.parametrize(
    ("value", "size"),
    [("0", 0), ("512", 512), (512, 512), ("500M", 500_000_000), ("2.5GB", 2_500_000_000), ("1k", 1000),
     ("2GiB", 2 << 30), ("1.5 Gi", 3 << 29), ("16Gi", 16 << 30), (" 3t ", 3 * 10**12), ("12b", 12)],
)  # fmt: skip
def test_sizes(value: int | str, size: int) -> None:
    assert parse_size(value, "memory") == size


@pytest.mark.parametrize("value", ["", "much", "-1", -1, "1e3", "nan", "inf", "5x", "4GX", "G", "1ib", "٣", True])
def test_what_is_no_size(value: int | str) -> None:
    with pytest.raises(InputError, match="is no size.*at memory.*500M"):
        parse_size(value, "memory")


def test_the_least_size() -> None:
    with pytest.raises(RecipeError, match="'0' is less than 1 bytes .at workspace"):
        parse_size("0", "workspace", least=1, error=RecipeError)
