from __future__ import annotations

import os

import pytest

from accel.machine import has_nvidia_device

pytest.importorskip("triton", reason="Triton has no build for this system")
torch = pytest.importorskip("torch")
from accel_kernels import device  # noqa: E402
from accel_kernels.gemv import gemv_kernel  # noqa: E402

CPU = torch.device("cpu")


def test_kernels_are_interpreted_where_there_is_no_gpu() -> None:
    """If this fails, something imported a kernel before ``tests/conftest.py`` set the variable."""
    assert (os.environ.get("TRITON_INTERPRET") == "1") == device.INTERPRETED
    assert device.INTERPRETED or has_nvidia_device()
    assert (type(gemv_kernel).__name__ == "InterpretedFunction") == device.INTERPRETED


@pytest.mark.skipif(not device.INTERPRETED, reason="asks the GPU")
def test_the_interpreter_has_descriptors_and_no_dependent_launch() -> None:
    assert device.has_tensor_memory_access(CPU) and not device.has_dependent_launch(CPU)
    assert device.shared_memory(CPU) > 1 << 20 and device.multiprocessors(CPU) >= 1


@pytest.mark.parametrize(("sm", "has"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_dependent_launch_comes_with_sm_90(monkeypatch: pytest.MonkeyPatch, sm: tuple[int, int], has: bool) -> None:
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setattr(device, "capability", lambda _: sm)
    assert device.has_dependent_launch(CPU) == device.has_tensor_memory_access(CPU) == has
    options = device.launch_options(CPU, None, 8, 2)
    assert options["DEPENDENT"] == options.get("launch_pdl", False) == has
    assert options["num_warps"] == 8 and options["num_stages"] == 2
    forced = device.launch_options(CPU, False, 4)
    assert not forced["DEPENDENT"] and not {"launch_pdl", "num_stages"} & set(forced)


@pytest.mark.parametrize(
    ("sm", "room", "turn", "ahead", "expected"),
    [
        ((9, 0), 227 << 10, 40 << 10, 40 << 10, 4),
        ((9, 0), 227 << 10, 48 << 10, 48 << 10, 3),
        ((8, 6), 99 << 10, 32 << 10, 32 << 10, 3),  # a turn of two waits in registers
        ((8, 6), 99 << 10, 96 << 10, 0, 2),
        ((8, 6), 99 << 10, 200 << 10, 0, 1),
        ((9, 0), 10 << 10, 96 << 10, 0, 1),
        ((9, 0), 10 << 10, 96, 96 << 10, 1),
    ],
)
def test_stages_that_fit(
    monkeypatch: pytest.MonkeyPatch, sm: tuple[int, int], room: int, turn: int, ahead: int, expected: int
) -> None:
    monkeypatch.setattr(device, "capability", lambda _: sm)
    monkeypatch.setattr(device, "shared_memory", lambda _: room)
    assert device.fitting_stages(CPU, 4, turn, ahead) == expected
    assert device.fitting_stages(CPU, 1, turn, ahead) == 1


def test_powers_of_two() -> None:
    assert [device.next_power_of_2(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
