"""What encoder sessions on a CPU share: rows are cut to their true lengths and spread over the cores."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.engines.lifetime import Lifetime
from accel.errors import EngineError, InputError

Feeds = dict[str, NDArray]
# Measured on MiniLM, CPU seconds of one thread: a run costs what about 8 tokens cost (the weights are read once),
# is cheapest per token at 128 to 512 tokens, and masking costs 0 to 6 percent, growing with the length.
GROUP_TOKENS = 512  # of one run of several rows: MiniLM 8x128 took 116.5 ms with it, 118.3 with 256, 121 with 128
GROUP_PADDING = 6  # short rows of nearly equal length share a masked run while it pads no more tokens than this
MASKED_LENGTH = 64  # longer rows share a run only when they are equally long


@dataclass(frozen=True)
class RowGroup:
    """Rows of one feed that run together.

    Attributes:
        feed: Index of the feed.
        rows: int64 indices into its batch.
        length: The longest row's true length, to which they are cut; None: uncut (masks with holes, left padding).
        ragged: Whether some are shorter, by a few tokens, and therefore run masked.
    """

    feed: int
    rows: NDArray[np.int64]
    length: int | None
    ragged: bool = False


class RowEncoder(ABC):
    """Runs batches row by row. Thread-safe.

    A single row runs on an engine with all threads. Several rows are spread over that many Python threads, all on a
    second engine that computes a run with one thread: next to no padding is computed and nothing waits for a barrier
    per node.

    Args:
        threads: Worker threads.
        whole: The engine with all threads, whatever ``_call`` takes.
        inputs: What the graph takes.
        outputs: What it gives, in order.
        per_token: Which outputs are [B, S, ...].
    """

    def __init__(
        self, threads: int, whole: Any, inputs: Sequence[str], outputs: Sequence[str], per_token: Sequence[bool]
    ) -> None:
        self._threads = threads
        self._whole = whole
        self._single: Any = whole if threads == 1 else None  # opened by the first batch
        self._inputs, self._outputs, self._per_token = set(inputs), list(outputs), list(per_token)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._lifetime = Lifetime("encoder")

    @abstractmethod
    def _open_single(self) -> Any:
        """The engine that computes a run with one thread, and ``threads`` runs at a time."""

    @abstractmethod
    def _call(self, engine: Any, feeds: Feeds) -> list[NDArray]:
        """The outputs of contiguous feeds, in order."""

    @abstractmethod
    def _error(self, error: Exception, where: str) -> EngineError:
        """What ``_call`` raised, in our terms."""

    def run_many(self, batches: Sequence[Feeds]) -> list[Feeds]:
        """Runs independent batches, their rows spread over the threads; results in order. Raises as ``run`` does."""
        self._lifetime.check()
        batches = [self._complete(feeds) for feeds in batches]
        tokens = sum(self._count_tokens(feeds) for feeds in batches)
        share = min(GROUP_TOKENS, -(-tokens // self._threads))  # small calls: a share for every thread
        groups = [group for index, feeds in enumerate(batches) for group in self._split(index, feeds, share)]
        if len(groups) == 1 and (len(groups[0].rows) == 1 or groups[0].length is None):
            parts = [self._run_group(self._whole, batches, groups[0])]
        else:
            parts = self._spread(batches, groups)
        return self._assemble(batches, groups, parts)

    def _complete(self, feeds: Feeds) -> Feeds:
        unknown = sorted(set(feeds) - self._inputs)
        if unknown:
            raise InputError(
                f"this model takes no {unknown[0]}",
                where=unknown[0],
                remedy=f"It takes {', '.join(sorted(self._inputs))}",
            )
        shape = feeds["input_ids"].shape
        absent = {
            name: np.ones(shape, np.int64) if name == "attention_mask" else np.zeros(shape, np.int64)
            for name in self._inputs
            if name not in feeds
        }
        return {**feeds, **absent}

    @staticmethod
    def _count_tokens(feeds: Feeds) -> int:
        return int(np.count_nonzero(feeds["attention_mask"])) if "attention_mask" in feeds else feeds["input_ids"].size

    @staticmethod
    def _split(index: int, feeds: Feeds, share: int) -> list[RowGroup]:
        """Groups a batch's rows, longest first, into runs of about ``share`` tokens with next to no padding."""
        mask = feeds.get("attention_mask")
        if mask is None:  # the graph has none: nothing may be cut
            return [RowGroup(index, np.arange(len(feeds["input_ids"])), None)]
        lengths = np.count_nonzero(mask, axis=1)
        regular = (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all(axis=1) & (lengths > 0)
        groups = []
        if not regular.all():
            groups.append(RowGroup(index, np.flatnonzero(~regular), None))
        order = np.flatnonzero(regular)
        order = order[np.argsort(-lengths[order], kind="stable")]
        rows: list[int] = []
        width = padding = 0
        for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
            padding += width - length
            room = width * len(rows) < share and (padding == 0 or (width <= MASKED_LENGTH and padding <= GROUP_PADDING))
            if rows and not room:
                groups.append(RowGroup(index, np.sort(rows), width, bool(lengths[rows[-1]] < width)))
                rows = []
            if not rows:
                width, padding = length, 0
            rows.append(row)
        if rows:
            groups.append(RowGroup(index, np.sort(rows), width, bool(lengths[rows[-1]] < width)))
        return groups

    def _spread(self, batches: Sequence[Feeds], groups: list[RowGroup]) -> list[list[NDArray]]:
        """Runs the groups, costliest first, on the calling thread and ``threads - 1`` others."""
        session, pool = self._batch_session()
        parts: list[Any] = [None] * len(groups)
        cost = [len(g.rows) * (g.length or batches[g.feed]["input_ids"].shape[1]) for g in groups]
        todo = deque(sorted(range(len(groups)), key=cost.__getitem__, reverse=True))

        def drain() -> None:
            while True:
                try:
                    index = todo.popleft()
                except IndexError:
                    return
                try:
                    parts[index] = self._run_group(session, batches, groups[index])
                except BaseException:
                    todo.clear()  # the others need not run for nothing
                    raise

        helpers = [pool.submit(drain) for _ in range(min(self._threads, len(groups)) - 1)] if pool else []
        try:
            drain()
        finally:
            failed = [helper.exception() for helper in helpers if not helper.cancel()]
        for error in failed:
            if error is not None:
                raise error
        return parts

    def _batch_session(self) -> tuple[Any, ThreadPoolExecutor | None]:
        with self._lock:
            self._lifetime.check()
            if self._single is None:
                self._single = self._open_single()
            if self._pool is None and self._threads > 1:
                self._pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="accel-encoder")
            return self._single, self._pool

    def _run_group(self, session: Any, batches: Sequence[Feeds], group: RowGroup) -> list[NDArray]:
        feeds = batches[group.feed]
        rows, length = group.rows, group.length
        if len(rows) < len(feeds["input_ids"]):
            feeds = {name: array[rows, :length] for name, array in feeds.items()}
        elif length is not None and length < feeds["input_ids"].shape[1]:
            feeds = {name: array[:, :length] for name, array in feeds.items()}
        contiguous = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        try:
            return self._call(session, contiguous)
        except Exception as error:
            raise self._error(error, f"encoder batch {list(contiguous['input_ids'].shape)}") from error

    def _assemble(self, batches: Sequence[Feeds], groups: list[RowGroup], parts: list[list[NDArray]]) -> list[Feeds]:
        whole = {group.feed for group in groups if self._covers(batches[group.feed], group)}
        results: list[Feeds] = [{} for _ in batches]
        for group, part in zip(groups, parts, strict=True):
            batch, width = batches[group.feed]["input_ids"].shape
            for name, per_token, values in zip(self._outputs, self._per_token, part, strict=True):
                if group.ragged and per_token:
                    values[batches[group.feed]["attention_mask"][group.rows, : group.length] == 0] = 0
                if group.feed in whole:  # in the rows' own order
                    results[group.feed][name] = values
                    continue
                rest = (width, *values.shape[2:]) if per_token else values.shape[1:]
                target = results[group.feed].setdefault(name, np.zeros((batch, *rest), values.dtype))
                if per_token:
                    target[group.rows, : values.shape[1]] = values
                else:
                    target[group.rows] = values
        return results

    @staticmethod
    def _covers(feeds: Feeds, group: RowGroup) -> bool:
        batch, width = feeds["input_ids"].shape
        return len(group.rows) == batch and group.length in (None, width)


    def _free(self) -> bool:
        """Stops the threads and lets go of the engines; whether the session was open."""
        if not self._lifetime.close():
            return False
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)
        self._whole = self._single = None
        return True


__all__ = ["GROUP_TOKENS", "Feeds", "RowEncoder", "RowGroup"]
