"""OpenVINO through optimum-intel, held to fp32 (on some CPUs its default is bf16)."""

from __future__ import annotations

import shutil
from typing import Any

from accel.bench.peers.base import BindForward, Feeds, Forward, Generate, Peer, run_tool, transformers_generate


class OpenVINO(Peer):
    """Encoders run on the bare compiled model, decoders through ``OVModelForCausalLM.generate``."""

    name = "openvino"
    label = "OpenVINO"
    environment = "openvino"
    packages = ("openvino", "optimum-intel", "transformers", "torch")

    def export(self) -> None:
        shutil.rmtree(self.artifact, ignore_errors=True)
        task = "text-generation-with-past" if self.decodes else "feature-extraction"
        what = ("--task", task, "--library", "transformers", "--weight-format", "fp32")
        run_tool("optimum-cli", "export", "openvino", "-m", str(self.source), *what, str(self.artifact))

    def _settings(self) -> dict[str, Any]:
        return {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }

    def open_encoder(self) -> BindForward:
        import openvino  # type: ignore[import-not-found]

        core = openvino.Core()
        request = core.compile_model(self.artifact / "openvino_model.xml", "CPU", self._settings())
        names = {name for port in request.inputs for name in port.get_names()}
        infer = request.create_infer_request()

        def bind(feeds: Feeds) -> Forward:
            used = {name: value for name, value in feeds.items() if name in names}
            return lambda: infer.infer(used, share_inputs=True, share_outputs=True)[0]

        return bind

    def open_decoder(self) -> Generate:
        import torch
        from optimum.intel import OVModelForCausalLM  # type: ignore[import-not-found]

        torch.set_num_threads(self.threads)
        settings = {**self._settings(), "KV_CACHE_PRECISION": "f32"}
        return transformers_generate(OVModelForCausalLM.from_pretrained(self.artifact, ov_config=settings))
