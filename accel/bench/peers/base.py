"""What a peer of the benchmark offers to the worker that drives it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Feeds = dict[str, NDArray[np.int64]]
Forward = Callable[[], NDArray[np.float32]]
BindForward = Callable[[Feeds], Forward]
EmbedTexts = Callable[[list[str]], NDArray[np.float32]]
Generate = Callable[[NDArray[np.int64], int], list[int]]


class Unsupported(Exception):
    """The peer cannot do this, by its own account; the message is the reason that is reported."""


class Peer:
    """One way of running a model. Subclasses override what they can do.

    Args:
        model: The benchmark's name of the model (``minilm``, ``qwen05``, ``gpt2``).
        source: The Hugging Face model folder.
        artifact: Where ``export`` writes and the others read; peers without an export ignore it.
        threads: Threads the peer may compute with.
    """

    name: ClassVar[str]
    label: ClassVar[str]  # for tables and plots
    environment: ClassVar[str] = "host"  # "host": the benchmark's own; else a name of scripts/peers.sh
    packages: ClassVar[tuple[str, ...]] = ()  # distributions whose versions are recorded
    exports: ClassVar[bool] = True
    ours: ClassVar[bool] = False  # accel itself, in whatever variant
    export_of: ClassVar[str] = ""  # the peer whose export it runs, where that is not its own

    def __init__(self, model: str, source: Path, artifact: Path, threads: int) -> None:
        self.model, self.source, self.artifact, self.threads = model, source, artifact, threads
        self.selection: dict[str, str | None] = {}  # accel's own engine, variant and store, where they are chosen

    @property
    def decodes(self) -> bool:
        """Whether the model is a decoder."""
        return self.model != "minilm"

    def export(self) -> None:
        """Converts ``source`` into ``artifact``."""
        raise Unsupported(f"{self.label} exports nothing")

    def open_encoder(self) -> BindForward:
        """Returns a function from inputs (int64 [B, S]) to a forward that returns the last hidden state [B, S, H]."""
        raise Unsupported(f"{self.label} runs no raw encoder forward")

    def open_embedder(self) -> EmbedTexts:
        """Returns a function from texts to their sentence vectors, float32 [N, H], normalised."""
        raise Unsupported(f"{self.label} embeds no texts")

    def open_decoder(self) -> Generate:
        """Returns greedy generation: (prompt int64 [1, P], n) -> exactly n tokens, end-of-sequence ignored."""
        raise Unsupported(f"{self.label} generates no text")

    def token_gaps(self, prompt: NDArray[np.int64], tokens: list[int]) -> NDArray[np.float64]:
        """How far each of ``tokens``, which another peer chose after ``prompt``, is from this peer's best choice.

        Returns:
            float64 [N]: at each position, given the tokens before it, the largest logit less the token's (in nats).
        """
        raise Unsupported(f"{self.label} judges no tokens")


def run_tool(*arguments: str) -> None:
    """Runs an exporter's own command line in this environment; raises with the end of its output."""
    tool = Path(sys.executable).parent / arguments[0]
    command = [str(tool), *arguments[1:]] if tool.exists() else [sys.executable, "-m", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, file=sys.stderr)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise RuntimeError(lines[-1][:300] if lines else f"{arguments[0]} exited with status {done.returncode}")


def ignore_end_of_sequence(model: Any) -> None:
    """Makes ``generate`` of a transformers-like model run to ``max_new_tokens`` always."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.config.eos_token_id = None


def transformers_generate(model: Any) -> Generate:
    """Greedy ``model.generate`` of transformers (and of the wrappers that follow it)."""
    import torch

    ignore_end_of_sequence(model)

    def generate(prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
        ids = torch.from_numpy(prompt)
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
            )
        return output[0, prompt.shape[1] :].tolist()

    return generate


def fresh_folder(path: Path) -> Path:
    """Removes ``path`` and everything below it, then makes it anew."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path
