"""A closed session leaves no thread with an alternate signal stack that is gone."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from accel.engines.openvino import signal_stack as module
from accel.engines.openvino.package import open_core
from accel.engines.openvino.signal_stack import SS_DISABLE, Stack, kept_signal_stack, signal_stack
from accel.variants import add_variant
from tests.engines.openvino.needs import needs_openvino

pytestmark = [needs_openvino, pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO sets it on Linux alone")]

# What OpenVINO gave back is taken by read-only memory, where no handler can run. Two rows take a second core.
SCRIPT = """
import mmap, signal, sys
import accel

came = []
signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
with accel.load(sys.argv[1], engine="openvino", threads=2) as encoder:
    encoder.embed(["A man is eating.", "Someone has a meal, and then another one."])
taken = [mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ) for _ in range(20_000)]
signal.raise_signal(signal.SIGTERM)
print(came == [signal.SIGTERM])
"""


def fields(stack: Stack | None) -> tuple[Any, ...]:
    assert stack is not None
    return stack.sp, stack.flags, stack.size


def test_a_signal_after_a_session(minilm_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(minilm_bundle, tmp_path / "bundle")
    add_variant(folder, "fp32", target="openvino", check=False)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_the_stack_of_a_thread_that_opens_a_core() -> None:
    def opened() -> tuple[tuple[Any, ...], ...]:
        before = fields(signal_stack())
        first, second = open_core(), open_core()
        while_open = fields(signal_stack())
        del first
        del second
        return before, while_open, fields(signal_stack())

    for before, *after in (opened(), ThreadPoolExecutor(1).submit(opened).result()):
        assert after == [before, before]


def test_a_stack_of_its_own_comes_back() -> None:
    def set_and_restore() -> None:
        memory = ctypes.create_string_buffer(1 << 17)
        own = Stack(ctypes.addressof(memory), 0, len(memory))
        assert module._set(own) == 0
        with pytest.raises(KeyError), kept_signal_stack():
            assert module._set(Stack(None, SS_DISABLE, 0)) == 0
            raise KeyError
        assert fields(signal_stack()) == fields(own)
        assert module._set(Stack(None, SS_DISABLE, 0)) == 0

    ThreadPoolExecutor(1).submit(set_and_restore).result()


def test_a_stack_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is too small by now: better none than OpenVINO's."""

    def refused() -> int:
        memory = ctypes.create_string_buffer(1 << 17)
        with kept_signal_stack():
            assert module._set(Stack(ctypes.addressof(memory), 0, len(memory))) == 0
        monkeypatch.undo()
        return fields(signal_stack())[1]

    monkeypatch.setattr(module, "signal_stack", lambda: Stack(4096, 0, 16))
    assert ThreadPoolExecutor(1).submit(refused).result() == SS_DISABLE


def test_elsewhere_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "darwin")
    monkeypatch.setattr(module.ctypes, "CDLL", None)
    with kept_signal_stack():
        assert signal_stack() is None
