"""Triton's interpreter, quicker: the tests that run kernels on it take half their time."""

from __future__ import annotations

import importlib
import inspect
from types import FunctionType, ModuleType
from typing import Any


def patch_language_once() -> None:
    """Lets the interpreter make Triton's language its own once per launch.

    It does so again at each call of one device function by another, which changes nothing and takes longer than the
    function itself: it looks through all members of the language.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    language, patch = interpreter.tl, interpreter._patch_lang
    patched: set[ModuleType] = set()
    modules: dict[FunctionType, set[ModuleType]] = {}

    class Launch:
        """What undoes the patches of a launch; device functions never ask for that."""

        def __init__(self, scope: Any) -> None:
            self._scope = scope

        def restore(self) -> None:
            patched.clear()
            self._scope.restore()

    def patch_once(function: FunctionType) -> Any:
        if function not in modules:
            named = (value for value in function.__globals__.values() if inspect.ismodule(value))
            modules[function] = {module for module in named if module in (language, language.core)}
        if patched and modules[function] <= patched:
            return Launch(interpreter._LangPatchScope())
        scope = patch(function)
        patched.update(modules[function])
        return Launch(scope)

    interpreter._patch_lang = patch_once


__all__ = ["patch_language_once"]
