"""Encoder session on OpenVINO's CPU plugin: no padding is computed, and batches run row by row over the cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from accel.engines.encoder_rows import Feeds, RowEncoder
from accel.engines.openvino.package import NAME, compile_graph, engine_error, import_openvino, translated_errors
from accel.engines.session import EngineInfo
from accel.errors import BundleError, EngineError

HINTS = {"fp32": "f32", "bf16": "bf16"}


class CompiledGraph:
    """A graph compiled for the CPU. Thread-safe: each call takes a request of its own.

    Args:
        graph: Lowered for OpenVINO; its weights lie beside it and are mapped.
        variant: What to compute in: a key of ``HINTS``.
        threads: Worker threads.
        streams: How many calls run at a time; they share the threads.

    Raises:
        DependencyError: See ``import_openvino``.
        EngineError: OpenVINO refuses the graph.
    """

    def __init__(self, graph: Path, variant: str, threads: int, streams: int) -> None:
        self._model: Any = compile_graph(graph, _settings(variant, threads, streams))
        with translated_errors(f"opening {graph.name}"):
            self.inputs = [port.get_any_name() for port in self._model.inputs]
            self.outputs = {port.get_any_name(): port.get_partial_shape() for port in self._model.outputs}
        self._spare: list[Any] = []  # requests that no thread uses; a list's pop and append are atomic

    def __call__(self, feeds: Feeds) -> list[NDArray]:
        """The outputs of contiguous feeds, in order. Raises what OpenVINO raises."""
        try:
            request = self._spare.pop()
        except IndexError:  # all are in use
            request = self._model.create_infer_request()
        request.infer(feeds, share_inputs=True, share_outputs=True)
        # The next call writes to the request's own tensors.
        outputs = [request.get_output_tensor(index).data.copy() for index in range(len(self.outputs))]
        self._spare.append(request)
        return outputs


class OpenVinoEncoderSession(RowEncoder):
    """Implements ``accel.engines.session.EncoderSession`` on the lowered graph; thread-safe. See ``RowEncoder``."""

    def __init__(self, graph: Path, variant: str, threads: int) -> None:
        """Opens the graph; see ``CompiledGraph``.

        Raises:
            DependencyError: See ``import_openvino``.
            EngineError: OpenVINO refuses the graph.
            BundleError: The graph takes no ``input_ids``.
        """
        version = import_openvino().get_version().split("-")[0]
        self.info = EngineInfo(NAME, version, "cpu", variant, threads)
        self._graph = graph
        whole = CompiledGraph(graph, variant, threads, streams=1)
        if "input_ids" not in whole.inputs:
            raise BundleError("The encoder graph takes no input_ids", remedy="Add the variant again: accel quantize")
        per_token = [len(shape) > 1 and bool(shape[1].is_dynamic) for shape in whole.outputs.values()]
        super().__init__(threads, whole, whole.inputs, list(whole.outputs), per_token)

    def run(self, feeds: Feeds) -> Feeds:
        """Runs one batch; see ``EncoderSession.run``. Per-token outputs are zero at right padding.

        Raises:
            InputError: A feed that the graph does not take.
            EngineError: OpenVINO failed; closed; used in a forked child.
        """
        return self.run_many([feeds])[0]

    def close(self) -> None:
        """Frees the models and stops the threads. Safe to call twice."""
        self._free()

    def _open_single(self) -> CompiledGraph:
        return CompiledGraph(self._graph, self.info.variant, self._threads, streams=self._threads)

    def _call(self, engine: CompiledGraph, feeds: Feeds) -> list[NDArray]:
        return engine({name: feeds[name] for name in engine.inputs})

    def _error(self, error: Exception, where: str) -> EngineError:
        return engine_error(error, where)


def _settings(variant: str, threads: int, streams: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": HINTS[variant],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": streams,
        # Pinned to cores, the threads of two processes would meet on the same ones.
        "ENABLE_CPU_PINNING": False,
    }


__all__ = ["HINTS", "CompiledGraph", "OpenVinoEncoderSession"]
