from __future__ import annotations

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.gather import TOLERANCES, gather, reference  # noqa: E402
from accel_kernels.tiles import LAYER_NORM, RMS_NORM  # noqa: E402


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("size", [24, 300])
@pytest.mark.parametrize("ids_type", ["int32", "int64"])
def test_agrees_with_the_reference(make: Maker, ids_type: str, size: int, together: bool) -> None:
    """Five rows: the last program that takes several has places for more."""
    table, ids = make.normal(50, size), make.ints(3, 49, 0, 3, 7, dtype=getattr(torch, ids_type))
    for dtype in (make.dtype, torch.float32):
        room = make.poison(8, size, dtype=dtype)
        out = room[:5]
        assert gather(table, ids, out, together=together) is out
        assert_close(out, reference(table, ids), 0.0)
        assert room[5:].isnan().all(), "rows behind the end were written"


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("turns", [1, 3])
def test_rows_on_top_of_others(make: Maker, turns: int, together: bool) -> None:
    """The ids are used over and over."""
    table, ids = make.normal(50, 24), make.ints(3, 49, 0, 3)
    added = make.normal(4 * turns, 24, dtype=torch.float32)
    expected = reference(table, ids, added.clone())
    assert gather(table, ids, added, added=added, together=together) is added
    assert_close(added, expected, 1e-7)


def test_no_ids_are_no_rows(device: object) -> None:
    make = Maker(device)
    assert gather(make.normal(5, 8), make.ints(), make.poison(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("with_added", [False, True])
def test_rows_of_several_tables(make: Maker, with_added: bool, together: bool) -> None:
    """Each table's ids are used over and over."""
    word, position, segment = make.normal(50, 24), make.normal(9, 24), make.normal(2, 24)
    ids, slots, kinds = make.ints(3, 49, 0, 3, 7, 1), make.ints(4, 5, 8), make.ints(0, 1, dtype=torch.int64)
    added = make.normal(6, 24, dtype=torch.float32) if with_added else None
    out = make.poison(6, 24, dtype=torch.float32)
    for also in ({"second": (position, slots)}, {"second": (position, slots), "third": (segment, kinds)}):
        gather(word, ids, out, added=added, together=together, **also)
        assert_close(out, reference(word, ids, added, **also), 1e-6)


@pytest.mark.parametrize("size", [24, 300])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", [RMS_NORM, LAYER_NORM])
def test_normalizes_what_it_adds_up(make: Maker, kind: int, together: bool, size: int) -> None:
    """Nothing is rounded before: that would show in float32."""
    word, position, segment = make.normal(50, size), make.normal(9, size), make.normal(2, size)
    ids, second, third = make.ints(3, 49, 0, 3, 7, 1), (position, make.ints(4, 5, 8)), (segment, make.ints(0, 1))
    by = {"norm": kind, "norm_weight": make.normal(size), "norm_bias": make.normal(size), "eps": 0.1}
    added = make.normal(6, size, dtype=torch.float32)
    for sums in ({}, {"second": second}, {"second": second, "third": third}, {"added": added, "second": second}):
        for options in (sums | by, sums | by | {"norm_bias": None}):
            for dtype, limit in ((torch.float32, 1e-5), (make.dtype, TOLERANCES[make.dtype])):
                out = make.poison(6, size, dtype=dtype)
                gather(word, ids, out, together=together, **options)
                assert_close(out, reference(word, ids, **options), limit)


def test_a_norm_and_its_weight_come_together(make: Maker) -> None:
    table, ids, out, row = make.normal(5, 8), make.ints(1), make.poison(1, 8), make.normal(8)
    by = {"norm_weight": row}
    for options in ({"norm": LAYER_NORM}, by, by | {"norm": 7}, {"norm_bias": row}):
        with pytest.raises(ValueError, match="norm"):
            gather(table, ids, out, **options)
