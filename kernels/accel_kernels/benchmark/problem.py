"""A row of the benchmark, and what it computes once its operands are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import torch

DTYPE = torch.float16  # of rows, weights and caches, as in the engine's usual variant
Result: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"
Run = Callable[[int], Result]
T = TypeVar("T")


class Copies(Generic[T]):
    """Operands of one kind in as many copies as keep the L2 from holding them; call i gets copy i, then the first."""

    def __init__(self, items: list[T]) -> None:
        self._items = items

    def __call__(self, index: int) -> T:
        return self._items[index % len(self._items)]

    def __len__(self) -> int:
        return len(self._items)


class Operands:
    """Makes the tensors of one problem, the same ones each time.

    Args:
        device: Where they lie.
        spread: Bytes that the copies of a cold operand take together.
        most: Copies of one operand.
    """

    def __init__(self, device: torch.device, *, spread: int = 0, most: int = 1) -> None:
        self.device, self._spread, self._most = device, spread, most
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """Normally distributed numbers."""
        numbers = torch.randn(shape, generator=self._generator, device=self.device)
        return numbers.mul_(scale).add_(mean).to(dtype)

    def unwritten(self, *shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """A result that nobody wrote yet: NaN."""
        return torch.full(shape, float("nan"), dtype=dtype, device=self.device)

    def below(self, limit: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Integers from 0 to ``limit`` - 1."""
        return torch.randint(limit, shape, generator=self._generator, device=self.device, dtype=dtype)

    def int8(self, *shape: int) -> torch.Tensor:
        """int8 from -127 to 127: a quantised cache."""
        return torch.randint(-127, 128, shape, generator=self._generator, device=self.device, dtype=torch.int8)

    def float8(self, *shape: int) -> torch.Tensor:
        """8-bit floats up to 448, few of which are small: another quantised cache."""
        return self.normal(*shape, scale=128.0, dtype=torch.float32).clamp_(-448, 448).to(torch.float8_e4m3fn)

    def words(self, *shape: int) -> torch.Tensor:
        """int32, every bit by chance: packed integers of any number of bits."""
        bounds = torch.iinfo(torch.int32)
        options = {"generator": self._generator, "device": self.device, "dtype": torch.int32}
        return torch.randint(bounds.min, bounds.max, shape, **options)  # type: ignore[arg-type]

    def numbers(self, *numbers: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Given integers, one axis."""
        return torch.tensor(numbers, dtype=dtype, device=self.device)

    def copies(self, make: Callable[[int], T], size: int) -> Copies[T]:
        """Copies of a cold operand.

        Args:
            make: Makes copy i.
            size: Bytes of it that one run reads or writes.
        """
        count = max(1, min(self._most, -(-self._spread // size)))
        return Copies([make(index) for index in range(count)])


@dataclass(frozen=True)
class Problem:
    """One op with its operands.

    Attributes:
        ways: Runs the kernel on copy i of what is cold, by launch parameters; of several the engine takes the fastest
            by measurement. Float32 [P, ...] in place of [...] are parts that the next kernel adds up.
        peer: The same in plain PyTorch.
        reference: The same in float64 on copy 0; to be called before anything else ran, which may write in place.
        bytes: That the op reads and writes at least, once each; a result in parts counts as one.
        flops: Multiplications and additions of products and attention; element-wise work is not counted.
    """

    ways: Mapping[str, Run]
    peer: Run
    reference: Callable[[], Result]
    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Row:
    """One kernel at one shape.

    Attributes:
        kernel: Its launcher's name.
        shape: In words.
        dtype: Of what it reads most of; where a cache is in 8 bits, the cache's.
        cold: The operands that come from memory, as in a model; all others were just written or read, and lie in the
            L2 as far as they fit. Empty: none.
        peer: What PyTorch runs for it.
        prepare: Makes the operands.
        needs: The first compute capability that runs it.
        warp_jobs: Whether it gives groups of warps programs of their own, see ``device.has_warp_jobs``.
    """

    kernel: str
    shape: str
    dtype: str
    cold: str
    peer: str
    prepare: Callable[[Operands], Problem]
    needs: tuple[int, int] = (0, 0)
    warp_jobs: bool = False


def size_of(*tensors: torch.Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def as_tuple(result: Result) -> tuple[torch.Tensor, ...]:
    """A result as several."""
    return result if isinstance(result, tuple) else (result,)


def names_of(rows: Iterable[Row]) -> list[str]:
    """The rows' kernels, each once, in their order."""
    return list(dict.fromkeys(row.kernel for row in rows))


__all__ = ["DTYPE", "Copies", "Operands", "Problem", "Result", "Row", "Run", "as_tuple", "names_of", "size_of"]
