"""transformers' own exporter and runner: ``OnnxExporter`` with ``ort_fusions="cpu"``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.bench.peers.base import BindForward, Feeds, Forward, Generate, Peer, fresh_folder
from accel.bench.peers.ort_common import session_options


class TransformersOnnx(Peer):
    """Encoders through ``export``, decoders through ``export_for_generation`` (a prefill and a decode graph)."""

    name = "transformers-onnx"
    label = "transformers' exporter"
    environment = "current"
    packages = ("transformers", "onnxruntime", "torch", "onnxscript")

    def export(self) -> None:
        import torch
        from transformers import AutoModel, AutoModelForCausalLM
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        fresh_folder(self.artifact)
        automatic = AutoModelForCausalLM if self.decodes else AutoModel
        model = automatic.from_pretrained(self.source, dtype=torch.float32).eval()
        ids = torch.randint(5, 1000, (2, 16))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        config = OnnxConfig(dynamic=True, ort_fusions="cpu")
        if self.decodes:
            exported = OnnxExporter().export_for_generation(model, inputs, config)
        else:
            inputs["token_type_ids"] = torch.zeros_like(ids)
            exported = OnnxExporter().export(model, inputs, config)
        exported.save_pretrained(self.artifact)

    def _load(self) -> Any:
        import torch
        from transformers.exporters import ExportedModel

        torch.set_num_threads(self.threads)
        return ExportedModel.from_pretrained(self.artifact, session_options=session_options(self.threads))

    def open_encoder(self) -> BindForward:
        import torch

        model = self._load()

        def bind(feeds: Feeds) -> Forward:
            tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
            return lambda: model(**tensors).last_hidden_state.numpy()

        return bind

    def open_decoder(self) -> Generate:
        import torch

        runners = self._load().runners

        def generate(prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
            ids = torch.from_numpy(prompt)
            total = ids.shape[1]
            output = runners["prefill"](
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(total)[None]
            )
            tokens = [int(output.logits[0, -1].argmax())]
            while len(tokens) < new_tokens:
                output = runners["decode"](
                    input_ids=torch.tensor([[tokens[-1]]]),
                    attention_mask=torch.ones(1, total + 1, dtype=torch.long),
                    position_ids=torch.tensor([[total]]),
                    past_key_values=output.past_key_values,
                )
                tokens.append(int(output.logits[0, -1].argmax()))
                total += 1
            return tokens

        return generate
