"""Encoder session on ONNX Runtime: no padding is computed, and batches run row by row over the cores."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.engines.encoder_rows import GROUP_TOKENS, Feeds, RowEncoder, RowGroup
from accel.engines.ort.common import NAME, engine_error, import_onnxruntime, open_graph
from accel.engines.session import EngineInfo
from accel.errors import EngineError

# A run of a row of so few tokens takes so little that binding its arrays anew each time would show, unless its
# outputs are large: they are kept per length and per concurrent caller, and copied.
SHORT_ROW = 32
SHORT_ROW_BYTES = 128 << 10


class ShortRow:
    """The inputs and outputs of one short row, bound once and written in place.

    Args:
        session: The ONNX Runtime session.
        feeds: All of the graph's inputs, int64 [1, S].
        outputs: Outputs of a run of that length, for their shapes.
    """

    def __init__(self, ort: Any, session: Any, feeds: Feeds, outputs: Feeds) -> None:
        self._session, self._io = session, session.io_binding()
        self._feeds = {name: array.copy() for name, array in feeds.items()}
        self._outputs = {name: np.empty_like(array) for name, array in outputs.items()}
        for name, array in self._feeds.items():
            self._io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in self._outputs.items():
            self._io.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        if "attention_mask" in self._feeds:
            self._feeds["attention_mask"].fill(1)

    def run(self, feeds: Feeds) -> Feeds:
        """Runs it; no token is padding."""
        np.copyto(self._feeds["input_ids"], feeds["input_ids"], casting="no")
        if "token_type_ids" in self._feeds:
            types = feeds.get("token_type_ids")
            if types is None:
                self._feeds["token_type_ids"].fill(0)
            else:
                np.copyto(self._feeds["token_type_ids"], types, casting="no")
        self._session.run_with_iobinding(self._io)
        return {name: array.copy() for name, array in self._outputs.items()}


class OrtEncoderSession(RowEncoder):
    """Implements ``accel.engines.session.EncoderSession``; thread-safe. See ``RowEncoder`` for batches."""

    def __init__(self, path: Path, variant: str, threads: int) -> None:
        """Opens the graph.

        Raises:
            DependencyError, EngineError: see ``open_graph``.
        """
        ort = self._ort = import_onnxruntime()
        self.info = EngineInfo(NAME, ort.__version__, "cpu", variant, threads)
        self._path = path
        self._short_rows: defaultdict[int, list[ShortRow]] = defaultdict(list)  # by length; one per thread at most
        session = open_graph(path, threads, variant)
        inputs, outputs = session.get_inputs(), session.get_outputs()
        sequence = next(node.shape[1] for node in inputs if node.name == "input_ids")
        per_token = [len(node.shape) > 1 and node.shape[1] == sequence for node in outputs]
        super().__init__(threads, session, [node.name for node in inputs], [node.name for node in outputs], per_token)

    def run(self, feeds: Feeds) -> Feeds:
        """Runs one batch.

        Args:
            feeds: ``input_ids`` int64 [B, S], and as the graph has them ``attention_mask`` and
                ``token_type_ids``. Without a mask, all tokens are real; without types, all are 0.

        Returns:
            The outputs by name; per-token outputs are zero at right padding.

        Raises:
            InputError: A feed that the graph does not take.
            EngineError: ONNX Runtime failed; closed; used in a forked child.
        """
        if len(feeds["input_ids"]) == 1 and feeds.keys() <= self._inputs:
            mask = feeds.get("attention_mask")
            if mask is None or mask.all():
                return self._run_row(feeds)
        return self.run_many([feeds])[0]

    def _run_row(self, feeds: Feeds) -> Feeds:
        """One whole row, the call whose own cost shows: as it is, on all threads."""
        self._lifetime.check()
        shape = feeds["input_ids"].shape
        spare = self._short_rows[shape[1]] if shape[1] <= SHORT_ROW else None
        try:
            try:
                row = spare.pop() if spare else None  # a list's pop and append are atomic
            except IndexError:  # another thread took it in between
                row = None
            if row is not None:
                outputs = row.run(feeds)
            else:
                feeds = self._complete(feeds)
                outputs = dict(zip(self._outputs, self._whole.run(self._outputs, feeds), strict=True))
                small = sum(array.nbytes for array in outputs.values()) <= SHORT_ROW_BYTES
                row = ShortRow(self._ort, self._whole, feeds, outputs) if spare is not None and small else None
        except Exception as error:
            raise engine_error(error, f"encoder batch {list(shape)}") from error
        if spare is not None and row is not None:
            spare.append(row)
        return outputs

    def close(self) -> None:
        """Frees the sessions and stops the threads. Safe to call twice."""
        if self._free():
            self._short_rows.clear()

    def _open_single(self) -> Any:
        return open_graph(self._path, 1, self.info.variant)

    def _call(self, engine: Any, feeds: Feeds) -> list[NDArray]:
        found: list[NDArray] = engine.run(self._outputs, feeds)
        return found

    def _error(self, error: Exception, where: str) -> EngineError:
        return engine_error(error, where)


__all__ = ["GROUP_TOKENS", "OrtEncoderSession", "RowGroup"]
