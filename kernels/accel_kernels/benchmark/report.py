"""What the benchmark prints and writes."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from accel_kernels.benchmark.measure import Measured
from accel_kernels.benchmark.timing import Limits

_COLUMNS = (
    f"{'kernel':17}{'shape':62}{'dtype':11}{'cold':8}{'us':>9}{'(least-most)':>19}{'MB':>9}{'GFLOP':>9}"
    f"{'roofline':>10}{'PyTorch us':>12}{'ratio':>7}  chosen of several"
)
_UNKNOWN = "unknown"


def environment(device: torch.device, limits: Limits) -> dict[str, Any]:
    """GPU, driver, versions, date (UTC) and limits."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "limits": vars(limits),
    }


def _driver() -> str:
    """The NVIDIA driver's version."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return _UNKNOWN
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else _UNKNOWN


def head(about: dict[str, Any]) -> str:
    """What the table stands on, and its columns."""
    limits = about["limits"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n".join(
        [
            f"{about['gpu']}, driver {about['driver']}, {versions}, {about['date']}",
            f"limits: copies at {limits['copy_bytes_s'] / 1e12:.2f} TB/s, fp16 products at "
            f"{limits['product_flops_s'] / 1e12:.0f} TFLOP/s; L2 of {limits['l2_bytes'] / 1e6:.0f} MB",
            _COLUMNS,
        ]
    )


def line(measured: Measured) -> str:
    """One row of the table; what failed stands below."""
    row, times, percent, ratio = measured.row, measured.times, measured.roofline_percent, measured.ratio
    text = f"{row.kernel:17}{row.shape:62}{row.dtype:11}{row.cold:8}"
    if times is None:
        text += f"{'none':>9}{'':19}"
    else:
        spread = f"({1e6 * times.least:.2f}-{1e6 * times.most:.2f})"
        text += f"{1e6 * times.median:9.2f}{spread:>19}"
    text += f"{measured.bytes / 1e6:9.2f}{measured.flops / 1e9:9.2f}"
    text += f"{'' if percent is None else f'{percent:.0f} %':>10}"
    text += f"{'none' if measured.peer is None else f'{1e6 * measured.peer.median:.2f}':>12}"
    text += f"{'' if ratio is None else f'{ratio:.2f}':>7}"
    if len(measured.launches) > 1:
        text += f"  {measured.launch}"
    failures = [f"  failed: {way}: {why}" for way, why in measured.failed.items()]
    return "\n".join([text.rstrip(), *failures])


def write(path: Path, about: dict[str, Any], rows: Sequence[Measured], left_out: Sequence[dict[str, str]] = ()) -> None:
    """Replaces the file.

    Args:
        about: See ``environment``.
        left_out: Rows that the GPU has no instructions for, and why.
    """
    content = about | {"rows": [row.as_json() for row in rows], "left_out": list(left_out)}
    path.write_text(json.dumps(content, indent=1) + "\n")


__all__ = ["environment", "head", "line", "write"]
