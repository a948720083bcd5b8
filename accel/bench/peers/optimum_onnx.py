"""ONNX Runtime through optimum-onnx: its O2 graph for encoders, ``ORTModelForCausalLM`` for decoders."""

from __future__ import annotations

import shutil

from accel.bench.peers.base import BindForward, Generate, Peer, run_tool, transformers_generate
from accel.bench.peers.ort_common import bind_session_forward, open_session, session_options


class OrtO2(Peer):
    """optimum's TorchScript export, optimised at level O2 (fused Attention); run without its wrapper."""

    name = "ort-o2"
    label = "ONNX Runtime O2"
    environment = "optimum"
    packages = ("onnxruntime", "optimum-onnx", "transformers", "torch")

    def export(self) -> None:
        shutil.rmtree(self.artifact, ignore_errors=True)
        what = ("--task", "feature-extraction", "--library-name", "transformers", "--optimize", "O2")
        run_tool("optimum-cli", "export", "onnx", "-m", str(self.source), *what, str(self.artifact))

    def open_encoder(self) -> BindForward:
        return bind_session_forward(open_session(self.artifact / "model.onnx", self.threads))


class Optimum(Peer):
    """optimum's decoder with cache, run by its ``generate``."""

    name = "optimum"
    label = "optimum ONNX Runtime"
    environment = "optimum"
    packages = ("onnxruntime", "optimum-onnx", "transformers", "torch")

    def export(self) -> None:
        shutil.rmtree(self.artifact, ignore_errors=True)
        what = ("--task", "text-generation-with-past")
        run_tool("optimum-cli", "export", "onnx", "-m", str(self.source), *what, str(self.artifact))

    def open_decoder(self) -> Generate:
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-not-found]

        torch.set_num_threads(self.threads)
        model = ORTModelForCausalLM.from_pretrained(
            self.artifact, provider="CPUExecutionProvider", session_options=session_options(self.threads)
        )
        return transformers_generate(model)
