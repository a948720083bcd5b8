"""onnxruntime-genai on CPU: fp32, and its block-quantised weights."""

from __future__ import annotations

import json
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from accel.bench.peers.base import Generate, Peer, fresh_folder, run_tool


class Genai(Peer):
    """Its model builder and its generator; the key/value buffers are as long as the request needs, not longer."""

    name = "genai"
    label = "onnxruntime-genai"
    environment = "current"
    packages = ("onnxruntime-genai", "onnxruntime", "transformers")
    precision: ClassVar[str] = "fp32"  # the builder's name for it

    def export(self) -> None:
        fresh_folder(self.artifact)
        where = ("-i", str(self.source), "-o", str(self.artifact), "-c", str(self.artifact / "builder_cache"))
        run_tool("onnxruntime_genai.models.builder", *where, "-p", self.precision, "-e", "cpu")

    def open_decoder(self) -> Generate:
        import onnxruntime_genai as genai  # type: ignore[import-not-found]

        config = genai.Config(str(self.artifact))
        options = {"session_options": {"intra_op_num_threads": self.threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        model = genai.Model(config)

        def generate(prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
            length = prompt.shape[1] + new_tokens
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
            generator = genai.Generator(model, parameters)
            generator.append_tokens(prompt.astype(np.int32))
            for _ in range(new_tokens):
                generator.generate_next_token()
            return [int(token) for token in generator.get_sequence(0)[prompt.shape[1] :]]

        return generate


class GenaiInt8(Genai):
    """MatMulNBits in 8 bits, blocks of 32, accuracy level 4 (the builder's choice), the embedding in fp32."""

    name = "genai-int8"
    label = "onnxruntime-genai int8"
    precision = "int8"


class GenaiInt4(Genai):
    """MatMulNBits and GatherBlockQuantized in 4 bits, blocks of 32, accuracy level 4 (the builder's choice)."""

    name = "genai-int4"
    label = "onnxruntime-genai int4"
    precision = "int4"
