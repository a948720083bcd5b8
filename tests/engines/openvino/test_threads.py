"""First calls of several threads at once, in a process of their own: only there they are the first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.engines.openvino.needs import needs_openvino

pytestmark = needs_openvino

# As ``request.infer`` begins. Threads that take turns as often as they can meet nearly every time.
SCRIPT = """
import sys, threading
from accel.engines.openvino.package import import_openvino

sys.setswitchinterval(1e-6)
begin, found = threading.Barrier(4), []

def call():
    begin.wait()
    found.append(import_openvino().Type.f32.to_dtype())

threads = [threading.Thread(target=call) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*found)
"""


@pytest.mark.parametrize("turn", range(3))
def test_first_calls_do_not_wait_for_each_other(turn: int) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["float32"] * 4), done.stderr
