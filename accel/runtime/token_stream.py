"""What ``Decoder.stream`` hands out: an iterator that drives the slot loop as it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from types import TracebackType
from typing import TypeVar

from accel.errors import InputError
from accel.runtime.driver import Client, SlotDriver
from accel.runtime.results import GenerateResult, Timings
from accel.runtime.sequence import Sequence

Piece = TypeVar("Piece", str, int)


class TokenStream(Iterator[Piece]):
    """Pieces of text, or token ids, as they are generated. One thread at a time; a context manager.

    Nothing is generated ahead of the reader unless another thread's call drives the model meanwhile.
    """

    def __init__(
        self, driver: SlotDriver, client: Client, finish: Callable[[Sequence], GenerateResult], as_text: bool
    ) -> None:
        self._driver, self._client, self._finish, self._as_text = driver, client, finish, as_text
        self._sequence = client.sequences[0]
        self._taken = 0  # token ids handed out
        self._result: GenerateResult | None = None
        self._closed = False

    @property
    def result(self) -> GenerateResult:
        """The whole sequence; its timings cover the time from the call to the last piece, the reader's own included.

        Raises:
            InputError: The stream is not exhausted.
        """
        if self._result is None:
            raise InputError("the stream has not come to its end", remedy="Read it to the end first")
        return self._result

    @property
    def timings(self) -> Timings:
        """Where the time went from the call until now."""
        return self._sequence.clock.timings()

    def __next__(self) -> Piece:
        while not self._closed:
            finished = self._sequence.finished  # read first: another thread may end it, with a last piece, meanwhile
            piece = self._take()
            if piece is not None:
                return piece
            if finished:
                self._end()
                break
            self._driver.advance(self._client)
        raise StopIteration

    def close(self) -> None:
        """Stops generating; the cache row is free at the next step."""
        self._closed = True
        self._driver.cancel(self._client)

    def __enter__(self) -> TokenStream[Piece]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    def _take(self) -> Piece | None:
        self._client.news = False
        if not self._as_text:
            return self._take_id()  # type: ignore[return-value]
        watch = self._sequence.watch
        assert watch is not None
        return watch.pieces.popleft() if watch.pieces else None  # type: ignore[return-value]

    def _take_id(self) -> int | None:
        sequence = self._sequence
        at = len(sequence.prompt) + self._taken
        if at >= sequence.length:
            return None
        self._taken += 1
        return int(sequence.tokens[at])

    def _end(self) -> None:
        self._closed = True
        if self._sequence.error is not None:
            raise self._sequence.error
        if self._sequence.finish_reason == "cancelled":
            return
        before = perf_counter()
        finished = self._finish(self._sequence)
        self._sequence.clock.prepost += perf_counter() - before
        self._result = GenerateResult(
            finished.ids, finished.text, finished.finish_reason, finished.logprobs, self._sequence.clock.timings()
        )


__all__ = ["TokenStream"]
