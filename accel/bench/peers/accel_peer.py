"""accel itself, through its public interface."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.bench.peers.base import BindForward, EmbedTexts, Feeds, Forward, Generate, Peer


class AccelPeer(Peer):
    """``accel.export`` and ``accel.load``; the loaded model is called as a user calls it, wrapper included."""

    name = "accel"
    label = "accel"
    packages = ("accelrt", "onnxruntime")
    engine = "auto"

    def export(self) -> None:
        import accel

        shutil.rmtree(self.artifact, ignore_errors=True)
        accel.export(str(self.source), str(self.artifact))

    def _load(self) -> Any:
        import accel

        return accel.load(str(self.artifact), engine=self.engine, threads=self.threads)

    def open_encoder(self) -> BindForward:
        model = self._load()

        def bind(feeds: Feeds) -> Forward:
            return lambda: model(**feeds).last_hidden_state

        return bind

    def open_embedder(self) -> EmbedTexts:
        model = self._load()
        return lambda texts: model.embed(texts)

    def open_decoder(self) -> Generate:
        model = self._load()

        def generate(prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
            result = model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=[])
            return list((result[0] if isinstance(result, list) else result).ids)

        return generate


class AccelTorchPeer(AccelPeer):
    """The bundle on its PyTorch reference engine: eager PyTorch where only the bundle is at hand (``accel bench``)."""

    name = "accel-torch"
    label = "eager PyTorch (from the bundle)"
    packages = ("torch", "transformers")
    engine = "torch"
