from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels.norm import TOLERANCES, norm, reference  # noqa: E402
from accel_kernels.row_pieces import row_options  # noqa: E402
from accel_kernels.tiles import LAYER_NORM, RMS_NORM  # noqa: E402


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", [RMS_NORM, LAYER_NORM])
@pytest.mark.parametrize("size", [1, 64, 100, 384, 650])
def test_agrees_with_the_reference(make: Maker, kind: int, size: int, together: bool) -> None:
    """Six rows: the last program that takes several has places for more. Far from zero, a variance is a small part."""
    x, weight, bias = make.normal(6, size) + 5.0, make.normal(size), make.normal(size)
    room = make.poison(8, size)
    out = room[:6]
    options = {"eps": 1e-5, "kind": kind, "bias": bias}
    assert norm(x, weight, out, together=together, **options) is out
    assert_close(out, reference(x, weight, **options)[0], TOLERANCES[make.dtype])
    assert room[6:].isnan().all(), "rows behind the end were written"


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_residual_in_parts_joins_the_stream(make: Maker, parts: int, together: bool, rows: int) -> None:
    x, weight = make.normal(rows, 300, dtype=torch.float32), make.normal(300)
    residual = make.normal(*((parts,) if parts else ()), rows, 300, dtype=torch.float32)
    stream, out = make.poison(rows, 300, dtype=torch.float32), make.poison(rows, 300)
    expected, added = reference(x, weight, eps=1e-5, residual=residual)
    norm(x, weight, out, eps=1e-5, residual=residual, stream=stream, together=together)
    assert_close(out, expected, TOLERANCES[make.dtype])
    assert_close(stream, added, 1e-6)


def test_the_stream_may_be_the_input(device: object) -> None:
    make = Maker(device)
    x, weight, residual, out = make.normal(2, 10), make.normal(10), make.normal(2, 10), make.poison(2, 10)
    expected, added = reference(x.clone(), weight, eps=0.1, residual=residual)
    norm(x, weight, out, eps=0.1, residual=residual, stream=x)
    assert_close(out, expected, 1e-5)
    assert_close(x, added, 1e-6)


@pytest.mark.parametrize(
    ("rows", "size", "together"), [(2047, 768, False), (2048, 768, True), (2048, 1024, True), (2048, 1025, False)]
)
def test_many_short_rows_share_programs(rows: int, size: int, together: bool) -> None:
    options = row_options(rows, size)
    assert (options["ROWS"] > 1) == together
    assert ("maxnreg" in options) == (not together and size <= 1024)
    assert options == row_options(rows, size, together)


@pytest.mark.parametrize("kernel", ["norm", "gather"])
def test_one_row_is_a_number_with_a_type(kernel: str) -> None:
    """Triton would make a constant of 1, which has no ``to``, and a kernel of its own; the interpreter never does."""
    find = "next(each for each in made.params if each.name == 'T')"
    code = f"from accel_kernels.{kernel} import {kernel}_kernel as made; assert {find}.do_not_specialize"
    root = Path(__file__).resolve().parents[2] / "kernels"
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_rows(make: Maker) -> None:
    x = make.normal(0, 8)
    assert norm(x, make.normal(8), make.poison(0, 8), eps=0.1, residual=x).shape == (0, 8)
