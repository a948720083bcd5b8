"""The threads of captured runs: who is served, by whom, until when, and what is left behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from accel.engines.ort_cuda.threads import OWN_THREADS, OneThread, RunThreads
from accel.errors import EngineError

OUTLIVES_MAIN = """
import atexit, threading, time
from accel.engines.ort_cuda.threads import OneThread
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


def test_the_first_threads_run_by_themselves_and_others_in_one() -> None:
    threads, asked, ready = RunThreads(), list[tuple[int, int, set[int]]](), threading.Barrier(5)

    def ask() -> None:
        for _ in range(2):
            asked.append((threading.get_ident(), threads.call(threading.get_ident), threads.graphs()))
        ready.wait(10)  # an ident is another's when a thread has ended

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    ready.wait(10)
    alone = {asker for asker, runner, _ in asked if asker == runner}
    others = [(runner, graphs) for asker, runner, graphs in asked if asker != runner]
    assert len(asked) == 8 and len(alone) == OWN_THREADS and len(others) == 8 - 2 * OWN_THREADS
    assert len({runner for runner, _ in others}) == 1, "one thread for all of them"
    assert len({id(graphs) for _, _, graphs in asked}) == OWN_THREADS + 1, "what one captures others do not have"
    assert len({id(graphs) for _, graphs in others}) == 1
    for _, _, graphs in asked:
        graphs.add(4)
    threads.forget()
    assert not any(graphs for _, _, graphs in asked)
    threads.close()
    threads.close()
    with ThreadPoolExecutor(1) as pool, pytest.raises(EngineError, match="the decoder session is closed"):
        pool.submit(threads.call, int).result()
