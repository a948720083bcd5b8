"""Encoder session on OpenVINO's CPU plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.engines.lifetime import Lifetime
from accel.engines.openvino.package import NAME, engine_error, import_openvino, open_core, translated_errors
from accel.engines.session import EngineInfo
from accel.errors import BundleError, InputError

Feeds = dict[str, NDArray]
HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEncoderSession:
    """Implements ``accel.engines.session.EncoderSession`` on the lowered ``openvino`` graph; thread-safe.

    Right padding that all rows share is cut off. Calls of several threads wait for each other: each has all threads.
    """

    def __init__(self, graph: Path, variant: str, threads: int) -> None:
        """Opens the graph.

        Args:
            graph: Lowered for OpenVINO; its weights lie beside it and are mapped.
            variant: What to compute in: a key of ``HINTS``.
            threads: Worker threads.

        Raises:
            DependencyError: See ``import_openvino``.
            EngineError: OpenVINO refuses the graph.
            BundleError: The graph takes no ``input_ids``.
        """
        version = import_openvino().get_version().split("-")[0]
        self.info = EngineInfo(NAME, version, "cpu", variant, threads)
        self._lifetime = Lifetime("encoder")
        with translated_errors(f"opening {graph.name}"):
            self._model: Any = open_core().compile_model(str(graph), "CPU", _settings(variant, threads))
            self._inputs = [port.get_any_name() for port in self._model.inputs]
            shapes = {port.get_any_name(): port.get_partial_shape() for port in self._model.outputs}
        if "input_ids" not in self._inputs:
            raise BundleError("The encoder graph takes no input_ids", remedy="Add the variant again: accel quantize")
        self._outputs = list(shapes)
        self._per_token = {name for name, shape in shapes.items() if len(shape) > 1 and shape[1].is_dynamic}
        self._spare: list[Any] = []  # infer requests that no thread uses; a list's pop and append are atomic

    def run(self, feeds: Feeds) -> Feeds:
        """Runs one batch; see ``EncoderSession.run``. Per-token outputs are zero at padding that was cut off.

        Raises:
            InputError: A feed that the model does not take.
            EngineError: OpenVINO failed; closed; used in a forked child.
        """
        self._lifetime.check()
        complete = self._complete(feeds)
        batch, width = complete["input_ids"].shape
        seen = np.flatnonzero(complete["attention_mask"].any(axis=0))
        longest = int(seen[-1]) + 1 if seen.size else 1
        given = {name: np.ascontiguousarray(complete[name][:, :longest]) for name in self._inputs}
        try:
            outputs = self._infer(given)
        except Exception as error:
            raise engine_error(error, f"encoder batch {[batch, longest]}") from error
        return {name: self._widen(name, array, width) for name, array in outputs.items()}

    def close(self) -> None:
        """Frees the model. Safe to call twice."""
        if self._lifetime.close() and not self._lifetime.forked:
            self._spare.clear()
            self._model = None

    def _infer(self, feeds: Feeds) -> Feeds:
        try:
            request = self._spare.pop()
        except IndexError:  # all are in use
            request = self._model.create_infer_request()
        request.infer(feeds, share_inputs=True, share_outputs=True)
        # The next call writes to the request's own tensors.
        outputs = {name: request.get_output_tensor(i).data.copy() for i, name in enumerate(self._outputs)}
        self._spare.append(request)
        return outputs

    def _complete(self, feeds: Feeds) -> Feeds:
        takes = {*self._inputs, "attention_mask"}
        unknown = sorted(set(feeds) - takes)
        if unknown:
            remedy = f"It takes {', '.join(sorted(takes))}"
            raise InputError(f"this model takes no {unknown[0]}", where=unknown[0], remedy=remedy)
        shape = feeds["input_ids"].shape
        absent: dict[str, Callable[..., NDArray]] = {"attention_mask": np.ones}
        absent |= dict.fromkeys(set(self._inputs) - {"input_ids", "attention_mask"}, np.zeros)
        return {name: make(shape, np.int64) for name, make in absent.items() if name not in feeds} | feeds

    def _widen(self, name: str, array: NDArray, width: int) -> NDArray:
        if name not in self._per_token or array.shape[1] == width:
            return array
        wide = np.zeros((len(array), width, *array.shape[2:]), array.dtype)
        wide[:, : array.shape[1]] = array
        return wide


def _settings(variant: str, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": HINTS[variant],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        # Pinned to cores, the threads of two processes would meet on the same ones.
        "ENABLE_CPU_PINNING": False,
    }


__all__ = ["HINTS", "OpenVinoEncoderSession"]
