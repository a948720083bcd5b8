"""Encoder session on ONNX Runtime's CUDA provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.engines.capturing import undisturbed
from accel.engines.gpu_memory import OutOfMemoryError
from accel.engines.lifetime import Lifetime
from accel.engines.ort_cuda.feeds import Feeds, mask_feeds
from accel.engines.ort_cuda.provider import NAME, Provider, may_be_disturbed, run_error
from accel.engines.session import EngineInfo
from accel.errors import BundleError, EngineBrokenError, InputError
from accel.spec import OUTPUT_NAMES, ArchSpec

TAKEN = ("input_ids", "attention_mask", "token_type_ids")
_MASKS = ("key_mask", "key_mask_shape")


class OrtCudaEncoderSession:
    """Implements ``accel.engines.session.EncoderSession`` on the lowered ``ort-cuda`` graph; thread-safe.

    Right padding that all rows share is cut off. A batch that does not fit in memory runs in halves.
    """

    def __init__(self, graph: Path, arch: ArchSpec, variant: str, provider: Provider) -> None:
        """Opens the graph.

        Raises:
            OutOfMemoryError: The weights do not fit.
            EngineUnavailableError: See ``Provider.open``.
            BundleError: The graph is not one of a lowered encoder of this task.
        """
        self._provider = provider
        self.info = EngineInfo(NAME, provider.ort.__version__, f"{provider.device}:{provider.index}", variant, 1)
        self._lifetime = Lifetime("encoder")
        self._broken: EngineBrokenError | None = None
        self._session: Any = provider.open(graph)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._inputs = {node.name for node in inputs}
        self._outputs = [node.name for node in outputs]
        missing = [name for name in ("input_ids", *_MASKS) if name not in self._inputs]
        missing += [name for name in OUTPUT_NAMES[arch.task] if name not in self._outputs]
        if missing:
            what = f"The encoder graph lacks {', '.join(missing)}"
            raise BundleError(what, where=graph.name, remedy="Add the variant again: accel quantize")
        sequence = next(node.shape[1] for node in inputs if node.name == "input_ids")
        self._per_token = {node.name for node in outputs if len(node.shape) > 1 and node.shape[1] == sequence}

    def run(self, feeds: Feeds) -> Feeds:
        """Runs one batch; see ``EncoderSession.run``. Per-token outputs are zero at padding that was cut off.

        Raises:
            InputError: A feed that the model does not take.
            EngineError: Closed, used after a fork, out of memory, or ONNX Runtime failed.
            EngineBrokenError: CUDA failed; nothing runs on this session again.
        """
        self._lifetime.check()
        if self._broken is not None:
            raise self._broken
        complete = self._complete(feeds)
        batch, width = complete["input_ids"].shape
        seen = np.flatnonzero(complete["attention_mask"].any(axis=0))
        longest = int(seen[-1]) + 1 if seen.size else 1
        outputs = self._run_rows({name: array[:, :longest] for name, array in complete.items()})
        return {name: self._widen(name, array, batch, width) for name, array in outputs.items()}

    def close(self) -> None:
        """Frees the session. Safe to call twice."""
        if self._lifetime.close() and not self._lifetime.forked:
            self._session = None

    def _complete(self, feeds: Feeds) -> Feeds:
        shape = feeds["input_ids"].shape
        takes = {name for name in TAKEN if name in self._inputs or name == "attention_mask"}
        unknown = sorted(set(feeds) - takes)
        if unknown:
            remedy = f"It takes {', '.join(sorted(takes))}"
            raise InputError(f"this model takes no {unknown[0]}", where=unknown[0], remedy=remedy)
        absent = {"attention_mask": np.ones(shape, np.int64)}
        if "token_type_ids" in takes:
            absent["token_type_ids"] = np.zeros(shape, np.int64)
        return {**absent, **feeds}

    def _run_rows(self, feeds: Feeds) -> Feeds:
        given = {**feeds, **mask_feeds(feeds["attention_mask"])}
        given = {name: np.ascontiguousarray(given[name]) for name in self._inputs}
        rows = len(feeds["input_ids"])
        try:
            return undisturbed(lambda: self._run_bound(given), suspects=may_be_disturbed)
        except Exception as error:
            found = run_error(error, f"encoder batch {list(feeds['input_ids'].shape)}")
            if isinstance(found, EngineBrokenError):
                self._broken = found
            if not isinstance(found, OutOfMemoryError) or rows == 1:
                raise found from error
        parts = [self._run_rows({name: array[half] for name, array in feeds.items()}) for half in _halves(rows)]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def _run_bound(self, feeds: Feeds) -> Feeds:
        """Outputs stay on the device until the run is done, and are copied once."""
        io, place = self._session.io_binding(), (self._provider.device, self._provider.index)
        for name, array in feeds.items():
            value = self._provider.host(array) if name == "key_mask_shape" else self._provider.upload(array)
            io.bind_ortvalue_input(name, value)
        for name in self._outputs:
            io.bind_output(name, *place)
        self._session.run_with_iobinding(io)
        return {name: value.numpy() for name, value in zip(self._outputs, io.get_outputs(), strict=True)}

    def _widen(self, name: str, array: NDArray, batch: int, width: int) -> NDArray:
        if name not in self._per_token or array.shape[1] == width:
            return array
        wide = np.zeros((batch, width, *array.shape[2:]), array.dtype)
        wide[:, : array.shape[1]] = array
        return wide


def _halves(rows: int) -> tuple[slice, slice]:
    return slice(0, rows // 2), slice(rows // 2, rows)


__all__ = ["OrtCudaEncoderSession"]
