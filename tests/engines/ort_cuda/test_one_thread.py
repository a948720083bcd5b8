"""The thread of captured runs: who is served, until when, and what is left behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest

from accel.engines.ort_cuda.one_thread import OneThread
from accel.errors import EngineError

OUTLIVES_MAIN = """
import atexit, threading, time
from accel.engines.ort_cuda.one_thread import OneThread
one = OneThread()
def late():
    threading.main_thread().join()
    print("thread", one.call(lambda: 1 + 1), flush=True)
threading.Thread(target=late).start()
atexit.register(lambda: print("exit", one.call(lambda: 2 + 2), flush=True))
"""


def test_one_thread_serves_all() -> None:
    one, found = OneThread(), set()
    askers = [threading.Thread(target=lambda: found.add(one.call(threading.get_ident))) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(found) == 1 and not found & {asker.ident for asker in askers}
    one.close()
    one.close()


def test_what_is_raised_reaches_the_caller_and_is_not_kept() -> None:
    class Held:
        pass

    def fail(held: Held) -> None:
        raise ValueError("no")

    one, held = OneThread(), Held()
    known = weakref.ref(held)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="no"):
            one.call(fail, held)
        del held
        assert one.call(lambda: 3) == 3
        assert known() is None
    finally:
        gc.enable()
    one.close()


def test_after_the_end() -> None:
    one = OneThread()
    one.close()
    with pytest.raises(EngineError, match="the decoder session is closed"):
        one.call(int)


def test_one_that_is_dropped_ends() -> None:
    one = OneThread()
    thread = one._thread
    del one
    thread.join(10)
    assert not thread.is_alive()


def test_threads_that_outlive_the_main_one_are_served() -> None:
    done = subprocess.run([sys.executable, "-c", OUTLIVES_MAIN], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["thread 2", "exit 4"] and done.returncode == 0, done.stderr
