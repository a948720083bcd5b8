"""GPTQ: column by column, the error of each rounded weight is made up for by the columns that are still to come.

E. Frantar, S. Ashkboos, T. Hoefler and D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (arXiv:2210.17323), with the upper Cholesky factor of the inverse Hessian, lazy updates by
blocks, and ``act_order`` of its section 3. Scales are chosen by their squared error on the columns as the updates left
them. What follows the paper's pass is this: with the integers fixed, each row's scales are fitted again, together, and
integers are moved one at a time where that lowers the error of the layer's output (cyclic coordinate descent, as in
K. Behdin et al., "QuantEase", arXiv:2309.01885).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.compress.rtn import choose_scales, nearest
from accel.compress.tensors import LIMITS, check_moments, check_weight, pack, storable_scales
from accel.errors import InputError
from accel.quantized_tensor import QuantizedTensor

BLOCK = 64  # columns between two updates of all that follow
ROWS = 4096  # rounded at a time, to bound memory
DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it


def gptq(
    weight: NDArray,
    hessian: Any,
    bits: int,
    group: int = 0,
    *,
    act_order: bool = False,
    damping: float = DAMPING,
    sweeps: int = 0,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantises a weight matrix so that its products with the calibration inputs change least.

    Args:
        weight: float [N, K].
        hessian: Inputs' second moments X^T X, a float tensor [K, K], of any positive factor.
        bits: 8 or 4.
        group: Inputs that share a scale, a divisor of K; 0: one scale per row.
        act_order: Round the columns of largest second moment first. Scales are then chosen before any update.
        damping: Share of the mean diagonal that is added to the diagonal.
        sweeps: Rounds of fitting scales and moving integers behind the first pass.
        name: Of the weight, for errors.

    Raises:
        InputError: NaN or infinity among weights or moments, moments of the wrong shape, or scales beyond float16.
    """
    import torch

    check_weight(weight, name)
    columns = weight.shape[1]
    if tuple(hessian.shape) != (columns, columns):
        raise InputError(f"second moments {list(hessian.shape)} of {columns} inputs", where=name)
    moments, dead = _damped(hessian, damping, name)
    order = torch.argsort(moments.diagonal(), descending=True, stable=True) if act_order else None
    factor = _inverse_factor(moments if order is None else moments[order][:, order])
    solver = _Solver(moments, factor, order, bits, group, group or columns, sweeps, name)
    parts = []
    for start in range(0, len(weight), ROWS):
        source = torch.from_numpy(np.array(weight[start : start + ROWS], dtype=np.float32)).T.contiguous()
        source[dead] = 0.0  # inputs that are always zero
        parts.append(solver.solve(source))
    values, scales = (torch.cat(items) for items in zip(*parts, strict=True))
    return pack(values, scales, bits, group)


def output_error(weight: NDArray, quantized: QuantizedTensor, hessian: Any) -> float:
    """|| X W^T - X W'^T || / || X W^T ||, Frobenius, from the inputs' second moments X^T X."""
    import torch

    whole = part = 0.0
    moments, restored = hessian.float(), quantized.dequantize()
    for start in range(0, len(weight), ROWS):
        source = torch.from_numpy(np.array(weight[start : start + ROWS], dtype=np.float32))
        lost = source - torch.from_numpy(restored[start : start + ROWS])
        whole += float(((source @ moments) * source).double().sum())
        part += float(((lost @ moments) * lost).double().sum())
    return float(np.sqrt(max(part, 0.0) / whole)) if whole > 0 else 0.0


def _damped(hessian: Any, damping: float, name: str) -> tuple[Any, Any]:
    """Second moments with a larger diagonal, float32, and a mask of the inputs that are always zero."""
    check_moments(hessian, name)
    moments = hessian.float().clone()
    diagonal = moments.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal.mean())
    diagonal.add_(damping * mean if mean > 0 else 1.0)
    return moments, dead


def _inverse_factor(moments: Any) -> Any:
    """U with U^T U = moments^-1, upper triangular."""
    import torch

    lower = torch.linalg.cholesky(moments.double())
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True).float()


@dataclass(frozen=True)
class _Solver:
    """What is the same for all rows of a weight; tensors of weights are [K, N], a column of the weight being a row."""

    moments: Any  # H, damped [K, K]
    factor: Any  # U of the inverse, in the order of rounding
    order: Any  # of the columns [K], None: as they stand
    bits: int
    group: int
    size: int  # inputs that share a scale
    sweeps: int
    name: str

    def solve(self, source: Any) -> tuple[Any, Any]:
        """Integers int8 [N, K] and scales [N, G] of weights [K, N]."""
        import torch

        before = self.order is not None or not self.group
        scales = self._scales_before(source) if before else None
        work = source.clone() if self.order is None else source[self.order]
        values, scales = self._round(work, scales)
        if self.order is not None:
            values = values[torch.argsort(self.order)]
        for _ in range(self.sweeps):
            scales = self._storable(self._fit(source, values, scales))
            values = self._descend(source, values, scales)
        return values.T.to(torch.int8), scales

    def _storable(self, scales: Any) -> Any:
        return storable_scales(scales, self.group, self.name)

    def _scales_before(self, source: Any) -> Any:
        """Scales [N, G] of the weights as they are, errors weighted by the inputs' mean squares."""
        columns, rows = source.shape
        grouped = source.reshape(columns // self.size, self.size, rows).permute(1, 2, 0).contiguous()
        importance = self.moments.diagonal().reshape(-1, self.size).T[:, None].contiguous()
        return self._storable(choose_scales(grouped, self.bits, importance))

    def _round(self, work: Any, scales: Any) -> tuple[Any, Any]:
        """The pass of the paper: integers [K, N] in the order of ``work``, and scales [N, G]."""
        import torch

        factor, size = self.factor, self.size
        columns, rows = work.shape
        values, given = torch.empty_like(work), scales is not None
        scales = scales if given else torch.empty(rows, columns // size)
        block = BLOCK if given else max(size, BLOCK // size * size)
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            errors = torch.empty(stop - start, rows)
            for place in range(start, stop):
                if not given and place % size == 0:
                    importance = factor.diagonal()[place : place + size, None] ** -2
                    found = choose_scales(work[place : place + size], self.bits, importance)
                    scales[:, place // size] = self._storable(found)
                origin = place if self.order is None else int(self.order[place])
                scale, column = scales[:, origin // size], work[place]
                values[place] = nearest(column, scale, self.bits)
                errors[place - start] = (column - values[place] * scale) / factor[place, place]
                work[place:stop] -= factor[place, place:stop, None] * errors[place - start]
            work[stop:] -= factor[start:stop, stop:].T @ errors
        return values, scales

    def _fit(self, source: Any, values: Any, scales: Any) -> Any:
        """Scales [N, G] that fit the integers best, all groups of a row together.

        With Z_n = the integers of row n in G columns of K numbers, zero outside each group, s_n solves
        (Z_n^T H Z_n) s_n = Z_n^T H w_n; a little of the former scales is mixed in where a group says nothing.
        """
        import torch

        columns, rows = source.shape
        groups, size = columns // self.size, self.size
        right = ((self.moments @ source) * values).reshape(groups, size, rows).sum(1).T  # [N, G]
        left = torch.empty(rows, groups, groups)
        for place in range(groups):
            band = slice(place * size, (place + 1) * size)
            mixed = self.moments[:, band] @ values[band]  # [K, N]
            left[:, place] = (mixed * values).reshape(groups, size, rows).sum(1).T
        ridge = 1e-6 * left.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)  # [N]
        left = left + torch.diag_embed(ridge[:, None].expand(-1, groups))
        solved = torch.linalg.solve(left, right + ridge[:, None] * scales)
        return torch.where(torch.isfinite(solved), solved, scales)

    def _descend(self, source: Any, values: Any, scales: Any) -> Any:
        """One round over the columns: each integer becomes the best one while all others stay.

        With E = W - W' and P = H E, the best real value of column k is w'_k + P_k / H_kk.
        """
        import torch

        columns, rows = source.shape
        moments, result = self.moments, values.clone()
        spread = scales.T.repeat_interleave(self.size, 0)  # [K, N]
        pull = moments @ (source - result * spread)
        low, high = LIMITS[self.bits]
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            changes = torch.empty(stop - start, rows)
            for place in range(start, stop):
                scale, old = spread[place], result[place]
                best = torch.clamp(torch.round(old + pull[place] / moments[place, place] / scale), low, high)
                change = (best - old) * scale
                pull[place:stop] -= moments[place:stop, place, None] * change
                changes[place - start], result[place] = change, best
            pull[stop:] -= moments[stop:, start:stop] @ changes
        return result


__all__ = ["gptq", "output_error"]
