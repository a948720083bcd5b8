"""sentence-transformers: its PyTorch backend, and its ONNX backend plain and optimised."""

from __future__ import annotations

from typing import Any

from accel.bench.peers.base import EmbedTexts, Peer, fresh_folder
from accel.bench.peers.ort_common import session_options


class SentenceTransformersTorch(Peer):
    """``SentenceTransformer.encode`` with its defaults (it sorts by length, batches of 32)."""

    name = "sentence-transformers"
    label = "sentence-transformers (torch)"
    environment = "current"
    packages = ("sentence-transformers", "transformers", "torch")
    exports = False

    def open_embedder(self) -> EmbedTexts:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(self.threads)
        return _encode(SentenceTransformer(str(self.source), device="cpu"))


class SentenceTransformersOnnx(Peer):
    """The ONNX backend on optimum's plain export."""

    name = "sentence-transformers-onnx"
    label = "sentence-transformers (ONNX)"
    environment = "optimum"
    packages = ("sentence-transformers", "optimum-onnx", "onnxruntime", "transformers", "torch")
    file_name = "model.onnx"

    def export(self) -> None:
        from sentence_transformers import SentenceTransformer, export_optimized_onnx_model

        fresh_folder(self.artifact)
        choice = {"provider": "CPUExecutionProvider", "export": True}
        model = SentenceTransformer(str(self.source), backend="onnx", model_kwargs=choice)
        model.save_pretrained(str(self.artifact))
        if self.file_name != "model.onnx":
            export_optimized_onnx_model(model, "O2", str(self.artifact))

    def open_embedder(self) -> EmbedTexts:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(self.threads)
        choice = {
            "provider": "CPUExecutionProvider",
            "file_name": f"onnx/{self.file_name}",
            "session_options": session_options(self.threads),
        }
        return _encode(SentenceTransformer(str(self.artifact), backend="onnx", model_kwargs=choice))


class SentenceTransformersOnnxO2(SentenceTransformersOnnx):
    """The ONNX backend on the graph optimised at level O2."""

    name = "sentence-transformers-onnx-o2"
    label = "sentence-transformers (ONNX O2)"
    file_name = "model_O2.onnx"


def _encode(model: Any) -> EmbedTexts:
    return lambda texts: model.encode(texts, show_progress_bar=False, convert_to_numpy=True)
