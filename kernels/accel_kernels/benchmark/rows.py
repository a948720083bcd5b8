"""All rows."""

from __future__ import annotations

from accel_kernels.benchmark import attention, float_products, quantized_products, vectors
from accel_kernels.benchmark.problem import Row
from accel_kernels.benchmark.shapes import Shapes


def rows_of(shapes: Shapes) -> list[Row]:
    """Every kernel at its shapes, kernel by kernel."""
    families = (float_products, quantized_products, vectors, attention)
    found = [row for family in families for row in family.rows_of(shapes)]
    order = list(dict.fromkeys(row.kernel for row in found))
    return sorted(found, key=lambda row: order.index(row.kernel))


__all__ = ["rows_of"]
