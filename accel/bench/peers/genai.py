"""onnxruntime-genai, fp32 on CPU."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from accel.bench.peers.base import Generate, Peer, fresh_folder, run_tool


class Genai(Peer):
    """Its model builder and its generator; the key/value buffers are as long as the request needs, not longer."""

    name = "genai"
    label = "onnxruntime-genai"
    environment = "current"
    packages = ("onnxruntime-genai", "onnxruntime", "transformers")

    def export(self) -> None:
        fresh_folder(self.artifact)
        where = ("-i", str(self.source), "-o", str(self.artifact), "-c", str(self.artifact / "builder_cache"))
        run_tool("onnxruntime_genai.models.builder", *where, "-p", "fp32", "-e", "cpu")

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
