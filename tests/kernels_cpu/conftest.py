"""Every test of the operators runs on each instruction set that this CPU has."""

from __future__ import annotations

import accel_cpu
import pytest
from accel_cpu.library import INSTRUCTION_SETS


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    """The compiled library is there."""
    assert accel_cpu.library_path() is not None, accel_cpu.unavailable_reason()


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set; kernels made in the test use it."""
    name: str = request.param
    monkeypatch.setenv("ACCEL_CPU_ISA", name)
    try:
        assert accel_cpu.instruction_set() == name
    except OSError:
        pytest.skip(f"this CPU does not run {name}")
    return name
