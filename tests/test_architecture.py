"""The one-way import order, who may import what, and the size of files and functions, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import what stands on its own line (within one unit) or above. The longest prefix counts.
ORDER: tuple[tuple[str, ...], ...] = (
    ("accel_kernels", "accel_cpu", "accel.errors", "accel.machine"),
    (
        *("accel.spec", "accel.schema", "accel.scheme", "accel.sizes", "accel.progress"),
        *("accel.quantized_tensor", "accel.kv_quantization", "accel.refusals"),
    ),
    ("accel.storage", "accel.recipe", "accel.capabilities", "accel.passages"),
    (
        *("accel.manifest", "accel.lost_files", "accel.bundle", "accel.bundle_reading", "accel.bundle_extension"),
        *("accel.engines.session", "accel.measurements", "accel.recorded_choices", "accel.store"),
    ),
    ("accel.engines",),
    ("accel.runtime",),
    ("accel.exporter", "accel.graph", "accel.builder"),
    ("accel.compress",),
    (
        "accel.api",
        "accel.variants",
        "accel.variant_addition",
        "accel.variant_checks",
        "accel.variant_files",
        "accel.variant_removal",
        "accel.variant_targets",
        "accel.inspection",
        "accel.doctor",
        "accel.engine_build",
        "accel.engine_latency",
        "accel.engine_request",
        "accel.loading",
        "accel.quality",
    ),
    ("accel.bench", "accel.serving", "accel.warmup_jobs"),
    (
        *("accel.commands", "accel.build_commands", "accel.engine_commands", "accel.variant_commands"),
        *("accel.cli", "accel.__main__"),
    ),
)
# Lines whose units know each other; the units of the other lines do not.
ACQUAINTED = {0, 1, 2, 3, 8, 9, 10}

ONNX = (
    *("accel.api", "accel.bench", "accel.builder", "accel.compress", "accel.exporter", "accel.graph"),
    *("accel.inspection", "accel.variants", "accel.variant_addition", "accel.variant_checks", "accel.variant_targets"),
    *("accel.engines.torch_operators", "accel.engines.cuda", "accel_cpu.benchmark"),
)
OWNERS = {
    "torch": (
        *(
            "accel.exporter",
            "accel.graph.parity",
            "accel.graph.evaluation",
            "accel.engines.torch_reference",
            "accel.engines.torch_operators",
            "accel.engines.cuda",
            "accel.graph.lowering.cuda.quantized",  # the kernels' own packing
        ),
        *("accel.bench", "accel.compress", "accel_kernels"),
    ),
    "transformers": ("accel.exporter", "accel.engines.torch_reference", "accel.bench"),
    "onnxruntime": ("accel.engines.ort", "accel.graph", "accel.capabilities", "accel.bench", "accel_cpu.benchmark"),
    "openvino": ("accel.engines.openvino", "accel.bench"),
    "onnx": ONNX,
    "onnx_ir": ONNX,
    "onnxscript": ("accel.exporter", "accel.graph", "accel.bench"),
    "tensorrt": ("accel.engines.tensorrt", "accel.builder"),
    "tensorrt_rtx": ("accel.engines.tensorrt", "accel.builder"),
    "cuda": ("accel.engines.tensorrt",),
    "triton": ("accel_kernels", "accel.engines.cuda"),
    "ray": ("accel.serving",),
    "sentence_transformers": ("accel.bench",),
    "fsspec": ("accel.store",),
    "cryptography": ("accel.store",),
}
LAZY = {"export": "accel.api", "load": "accel.loading"}  # what ``accel`` itself hands out


@dataclass(frozen=True)
class Source:
    name: str
    path: Path
    tree: ast.Module

    @property
    def lines(self) -> int:
        return len(self.path.read_text(encoding="utf-8").splitlines())


def read(path: Path, base: Path) -> Source:
    parts = path.relative_to(base).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Source(name, path, ast.parse(path.read_text(encoding="utf-8")))


PACKAGES = [read(path, ROOT) for path in sorted((ROOT / "accel").rglob("*.py"))]
PACKAGES += [read(path, ROOT / "kernels") for path in sorted((ROOT / "kernels").rglob("*.py"))]
OTHERS = [read(path, ROOT) for folder in ("scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {source.name for source in PACKAGES}


def typing_only(source: Source) -> set[ast.AST]:
    """The statements under ``if TYPE_CHECKING``, which never run."""
    blocks = (node for node in ast.walk(source.tree) if isinstance(node, ast.If))
    guarded = (node for node in blocks if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    return {inner for block in guarded for statement in block.body for inner in ast.walk(statement)}


def imports(source: Source, run_only: bool = False) -> Iterator[str]:
    """Every module that the source imports, wherever the statement stands; ``run_only``: not for types alone."""
    skipped = typing_only(source) if run_only else set()
    for node in ast.walk(source.tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.path}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if node.module == "accel":
                    yield LAZY.get(alias.name, full)
                else:
                    yield full if full in MODULES else node.module


def unit(module: str) -> tuple[int, str] | None:
    """Line in ``ORDER`` and unit of a module, by the longest matching prefix."""
    found = [
        (len(prefix), rank, prefix)
        for rank, row in enumerate(ORDER)
        for prefix in row
        if module == prefix or module.startswith(prefix + ".")
    ]
    return max(found)[1:] if found else None


def may_import(importer: str, imported: str) -> bool:
    source, target = unit(importer), unit(imported)
    assert source is not None, f"{importer} has no place in ORDER"
    if target is None:  # ``accel`` itself (its version) or another distribution
        return True
    if source[1] == target[1]:
        return True
    return source[0] > target[0] or (source[0] == target[0] and source[0] in ACQUAINTED)


def owned_by(importer: str, package: str) -> bool:
    return any(importer == owner or importer.startswith((owner + ".", owner + "_")) for owner in OWNERS[package])


@pytest.mark.parametrize("source", PACKAGES, ids=lambda s: s.name)
def test_imports_point_one_way(source: Source) -> None:
    if source.name == "accel":  # lazy names only; test_import.py proves it
        return
    wrong = [name for name in imports(source) if not may_import(source.name, name)]
    assert not wrong, f"{source.name} must not import {wrong}"


def test_imports_form_no_circle() -> None:
    graph = {s.name: {name for name in imports(s, run_only=True) if name in MODULES - {s.name}} for s in PACKAGES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
    with pytest.raises(CycleError):
        TopologicalSorter({**graph, "accel.errors": {"accel.bundle"}}).prepare()


@pytest.mark.parametrize("source", PACKAGES, ids=lambda s: s.name)
def test_heavy_packages_have_owners(source: Source) -> None:
    heavy = [name for name in imports(source, run_only=True) if name.partition(".")[0] in OWNERS]
    wrong = [name for name in heavy if not owned_by(source.name, name.partition(".")[0])]
    assert not wrong, f"{source.name} must not import {wrong}"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    documented = ast.get_docstring(function) is not None and len(function.body) > 1
    docstring = function.body[0] if documented else None
    assert function.end_lineno is not None
    size = function.end_lineno - function.lineno + 1
    return size - (docstring.end_lineno - docstring.lineno + 1) if docstring and docstring.end_lineno else size


@pytest.mark.parametrize("source", [*PACKAGES, *OTHERS], ids=lambda s: s.name)
def test_files_and_functions_are_short(source: Source) -> None:
    assert source.lines <= 400, f"{source.path.name} has {source.lines} lines"
    functions = (node for node in ast.walk(source.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    long = [f"{node.name} ({size} lines)" for node in functions if (size := code_lines(node)) > 50]
    assert not long, f"{source.path.name}: {long}"


def test_scripts_use_the_public_package_only() -> None:
    for path in sorted((ROOT / "scripts").glob("*.py")):
        if path.name in ("benchmark_cuda.py", "quickstart.py", "verify_tensorrt.py"):  # compared with other libraries
            continue
        for name in imports(read(path, ROOT)):
            assert name.partition(".")[0] not in OWNERS, f"{path.name} imports {name}"


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_rules_can_fail() -> None:
    assert not may_import("accel.errors", "accel.bundle")
    assert not may_import("accel.runtime.load", "accel.exporter.tracer")
    assert not may_import("accel.exporter.tracer", "accel.graph.pipeline")
    assert not may_import("accel.engines.session", "accel.engines.ort")
    assert not may_import("accel.runtime.text", "accel.api")
    assert may_import("accel.exporter.a", "accel.exporter.b")
    assert may_import("accel.engines.ort", "accel.engines.session")
    assert not owned_by("accel.runtime.decoder", "torch")
    assert not owned_by("accel.graph.pipeline", "transformers")
    lazy = Source(
        "accel.runtime.x", Path("x.py"), ast.parse("def f():\n    from accel import export\n    import torch.nn")
    )
    assert list(imports(lazy)) == ["accel.api", "torch.nn"]
    typed = Source("accel.runtime.x", Path("x.py"), ast.parse("if TYPE_CHECKING:\n    import torch\nimport numpy"))
    assert list(imports(typed)) == ["numpy", "torch"]
    assert list(imports(typed, run_only=True)) == ["numpy"]
