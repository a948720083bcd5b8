"""Measures each kernel on the GPU at hand: microseconds, percent of the roofline, and plain PyTorch beside it.

    python -m accel_kernels.benchmark --json kernels.json
    python -m accel_kernels.benchmark --only gemv decode_attention
    python -m accel_kernels.benchmark --tiny     # every row once, small, against its reference; without a GPU too

Times are those of one run among many in a CUDA graph: the median, least and most of its replays, its start taken off.
Cold operands (the column names them) come from memory, as weights do in a model; all others were just written or
read. The roofline is the slower of the bytes that an op must move at the speed of a copy, and the operations of its
products at the speed of a large fp16 product, both measured in the same run; operands in the L2 can pass it. Launch
parameters are the engine's; where it chooses by measurement, the fastest one counts. PyTorch runs the same op on the
same operands in a CUDA graph too; integer weights are fp16 there, logits stay in fp16. Rows that the GPU has no
instructions for are left out, and told with the reason: caches of 8-bit floats before sm89.

Exits with 1 where there is no GPU, where something failed, or, with --tiny, where a result is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_TINY = "run every row once at a tiny shape and compare with its reference; without a GPU in Triton's interpreter"


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m accel_kernels.benchmark", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these kernels (default: all)")
    parser.add_argument("--list", action="store_true", help="print the rows and measure nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here; a file that is there goes")
    parser.add_argument("--tiny", action="store_true", help=_TINY)
    options = parser.parse_args(arguments)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    if options.json and (options.list or options.tiny):
        parser.error("--json holds times, which neither --list nor --tiny takes")
    try:
        import torch

        if options.tiny and not torch.cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks where a kernel is defined
        from accel_kernels.benchmark.problem import names_of
        from accel_kernels.benchmark.rows import rows_of
    except ModuleNotFoundError as error:
        return _refuse(f"{error.name} is not installed: pip install {error.name}")
    from accel_kernels.benchmark.shapes import FULL, TINY

    rows = rows_of(TINY if options.tiny else FULL)
    unknown = set(options.only or ()) - set(names_of(rows))
    if unknown:
        parser.error(f"--only: no kernel {', '.join(sorted(unknown))}; there are {', '.join(names_of(rows))}")
    rows = [row for row in rows if row.kernel in (options.only or names_of(rows))]
    if options.list:
        return _print("\n".join(f"{row.kernel:17}{row.shape:62} {row.dtype:11}{row.peer}" for row in rows))
    if options.tiny:
        from accel_kernels.benchmark.commands import compare_rows

        return compare_rows(rows)
    if not torch.cuda.is_available():
        return _refuse("there is no GPU that PyTorch could use; --tiny runs every row without one")
    from accel_kernels.device import INTERPRETED

    if INTERPRETED:
        return _refuse("TRITON_INTERPRET=1 is set: the interpreter's times say nothing about a GPU")
    from accel_kernels.benchmark.commands import measure_rows

    return measure_rows(rows, options.json)


def _print(text: str) -> int:
    """The exit code; 1 where the reader went away, e.g. head."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more as it ends
        return 1
    return 0


def _refuse(why: str) -> int:
    print(f"accel_kernels.benchmark: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
