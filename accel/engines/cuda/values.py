"""Results that wait for their reader: what reads them decides whether one kernel does for two nodes."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from accel_kernels.gather import gather

from accel.engines.cuda.program import Matrix

_PLACES = ("second", "third")  # of other tables in ``gather``


@dataclass
class Normed:
    """norm(source), not computed yet. ``kind``: RMS_NORM or LAYER_NORM of accel_kernels."""

    source: torch.Tensor  # [T, K]
    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float
    kind: int
    shape: torch.Size | None = None  # of the result, where it is not [T, K]
    result: torch.Tensor | None = None


@dataclass
class Product:
    """source times matrix, not computed yet: its reader adds it to something."""

    source: object  # what the linear layer got
    matrix: Matrix


@dataclass
class Sum:
    """stream + added, the latter perhaps in parts [P, T, K]; the norm that reads it adds them up on the way.

    added is None where the product added the stream itself; the result is there then.
    """

    stream: torch.Tensor  # [T, K]
    added: torch.Tensor | None
    kept: bool = True  # whether something besides one norm reads it
    shape: torch.Size | None = None  # of the result, where it is not [T, K]
    result: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor:
        """The sum [T, K], float32 unless its product left it in another type."""
        if self.result is None:
            assert self.added is not None
            added = self.added if self.added.dim() == self.stream.dim() else self.added.sum(0)
            self.result = self.stream.float() + added.float()
        return self.result


@dataclass
class Rows:
    """Rows of a table, not read yet: they are added to others as they are.

    ``also``: rows of other tables on top of them, read on the way.
    """

    table: torch.Tensor  # [V, K]
    ids: torch.Tensor
    also: tuple[Rows, ...] = ()
    result: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the ids, and K."""
        return torch.Size((*self.ids.shape, self.table.shape[1]))

    def tensor(self) -> torch.Tensor:
        """The rows, float32."""
        if self.result is None:
            self.result = self.added_to(None)
        return self.result

    def added_to(self, other: torch.Tensor | None) -> torch.Tensor:
        """other + the rows, whose shape may lack leading dimensions of it, or have 1 there; float32."""
        shape = self.shape if other is None else other.shape
        added = None if other is None else other.reshape(-1, shape[-1]).contiguous()
        return self._read(shape, torch.float32, added=added)

    def normalized(self, by: Normed, dtype: torch.dtype) -> torch.Tensor:
        """norm(the rows), which are not written down."""
        return self._read(
            self.shape, dtype, norm=by.kind, norm_weight=by.weight, norm_bias=by.bias, eps=by.epsilon
        )  # fmt: skip

    def _read(self, shape: torch.Size, dtype: torch.dtype, **options: Any) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=self.table.device)
        options |= {name: more._lookup() for name, more in zip(_PLACES, self.also)}
        gather(*self._lookup(), out.view(-1, shape[-1]), **options)
        return out

    def joined(self, other: Rows) -> Rows | None:
        """Both, still unread; None where one kernel cannot read them all."""
        if self.result is not None or other.result is not None or other.also or len(self.also) == len(_PLACES):
            return None
        if other.table.dtype != self.table.dtype or not other.fits(self.shape):
            return None
        return Rows(self.table, self.ids, (*self.also, other))

    def _lookup(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table, self.ids.reshape(-1).contiguous()

    def fits(self, other: torch.Size) -> bool:
        """Whether ``added_to`` takes a tensor of this shape."""
        own = tuple(self.shape)
        while own and own[0] == 1:
            own = own[1:]
        return len(own) <= len(other) and own == tuple(other)[len(other) - len(own) :]


@dataclass
class Parts:
    """A product in parts float32 [P, T, N], which its reader adds up."""

    parts: torch.Tensor

    def tensor(self) -> torch.Tensor:
        """The product, [T, N]."""
        return self.parts.sum(0)


def fresh(value: Any) -> Any:
    """A copy of what waits for its reader, with what waits inside it: it is computed anew. Else the value itself."""
    if not isinstance(value, Normed | Product | Sum | Rows | Parts):
        return value
    twin = copy(value)
    if isinstance(twin, Product):
        twin.source = fresh(twin.source)
    if isinstance(twin, Normed):
        twin.source = fresh(twin.source)
    return twin


__all__ = ["Normed", "Parts", "Product", "Rows", "Sum", "fresh"]
