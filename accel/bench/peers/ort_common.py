"""What the ONNX Runtime peers share: opening a session and a thin greedy loop over a graph with past and present."""

from __future__ import annotations

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


def greedy_loop(session: Any) -> Generate:
    """Greedy decoding in a few lines of Python: what anybody would write around a graph with a cache.

    Past and present stay OrtValues, so no step copies the cache through NumPy.
    """
    from onnxruntime import OrtValue

    inputs = {value.name: value for value in session.get_inputs()}
    past_names = [name for name in inputs if name.startswith("past")]
    output_names = [value.name for value in session.get_outputs()]

    def empty_past() -> dict[str, Any]:
        shapes = {name: inputs[name].shape for name in past_names}
        empty = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
        return {name: OrtValue.ortvalue_from_numpy(value) for name, value in empty.items()}

    def step(ids: NDArray[np.int64], past: dict[str, Any], total: int) -> tuple[int, dict[str, Any]]:
        feeds = {"input_ids": ids}
        if "attention_mask" in inputs:
            feeds["attention_mask"] = np.ones((1, total), np.int64)
        if "position_ids" in inputs:
            feeds["position_ids"] = np.arange(total - ids.shape[1], total, dtype=np.int64)[None]
        values = {name: OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
        outputs = session.run_with_ort_values(output_names, {**values, **past})
        logits = outputs[0].numpy()
        return int(logits[0, -1].argmax()), dict(zip(past_names, outputs[1:], strict=True))

    def generate(prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
        ids, past, total = prompt, empty_past(), prompt.shape[1]
        tokens: list[int] = []
        while len(tokens) < new_tokens:
            token, past = step(ids, past, total)
            tokens.append(token)
            ids, total = np.array([[token]], np.int64), total + 1
        return tokens

    return generate
