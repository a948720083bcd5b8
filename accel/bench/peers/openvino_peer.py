"""OpenVINO through optimum-intel and NNCF: fp32, int8 and int4 weights, int8 throughout; computing in f32 or bf16.

The type it computes in is always said: left out, it is bf16 on CPUs that have it, and "int8" would be int8 with bf16.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

from accel.bench.peers.base import BindForward, Feeds, Forward, Generate, Peer, run_tool, transformers_generate
from accel.bench.sentences import tokenize

CALIBRATION_SENTENCES = 128  # the last of the benchmark's; the answers are compared on the first


class OpenVINO(Peer):
    """Encoders run on the bare compiled model, decoders through ``OVModelForCausalLM.generate``."""

    name = "openvino"
    label = "OpenVINO"
    environment = "openvino"
    packages = ("openvino", "optimum-intel", "nncf", "transformers", "torch")
    weights: ClassVar[str] = "fp32"  # optimum-intel's --weight-format
    computes_in: ClassVar[str] = "f32"  # what is not quantised, and the cache

    def export(self) -> None:
        self._convert(self.weights)

    def _convert(self, weights: str) -> None:
        shutil.rmtree(self.artifact, ignore_errors=True)
        task = "text-generation-with-past" if self.decodes else "feature-extraction"
        what = ("--task", task, "--library", "transformers", "--weight-format", weights)
        run_tool("optimum-cli", "export", "openvino", "-m", str(self.source), *what, str(self.artifact))

    def _settings(self) -> dict[str, Any]:
        return {
            "INFERENCE_PRECISION_HINT": self.computes_in,
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
        settings = {**self._settings(), "KV_CACHE_PRECISION": self.computes_in}
        return transformers_generate(OVModelForCausalLM.from_pretrained(self.artifact, ov_config=settings))


class OpenVINOBf16(OpenVINO):
    """The fp32 model computed in bf16, OpenVINO's default on CPUs that have it."""

    name = "openvino-bf16"
    label = "OpenVINO bf16"
    export_of = "openvino"
    computes_in = "bf16"


class OpenVINOInt8(OpenVINO):
    """int8 weights per row; its matrix products round activations to int8 in groups of 32 at run time."""

    name = "openvino-int8"
    label = "OpenVINO int8"
    weights = "int8"


class OpenVINOInt8Bf16(OpenVINOInt8):
    """The same model, the rest computed in bf16."""

    name = "openvino-int8-bf16"
    label = "OpenVINO int8, bf16"
    export_of = "openvino-int8"
    computes_in = "bf16"


class OpenVINOInt4(OpenVINO):
    """int4 weights in groups, embedding and head in int8: optimum-intel's choice."""

    name = "openvino-int4"
    label = "OpenVINO int4"
    weights = "int4"


class OpenVINOInt4Bf16(OpenVINOInt4):
    """The same model, the rest computed in bf16."""

    name = "openvino-int4-bf16"
    label = "OpenVINO int4, bf16"
    export_of = "openvino-int4"
    computes_in = "bf16"


class OpenVINOStatic(OpenVINO):
    """int8 weights and activations with calibrated scales: NNCF's post-training quantisation for transformers."""

    name = "openvino-static-int8"
    label = "OpenVINO static int8"

    def export(self) -> None:
        import nncf  # type: ignore[import-not-found]
        import openvino

        self._convert("fp32")
        path = self.artifact / "openvino_model.xml"
        model = openvino.Core().read_model(path)
        names = {name for port in model.inputs for name in port.get_names()}
        texts = json.loads(Path(os.environ["ACCEL_BENCH_SENTENCES"]).read_text(encoding="utf-8"))
        samples = [
            {name: value for name, value in tokenize(self.source, [text]).items() if name in names}
            for text in texts[-CALIBRATION_SENTENCES:]
        ]
        quantized = nncf.quantize(
            model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
        )
        written = self.artifact / "quantized.xml"
        openvino.save_model(quantized, written, compress_to_fp16=False)
        del model, quantized  # the fp32 weights are mapped from the file that is replaced
        for suffix in (".xml", ".bin"):
            written.with_suffix(suffix).replace(path.with_suffix(suffix))


class OpenVINOStaticBf16(OpenVINOStatic):
    """The same model, the rest computed in bf16."""

    name = "openvino-static-int8-bf16"
    label = "OpenVINO static int8, bf16"
    export_of = "openvino-static-int8"
    computes_in = "bf16"
