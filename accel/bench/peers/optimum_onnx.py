"""ONNX Runtime through optimum-onnx: encoders at O2 and in dynamic int8, ``ORTModelForCausalLM`` for decoders."""

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


class OrtInt8(Peer):
    """``quantize_dynamic`` on optimum's plain export, per channel (on the optimised graph it fails); no wrapper."""

    name = "ort-int8"
    label = "ONNX Runtime dynamic int8"
    environment = "optimum"
    packages = ("onnxruntime", "optimum-onnx", "onnx", "transformers", "torch")

    def export(self) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        shutil.rmtree(self.artifact, ignore_errors=True)
        what = ("--task", "feature-extraction", "--library-name", "transformers")
        run_tool("optimum-cli", "export", "onnx", "-m", str(self.source), *what, str(self.artifact))
        plain, quantized = self.artifact / "model.onnx", self.artifact / "model_int8.onnx"
        quantize_dynamic(
            plain,
            quantized,
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},  # products of two activations stay as they are
        )

    def open_encoder(self) -> BindForward:
        return bind_session_forward(open_session(self.artifact / "model_int8.onnx", self.threads))


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
