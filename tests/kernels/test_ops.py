"""The list of ops, and what each op's file has to have."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from tests.kernels.comparing import Maker

torch = pytest.importorskip("torch")
import accel_kernels  # noqa: E402
from accel_kernels.ops import OPS, Op  # noqa: E402

FOLDER = Path(accel_kernels.__file__).parent
SHARED = {
    *("__init__", "advance", "bodies", "checks", "decode_tiles", "device", "launches", "narrow_cache", "ops"),
    *("packing", "plain", "row_pieces", "sample_body", "sample_search", "tiles", "varlen_tiles"),
}
SCRATCH = {
    "out",
    "space",
    "stream",
    "value",
    "tile",
    "dependent",
    "block",
    "least",
    "warps",
    "span",
    "splits",
    "longest",
    "room",
}
TUNING = {*SCRATCH, "block_m", "block_n", "stages", "programs", "group", "flatten", "halves", "together"}


def test_every_file_of_an_op_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} - SHARED == {op.name for op in OPS}
    assert len({op.function for op in OPS}) == len(OPS)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_an_op_has_what_it_needs(op: Op) -> None:
    assert op.launch.__doc__ and "Raises:" in op.launch.__doc__
    assert op.tolerances and all(0 <= limit < 0.05 for limit in op.tolerances.values())
    launch, reference = (set(inspect.signature(call).parameters) for call in (op.launch, op.reference))
    assert launch - TUNING == reference - ({"stripe"} if op.name in ("wide_gemm", "specialized_gemm") else set())


def jitted(function: ast.FunctionDef) -> bool:
    decorators = [node.func if isinstance(node, ast.Call) else node for node in function.decorator_list]
    return any(isinstance(node, ast.Attribute) and node.attr == "jit" for node in decorators)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_functions_that_triton_does_not_compile_are_annotated(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not jitted(node):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert node.returns is not None, node.name
            assert all(a.annotation is not None for a in arguments if a.arg != "self"), node.name


def test_nothing_of_accel_is_imported() -> None:
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.partition(".")[0] == "accel" for name in names), path.name


def test_the_comparison_can_fail() -> None:
    from tests.kernels.comparing import assert_close, error_of

    expected = Maker("cpu").normal(4)
    with pytest.raises(AssertionError, match="error"):
        assert_close(expected * 1.01, expected, 1e-3)
    assert error_of(torch.full((4,), float("nan")), expected) == float("inf")
