"""CTranslate2, float32 and int8."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from accel.bench.peers.base import BindForward, Feeds, Forward, Generate, Peer


class CTranslate2(Peer):
    """Its transformers converter, ``Encoder`` and ``Generator``."""

    name = "ctranslate2"
    label = "CTranslate2"
    environment = "current"
    packages = ("ctranslate2", "transformers", "torch")
    quantization: ClassVar[str | None] = None  # the converter's; None stores float32
    compute_type: ClassVar[str] = "float32"

    def export(self) -> None:
        from ctranslate2.converters import TransformersConverter  # type: ignore[import-not-found]

        converter = TransformersConverter(str(self.source))
        converter.convert(str(self.artifact), quantization=self.quantization, force=True)

    def open_encoder(self) -> BindForward:
        import ctranslate2  # type: ignore[import-not-found]

        encoder = ctranslate2.Encoder(
            str(self.artifact), device="cpu", intra_threads=self.threads, compute_type=self.compute_type
        )

        def bind(feeds: Feeds) -> Forward:
            # It takes no mask: rows come without their padding, and it pads them to the longest again.
            masks = feeds["attention_mask"] > 0
            rows = [ids[mask].tolist() for ids, mask in zip(feeds["input_ids"], masks, strict=True)]
            return lambda: np.array(encoder.forward_batch(rows).last_hidden_state)

        return bind

    def open_decoder(self) -> Generate:
        import ctranslate2
        from tokenizers import Tokenizer

        generator = ctranslate2.Generator(
            str(self.artifact), device="cpu", intra_threads=self.threads, compute_type=self.compute_type
        )
        tokenizer = Tokenizer.from_file(str(self.source / "tokenizer.json"))

        def generate(prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
            result = generator.generate_batch(
                [[tokenizer.id_to_token(int(token)) for token in prompt[0]]],
                max_length=new_tokens,
                min_length=new_tokens,
                sampling_topk=1,
                beam_size=1,
                include_prompt_in_result=False,
            )
            return list(result[0].sequences_ids[0])

        return generate


class CTranslate2Int8(CTranslate2):
    """Its int8: weights per row, activations at run time per token, products in int8."""

    name = "ctranslate2-int8"
    label = "CTranslate2 int8"
    quantization = "int8"
    compute_type = "int8"
