"""What is advised where a variant is refused, or is not there: names that some target runs, commands that work."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from accel.errors import InputError
from accel.refusals import how_to_get, takers
from accel.scheme import BASES, CACHES, QUANTIZED, parse_scheme
from accel.spec import Kind
from accel.variant_targets import TARGETS, check_runnable, check_target
from tests.bundle_samples import ARCH

KINDS: tuple[Kind, ...] = ("encoder", "decoder")
WEIGHTS = (*BASES, *QUANTIZED)
NAMES = (*WEIGHTS, *CACHES, *(f"{weights}+{cache}" for weights in WEIGHTS for cache in CACHES))
NAMED = re.compile(rf"(?<![\w+-])(?:{'|'.join(map(re.escape, NAMES))})(?![\w+-])")
COMMAND = re.compile(r"accel quantize bundle --variant ([\w+-]+)(?: adds[^;]*? for ([\w-]+))?")


def named(message: str, asked: str) -> set[str]:
    """The variants that a message names beside the one asked for, whatever that is called."""
    return set(NAMED.findall(message)) - {asked, parse_scheme(asked).name}


def wrong(kind: Kind, names: set[str]) -> list[str]:
    return [name for name in names if not takers(kind, parse_scheme(name))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", NAMES)
def test_refusals_name_what_some_target_runs(kind: Kind, asked: str) -> None:
    arch, scheme = dataclasses.replace(ARCH, kind=kind), parse_scheme(asked)
    told = []
    for target in TARGETS.values():
        try:
            check_target(arch, scheme, target)
        except InputError as error:
            told.append(str(error))
    try:
        check_runnable(kind, asked)
    except InputError as error:
        told.append(str(error))
        assert not takers(kind, scheme)
    assert [wrong(kind, named(message, asked)) for message in told] == [[]] * len(told)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [name for name in NAMES if name != "fp32"])
def test_commands_that_are_advised_work(kind: Kind, asked: str) -> None:
    """Each adds something, for the target that stands beside it: the first that takes it."""
    told = how_to_get(Path("bundle"), kind, asked, {"fp32": ("canonical", "ort-cpu")})
    commands = [(found[1], found[2], told[: found.start()]) for found in COMMAND.finditer(told)]
    for variant, adds_for, before in commands:
        able = takers(kind, parse_scheme(variant))
        wanted = adds_for or (re.findall(r"for ([\w-]+): $", before) or [""])[0]
        assert able and wanted in ("", able[0])
    assert bool(commands) == (kind == "decoder" or "kv" not in asked)
