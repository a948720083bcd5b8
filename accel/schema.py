"""Strict, typed reading of plain data (JSON, YAML) into frozen dataclasses, and back.

Nothing is coerced but an int into a float field and a list into a tuple field: a wrong
type, a missing key and an unknown key are errors that say where and what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from accel.errors import AccelError, BundleError

T = TypeVar("T")


def from_dict(cls: type[T], data: object, where: str, *, error: type[AccelError] = BundleError) -> T:
    """Builds the dataclass ``cls`` from a mapping.

    Args:
        cls: A dataclass whose fields are str, int, float, bool, ``X | None``, unions of scalars,
            ``Literal``, ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]`` or other such dataclasses.
        data: What ``json.load`` or ``yaml.safe_load`` returned.
        where: Prefix of the places that errors name, e.g. the file.
        error: The class raised.

    Raises:
        error: An unknown or missing key, or a value of the wrong type.
    """
    return _Reader(error).dataclass(cls, data, where)


def to_dict(value: object) -> Any:
    """Turns a dataclass into dicts, lists and scalars that ``json.dump`` takes; inverse of ``from_dict``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a schema")


def suggest(name: str, known: list[str]) -> str:
    """One sentence that points from an unknown name to the nearest known one, or lists them all."""
    near = nearest(name, known)
    return f"Did you mean '{near}'?" if near else "Known: " + (", ".join(sorted(known)) or "none")


def nearest(name: str, known: list[str]) -> str | None:
    """The known name that an unknown one is most like; None: it is like none."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _describe(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(item) for item in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(item) for item in get_args(hint))
    origin = get_origin(hint) or hint
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", tuple: "a list"}
    return names.get(origin, "a mapping")


class _Reader:
    """Reads values by type hint; every failure is an ``error``."""

    def __init__(self, error: type[AccelError]) -> None:
        self.error = error

    def dataclass(self, cls: type[T], data: object, where: str) -> T:
        if not isinstance(data, dict):
            raise self._mismatch(cls, data, where)
        fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
        for key in data:
            if key not in fields:
                raise self.error(f"Unknown key {key!r}", where=where, remedy=suggest(str(key), list(fields)))
        hints = _hints(cast(Any, cls))
        values = {}
        for name, field in fields.items():
            if name in data:
                values[name] = self.value(hints[name], data[name], f"{where}: {name}")
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise self.error(f"Missing key {name!r}", where=where, remedy=f"Add it: {_describe(hints[name])}")
        return cls(**values)

    def value(self, hint: Any, data: object, where: str) -> Any:
        origin, args = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return self._union(hint, args, data, where)
        if origin is Literal:
            if any(data == item and type(data) is type(item) for item in args):
                return data
            raise self._mismatch(hint, data, where)
        if origin is tuple:
            return self._tuple(hint, args, data, where)
        if origin is dict:
            return self._dict(hint, args, data, where)
        if dataclasses.is_dataclass(hint):
            return self.dataclass(cast(type, hint), data, where)
        return self._scalar(hint, data, where)

    def _scalar(self, hint: Any, data: object, where: str) -> Any:
        if hint is float and type(data) in (int, float):
            number = float(cast(float, data))
            if math.isfinite(number):
                return number
        elif type(data) is hint and hint in (str, int, bool, type(None)):
            return data
        elif hint not in (str, int, float, bool, type(None)):
            raise TypeError(f"{where}: a schema field may not be of type {hint!r}")
        raise self._mismatch(hint, data, where)

    def _union(self, hint: Any, args: tuple[Any, ...], data: object, where: str) -> Any:
        if data is None and type(None) in args:
            return None
        choices = [item for item in args if item is not type(None)]
        if len(choices) == 1:  # Optional: keep the inner error, which is the more precise one
            return self.value(choices[0], data, where)
        for choice in choices:
            try:
                return self.value(choice, data, where)
            except self.error:
                continue
        raise self._mismatch(hint, data, where)

    def _tuple(self, hint: Any, args: tuple[Any, ...], data: object, where: str) -> tuple[Any, ...]:
        if not isinstance(data, (list, tuple)):
            raise self._mismatch(hint, data, where)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(self.value(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        if len(data) != len(args):
            raise self.error(f"Expected {len(args)} items, found {len(data)}", where=where, remedy="Fix the list")
        return tuple(self.value(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, data)))

    def _dict(self, hint: Any, args: tuple[Any, ...], data: object, where: str) -> dict[str, Any]:
        if not isinstance(data, dict):
            raise self._mismatch(hint, data, where)
        for key in data:
            if not isinstance(key, str):
                raise self.error(f"Key {key!r} is not a string", where=where, remedy="Quote it")
        return {key: self.value(args[1], item, f"{where}.{key}") for key, item in data.items()}

    def _mismatch(self, hint: Any, data: object, where: str) -> AccelError:
        shown = repr(data) if len(repr(data)) <= 60 else repr(data)[:57] + "..."
        return self.error(f"Expected {_describe(hint)}, found {shown}", where=where, remedy="Correct the value")


__all__ = ["from_dict", "nearest", "suggest", "to_dict"]
