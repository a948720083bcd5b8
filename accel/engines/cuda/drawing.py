"""Tokens drawn on the device: by recorded runs, as the host says, and from logits that another engine left there."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from accel_kernels.sample import FIELDS, MAX_VOCAB, SampleSpace, sample, sample_workspace
from numpy.typing import NDArray

from accel.engines.cuda.device import Device
from accel.engines.session import ChosenTokens

# float64 [R, 5], how each row's token is drawn: temperature (0: not at all), top_k, top_p, min_p, uniform.
Table = NDArray[np.float64]


class DrawTable:
    """Where the host writes how tokens are drawn, and the device reads it: by turns, if there are several.

    Args:
        rows: R.
        turns: How many tables.
    """

    def __init__(self, rows: int, turns: int, device: Device) -> None:
        self.memory = device.pinned(turns * rows * FIELDS).view(torch.float64).view(turns, rows, FIELDS)
        self._numbers = self.memory.numpy()

    def write(self, turn: int, table: Table) -> None:
        """The first rows' draws. No run under way may read that turn's."""
        self._numbers[turn, : len(table)] = table

    def draw(
        self, logits: torch.Tensor, best: torch.Tensor, turn: torch.Tensor | None = None,
        space: SampleSpace | None = None,
    ) -> None:  # fmt: skip
        """Leaves tokens and their logits in ``best``, int64 [2R].

        Args:
            logits: float32 [R, V].
            best: Written.
            turn: int32 [1], which table holds, if there are several.
            space: What is needed meanwhile; None: the run's own memory.
        """
        rows = len(best) // 2
        draws = self.memory[0, :rows] if turn is None else self.memory
        space = space or sample_workspace(rows, logits.shape[1], logits.device)
        sample(logits, draws, best[:rows], values_of(best), space, turn=turn)


def values_of(best: torch.Tensor) -> torch.Tensor:
    """The second half of int64 [2R] as float32 [R]."""
    rows = len(best) // 2
    return best[rows:].view(torch.float32)[:rows]


class Drawer:
    """Draws from logits that another engine left on the device before, and that it leaves alone until a draw is done.

    Args:
        address: Of float32 [rows, vocab_size], valid as long as this is used.
        rows: Most that are drawn at once.
        vocab_size: Logits of each; at most ``MAX_VOCAB``.
        device: Where.

    Raises:
        EngineError: The device's memory is full.
        EngineBrokenError: The device failed.
    """

    def __init__(self, address: int, rows: int, vocab_size: int, device: Device) -> None:
        self._device = device
        with device.at_work("loading"):
            self._logits = tensor_at(address, (rows, vocab_size), device)
            self._best = torch.zeros(2 * rows, dtype=torch.int64, device=device.torch)
            self._table = DrawTable(rows, 1, device)
            self._space: SampleSpace | None = sample_workspace(rows, vocab_size, device.torch)

    def draw(self, table: Table) -> ChosenTokens:
        """A token of each of the first rows, and its logit.

        Args:
            table: float64 [R, 5].

        Raises:
            EngineError: The device's memory is full.
            EngineBrokenError: The device failed, or, at a first call, the kernels cannot be compiled.
        """
        rows = len(table)
        with self._device.at_work("decoder step"):
            self._table.write(0, table)  # whoever drew before waited for the tokens
            best = self._best[: 2 * rows]
            self._table.draw(self._logits[:rows], best, space=self._space)
            found = best.cpu().numpy()
        return ChosenTokens(found[:rows], found[rows:].view(np.float32)[:rows])

    def close(self) -> None:
        """Gives its memory back; nothing is drawn behind that."""
        del self._logits, self._best
        self._space = None
        with suppress(Exception):  # a device that failed gives nothing back
            self._device.release()


def gpu_drawer(address: int, rows: int, vocab_size: int, index: int) -> Drawer:
    """A drawer on the GPU of that number. Raises as ``Drawer``."""
    return Drawer(address, rows, vocab_size, Device(torch.device("cuda", index)))


class _Memory:
    """Float32 on a GPU, as the protocol of CUDA's arrays tells it."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": shape, "typestr": "<f4", "data": (address, False), "strides": None, "version": 3
        }  # fmt: skip


def tensor_at(address: int, shape: tuple[int, ...], device: Device) -> torch.Tensor:
    """The float32 that lie there, not copied."""
    if device.is_gpu:
        return torch.as_tensor(_Memory(address, shape), device=device.torch)
    count = int(np.prod(shape))
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))).view(shape)


__all__ = ["FIELDS", "MAX_VOCAB", "DrawTable", "Drawer", "Table", "gpu_drawer", "tensor_at", "values_of"]
