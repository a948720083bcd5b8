"""setuptools' build backend, which asks for a compiler in a wheel (ziglang) where the system has none."""

from __future__ import annotations

from typing import Any

from native import ZIG, find_compiler, wanted
from setuptools import build_meta

build_wheel = build_meta.build_wheel
build_sdist = build_meta.build_sdist
build_editable = build_meta.build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist

Settings = dict[str, Any] | None


def _compiler() -> list[str]:
    return [ZIG] if wanted() and find_compiler() is None else []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler()
