"""What the ONNX Runtime peers share: opening a session and a thin greedy loop over a graph with past and present."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.bench.peers.base import BindForward, Feeds, Forward, Generate


def session_options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options


def open_session(path: Path, threads: int) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])


def bind_session_forward(session: Any) -> BindForward:
    """A raw ``session.run`` on NumPy inputs, without any wrapper."""
    names = {value.name for value in session.get_inputs()}

    def bind(feeds: Feeds) -> Forward:
        used = {name: value for name, value in feeds.items() if name in names}
        return lambda: session.run(None, used)[0]

    return bind


Step = Callable[[dict[str, NDArray], dict[str, Any]], tuple[NDArray[np.float32], list[Any]]]


def greedy_loop(session: Any, keep_values: bool = False) -> Generate:
    """Greedy decoding in a few lines of Python: what anybody would write around a graph with a cache.

    Args:
        session: Its inputs are ``input_ids``, perhaps ``attention_mask`` and ``position_ids``, and ``past...``; its
            outputs are the logits and the present, in the order of the past.
        keep_values: Past and present stay OrtValues; else they pass through NumPy, which copies them at each step.
    """
    inputs = {value.name: value for value in session.get_inputs()}
    past_names = [name for name in inputs if name.startswith("past")]
    run = _step_on_values(session) if keep_values else _step_on_arrays(session)

    def empty_past() -> dict[str, Any]:
        shapes = {name: inputs[name].shape for name in past_names}
        empty = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
        return {name: _ort_value(value) for name, value in empty.items()} if keep_values else empty

    def step(ids: NDArray[np.int64], past: dict[str, Any], total: int) -> tuple[int, dict[str, Any]]:
        feeds = {"input_ids": ids}
        if "attention_mask" in inputs:
            feeds["attention_mask"] = np.ones((1, total), np.int64)
        if "position_ids" in inputs:
            feeds["position_ids"] = np.arange(total - ids.shape[1], total, dtype=np.int64)[None]
        logits, present = run(feeds, past)
        return int(logits[0, -1].argmax()), dict(zip(past_names, present, strict=True))

    def generate(prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
        ids, past, total = prompt, empty_past(), prompt.shape[1]
        tokens: list[int] = []
        while len(tokens) < new_tokens:
            token, past = step(ids, past, total)
            tokens.append(token)
            ids, total = np.array([[token]], np.int64), total + 1
        return tokens

    return generate


def _step_on_arrays(session: Any) -> Step:
    def run(feeds: dict[str, NDArray], past: dict[str, Any]) -> tuple[NDArray[np.float32], list[Any]]:
        logits, *present = session.run(None, {**feeds, **past})
        return logits, present

    return run


def _step_on_values(session: Any) -> Step:
    names = [value.name for value in session.get_outputs()]

    def run(feeds: dict[str, NDArray], past: dict[str, Any]) -> tuple[NDArray[np.float32], list[Any]]:
        values = {name: _ort_value(value) for name, value in feeds.items()}
        logits, *present = session.run_with_ort_values(names, {**values, **past})
        return logits.numpy(), present

    return run


def _ort_value(array: NDArray) -> Any:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(array)
