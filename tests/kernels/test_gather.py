from __future__ import annotations

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.gather import TOLERANCES, gather, reference  # noqa: E402
from accel_kernels.tiles import LAYER_NORM, RMS_NORM  # noqa: E402


@pytest.mark.parametrize("ids_type", ["int32", "int64"])
def test_agrees_with_the_reference(make: Maker, ids_type: str) -> None:
    table, ids = make.normal(50, 24), make.ints(3, 49, 0, 3, dtype=getattr(torch, ids_type))
    for dtype in (make.dtype, torch.float32):
        out = make.poison(4, 24, dtype=dtype)
        assert gather(table, ids, out) is out
        assert_close(out, reference(table, ids), 0.0)


@pytest.mark.parametrize("turns", [1, 3])
def test_rows_on_top_of_others(make: Maker, turns: int) -> None:
    """The ids are used over and over."""
    table, ids = make.normal(50, 24), make.ints(3, 49, 0, 3)
    added = make.normal(4 * turns, 24, dtype=torch.float32)
    expected = reference(table, ids, added.clone())
    assert gather(table, ids, added, added=added) is added
    assert_close(added, expected, 1e-7)


def test_no_ids_are_no_rows(device: object) -> None:
    make = Maker(device)
    assert gather(make.normal(5, 8), make.ints(), make.poison(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("with_added", [False, True])
def test_rows_of_several_tables(make: Maker, with_added: bool) -> None:
    """Each table's ids are used over and over."""
    word, position, segment = make.normal(50, 24), make.normal(9, 24), make.normal(2, 24)
    ids, slots, kinds = make.ints(3, 49, 0, 3, 7, 1), make.ints(4, 5, 8), make.ints(0, 1, dtype=torch.int64)
    added = make.normal(6, 24, dtype=torch.float32) if with_added else None
    out = make.poison(6, 24, dtype=torch.float32)
    for also in ({"second": (position, slots)}, {"second": (position, slots), "third": (segment, kinds)}):
        gather(word, ids, out, added=added, **also)
        assert_close(out, reference(word, ids, added, **also), 1e-6)


@pytest.mark.parametrize("kind", [RMS_NORM, LAYER_NORM])
def test_normalizes_what_it_adds_up(make: Maker, kind: int) -> None:
    """Before anything is rounded: the tables' rows alone would differ from the reference by more."""
    word, position = make.normal(50, 24), make.normal(9, 24)
    ids, second = make.ints(3, 49, 0, 3, 7, 1), (position, make.ints(4, 5, 8))
    by = {"norm": kind, "norm_weight": make.normal(24), "norm_bias": make.normal(24), "eps": 0.1}
    for options in (by, by | {"norm_bias": None}):
        out = make.poison(6, 24)
        gather(word, ids, out, second=second, **options)
        expected = reference(word, ids, second=second, **options)
        assert_close(out, expected, TOLERANCES[make.dtype])
        assert not torch.allclose(expected, reference(word, ids, second=second))


def test_a_norm_and_its_weight_come_together(make: Maker) -> None:
    table, ids, out = make.normal(5, 8), make.ints(1), make.poison(1, 8)
    for options in ({"norm": LAYER_NORM}, {"norm_weight": make.normal(8)}, {"norm": 7, "norm_weight": make.normal(8)}):
        with pytest.raises(ValueError, match="norm"):
            gather(table, ids, out, **options)
