"""Eager PyTorch through transformers: the reference that every answer is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel.bench.peers.base import BindForward, Feeds, Forward, Generate, Peer, transformers_generate


class TorchEager(Peer):
    """``AutoModel`` with scaled dot product attention, fp32; ``generate`` for decoders."""

    name = "torch"
    label = "eager PyTorch"
    packages = ("torch", "transformers")
    exports = False

    def open_encoder(self) -> BindForward:
        import torch
        from transformers import AutoModel

        torch.set_num_threads(self.threads)
        model = AutoModel.from_pretrained(self.source, dtype=torch.float32, attn_implementation="sdpa").eval()

        def bind(feeds: Feeds) -> Forward:
            tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}

            def forward() -> NDArray[np.float32]:
                with torch.inference_mode():
                    return model(**tensors).last_hidden_state.numpy()

            return forward

        return bind

    def open_decoder(self) -> Generate:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(self.threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            self.source, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        return transformers_generate(self._model)

    def token_gaps(self, prompt: NDArray[np.int64], tokens: list[int]) -> NDArray[np.float64]:
        import torch

        ids = torch.from_numpy(np.concatenate([prompt[0], tokens])[None, :-1])
        with torch.inference_mode():
            logits = self._model(ids, logits_to_keep=len(tokens)).logits[0].double().numpy()
        return logits.max(axis=-1) - logits[np.arange(len(tokens)), tokens]
