"""Writes ``stubs/tensorrt_rtx/__init__.pyi`` from the signatures in the docstrings of the installed bindings.

Only what accel runs engines with; all other names of the module are Any. After installing another version:
``python -m tests.engines.tensorrt.stubs``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[3] / "stubs" / "tensorrt_rtx" / "__init__.pyi"
CLASSES = ("Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache", "IHostMemory", "Dims")
ENUMS = (
    *("CudaGraphStrategy", "DataType", "DynamicShapesKernelSpecializationStrategy", "EngineInvalidityDiagnostics"),
    *("EngineValidity", "ExecutionContextAllocationStrategy", "TensorIOMode", "TensorLocation"),
)
HEAD = """# Written by tests/engines/tensorrt/stubs.py from tensorrt_rtx; do not edit.
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, SupportsInt, overload

from typing_extensions import Buffer

def __getattr__(name: str) -> Any: ...
"""
_SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)\(self: [\w.]+(?:, (.*))?\) -> (.+)$")
_WORDS = {"nvinfer1::IRuntimeCache": "IRuntimeCache", "typing_extensions.": "", "collections.abc.": "", "typing.": ""}
_BUILTINS = {"int", "str", "bool", "float", "tuple", "list", "bytes", "None", "object"}
_KNOWN = {*CLASSES, *ENUMS, *_BUILTINS, "Any", "Buffer", "Sequence", "SupportsInt", "Iterator"}


def generate(trt: Any) -> str:
    """The stub's text for an imported module."""
    parts = [HEAD]
    for name in ENUMS:
        members = "\n".join(f"    {key} = {int(value)}" for key, value in getattr(trt, name).__members__.items())
        parts.append(f"class {name}(IntEnum):\n{members}\n")
    for name in CLASSES:
        parts.append("\n".join([f"class {name}:", *_members(getattr(trt, name))]) + "\n")
    return "\n".join(parts)


def _members(kind: type) -> Iterator[str]:
    found = False
    for name, value in sorted(vars(kind).items()):
        if isinstance(value, property):
            yield from _property(name, value)
            found = True
        elif name in ("__init__", "__len__", "__getitem__", "__iter__") or not name.startswith("_"):
            lines = list(_method(name, value.__doc__ or ""))
            yield from lines
            found = found or bool(lines)
    if "__buffer__" in vars(kind) or kind.__name__ == "IHostMemory":  # pybind's buffers are not in its docstrings
        yield "    def __buffer__(self, flags: int, /) -> memoryview: ..."
    elif kind.__name__ == "Dims":  # its __getitem__ makes it one
        yield "    def __iter__(self) -> Iterator[int]: ..."
    elif not found:
        yield "    ..."


def _property(name: str, value: property) -> Iterator[str]:
    getter = value.fget.__doc__ if value.fget else None
    result = re.search(r"-> (.+)", getter or "")
    yield "    @property"
    yield f"    def {name}(self) -> {_type(result[1]) if result else 'Any'}: ..."
    if value.fset:
        taken = re.search(r"arg1: ([^)]+)\)", value.fset.__doc__ or "")
        yield f"    @{name}.setter"
        yield f"    def {name}(self, value: {_type(taken[1]) if taken else 'Any'}) -> None: ..."


def _method(name: str, text: str) -> Iterator[str]:
    signatures = [match for line in text.splitlines() if (match := _SIGNATURE.match(line.strip())) and match[1] == name]
    for match in signatures:
        if len(signatures) > 1:
            yield "    @overload"
        arguments = ", ".join(["self", *(_argument(part) for part in _split(match[2] or ""))])
        yield f"    def {name}({arguments}) -> {_type(match[3])}: ..."


def _split(arguments: str) -> list[str]:
    """Cuts at the commas between arguments, not at those inside brackets."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _argument(text: str) -> str:
    name, _, rest = text.partition(": ")
    kind, _, default = rest.partition(" = ")
    optional = " | None" if default == "None" else ""
    return f"{name}: {_type(kind)}{optional}{' = ...' if default else ''}"


def _type(text: str) -> str:
    text = re.sub(r"tensorrt_rtx_bindings\.tensorrt_rtx\.", "", text.strip())
    for old, new in _WORDS.items():
        text = text.replace(old, new)
    return text if set(re.findall(r"\w+", text)) <= _KNOWN else "Any"


if __name__ == "__main__":
    import tensorrt_rtx

    TARGET.write_text(generate(tensorrt_rtx), encoding="utf-8")
