"""What a launcher expects of its arguments. A kernel that gets others reads past their ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from accel_kernels.device import capability
from accel_kernels.narrow_cache import EIGHT_BITS, FLOAT8_SM

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.int32, torch.int64)


class Expect:
    """Checks the arguments of one launch.

    Args:
        op: The launcher's name, for the messages.
        device: Where all of its tensors must be.
    """

    def __init__(self, op: str, device: torch.device) -> None:
        self._op, self._device = op, device

    def tensor(
        self,
        name: str,
        tensor: torch.Tensor | None,
        *shape: int,
        dtypes: Sequence[torch.dtype] = FLOATS,
        strided: bool = False,
    ) -> None:
        """A tensor of a type, a shape and the launch's device, contiguous unless ``strided``.

        None passes: leaving an optional argument out is the caller's right. A size of -1 fits every size. A
        vector may keep axes of size 1 in front.

        Raises:
            TypeError: No tensor, or another type.
            ValueError: Another shape, another device, or gaps between the elements.
        """
        if tensor is None:
            return
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{self._op}: {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{self._op}: {name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
        if not _fits(tuple(tensor.shape), shape):
            raise ValueError(f"{self._op}: {name} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.device != self._device:
            raise ValueError(f"{self._op}: {name} is on {tensor.device}, the others are on {self._device}")
        if strided and tensor.stride(-1) != 1:
            raise ValueError(f"{self._op}: the last axis of {name} is not contiguous")
        if not strided and not tensor.is_contiguous():
            raise ValueError(f"{self._op}: {name} is not contiguous")

    def described(self, **tensors: torch.Tensor) -> None:
        """Tensors that descriptors or copies of 16 bytes can take: not empty, start and rows at multiples of 16 bytes.

        Raises:
            ValueError: They are not.
        """
        for name, tensor in tensors.items():
            width = tensor.shape[-1] * tensor.element_size()
            self.that(width % 16 == 0, f"a row of {name} has {width} bytes, no multiple of 16")
            self.that(tensor.numel() > 0, f"{name} is empty")
            self.that(tensor.data_ptr() % 16 == 0, f"{name} starts at no multiple of 16 bytes")

    def cache(
        self,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> bool:
        """Keys and values [B, KV, C, D] of one type, D even; of 8 bits with scales [KV, D], which floats have none of.

        Returns:
            Whether they are in 8 bits.
        """
        self.tensor("key_cache", key_cache, -1, -1, -1, -1, dtypes=(*FLOATS, *EIGHT_BITS))
        self.tensor("value_cache", value_cache, *key_cache.shape, dtypes=(key_cache.dtype,))
        self.that(key_cache.shape[3] % 2 == 0, f"heads of {key_cache.shape[3]} elements; their halves differ")
        narrow = key_cache.dtype in EIGHT_BITS
        for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
            what = f"a cache of {key_cache.dtype} has {name if narrow else f'no {name}'}"
            self.that((scales is not None) == narrow, what)
            self.tensor(name, scales, key_cache.shape[1], key_cache.shape[3], dtypes=(torch.float32,))
        if key_cache.dtype == torch.float8_e4m3fn and key_cache.device.type == "cuda":
            found = capability(key_cache.device)
            self.that(found >= FLOAT8_SM, f"caches of {key_cache.dtype} need {_sm(FLOAT8_SM)}, this is {_sm(found)}")
        return narrow

    def heads(self, heads: int, kv_heads: int) -> None:
        """Query heads in groups of one size."""
        self.that(heads > 0 and kv_heads > 0 and heads % kv_heads == 0, f"{kv_heads} key heads for {heads} query heads")

    def tables(self, cos: torch.Tensor | None, sin: torch.Tensor | None, dim: int) -> None:
        """Both tables of a rotation [positions, dim / 2], or neither."""
        self.that((cos is None) == (sin is None), "cos and sin come together")
        self.tensor("cos", cos, -1, dim // 2)
        if cos is not None:
            self.tensor("sin", sin, len(cos), dim // 2)

    def positive(self, **numbers: float | None) -> None:
        """Numbers above 0; None passes."""
        for name, number in numbers.items():
            self.that(number is None or number > 0, f"{name} is {number}, not positive")

    def stripe(self, stripe: int | None, count: int) -> None:
        """Stripes of a gated matrix: as long as one another. None: one."""
        self.that(stripe is None or (stripe > 0 and count % stripe == 0), f"stripe {stripe} does not divide {count}")

    def groups(self, groups: int, size: int, fields: int) -> None:
        """Scales of a row of ``size`` quantised weights, ``fields`` of which share a word: of whole words each."""
        whole = groups > 0 and size % groups == 0 and size // groups % fields == 0
        self.that(whole, f"{groups} scales do not divide a row of {size} into whole words")

    def that(self, condition: bool, what: str) -> None:
        """Raises ValueError with ``what`` unless the condition holds."""
        if not condition:
            raise ValueError(f"{self._op}: {what}")


def _sm(capability: tuple[int, int]) -> str:
    return f"sm{capability[0]}{capability[1]}"


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if len(expected) == 1:
        return len(shape) > 0 and shape[:-1] == (1,) * (len(shape) - 1) and expected[0] in (-1, shape[-1])
    return len(shape) == len(expected) and all(wanted in (-1, size) for size, wanted in zip(shape, expected))


__all__ = ["FLOATS", "INDICES", "Expect"]
