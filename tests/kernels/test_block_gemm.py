from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.block_gemm import TOLERANCES, BlockTile, block_gemm, reference  # noqa: E402
from accel_kernels.device import has_tensor_memory_access  # noqa: E402
from accel_kernels.tiles import GELU_ERF, GELU_TANH, NO_ACTIVATION  # noqa: E402

TILE = BlockTile(32, 32, 32)
TAILED = BlockTile(32, 32, 32, tail=16)
DESCRIBED = BlockTile(64, 32, 32, described=True)
TILES = [TILE, TAILED, DESCRIBED, replace(DESCRIBED, tail=16)]


def need_descriptors(make: Maker, tile: BlockTile, size: int) -> None:
    if tile.described and not has_tensor_memory_access(make.device):
        pytest.skip("this GPU has no tensor memory accelerator")
    if tile.described and size * make.dtype.itemsize % 16:
        pytest.skip("rows are no multiples of 16 bytes: refused, see test_descriptors_are_refused")


@pytest.mark.parametrize("tile", TILES, ids=["plain", "tailed", "described", "described and tailed"])
@pytest.mark.parametrize("kind", [NO_ACTIVATION, GELU_ERF, GELU_TANH])
@pytest.mark.parametrize(("rows", "count", "size"), [(70, 50, 100), (1, 33, 32), (32, 32, 7)])
def test_agrees_with_the_reference(
    make: Maker, rows: int, count: int, size: int, kind: int, tile: BlockTile
) -> None:
    need_descriptors(make, tile, size)
    x, weight, bias = make.normal(rows, size), make.normal(count, size), make.normal(count)
    out = make.poison(rows, count)
    assert block_gemm(x, weight, out, bias=bias, activation=kind, tile=tile) is out
    assert_close(out, reference(x, weight, bias=bias, activation=kind), TOLERANCES[make.dtype])


def test_the_residual_comes_last(make: Maker) -> None:
    x, weight, stream = make.normal(40, 48), make.normal(50, 48), make.normal(40, 50, dtype=torch.float32)
    expected = reference(x, weight, residual=stream.clone(), activation=GELU_ERF)
    block_gemm(x, weight, stream, residual=stream, activation=GELU_ERF, tile=TILE)
    assert_close(stream, expected, TOLERANCES[make.dtype])


def test_descriptors_are_refused(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel_kernels import device as features

    make = Maker(device, torch.float16)
    if has_tensor_memory_access(make.device):
        with pytest.raises(ValueError, match="a row of x has 72 bytes, no multiple of 16"):
            block_gemm(make.normal(64, 36), make.normal(64, 36), make.poison(64, 64), tile=DESCRIBED)
    monkeypatch.setattr(features, "capability", lambda _: (8, 6))
    with pytest.raises(ValueError, match="tensor memory accelerator"):
        block_gemm(make.normal(64, 64), make.normal(64, 64), make.poison(64, 64), tile=DESCRIBED)


@pytest.mark.parametrize(("size", "splits", "tail"), [(256, 4, 0), (100, 3, 16), (32, 2, 0)])
def test_parts_add_up(make: Maker, size: int, splits: int, tail: int) -> None:
    """Also where the last parts have nothing to do; the bias counts once."""
    x, weight, bias = make.normal(40, size), make.normal(50, size), make.normal(50)
    out = make.poison(splits, 40, 50, dtype=torch.float32)
    block_gemm(x, weight, out, bias=bias, tile=BlockTile(32, 32, 32, splits=splits, tail=tail))
    assert_close(out.sum(0), reference(x, weight, bias=bias), TOLERANCES[make.dtype])


def test_tiles_shrink_to_the_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from accel_kernels import device

    x = torch.zeros(64, 2048)
    monkeypatch.setattr(device, "capability", lambda _: (9, 0))
    for limit, expected in ((227 << 10, BlockTile(stages=3)), (99 << 10, BlockTile(block_k=64, stages=3))):
        monkeypatch.setattr(device, "shared_memory", lambda _, limit=limit: limit)
        assert BlockTile().fitting(x) == expected
