"""What tests of the engine need."""

from __future__ import annotations

import pytest

from accel.engines.openvino.package import computes_bfloat16, is_installed, open_core

needs_openvino = pytest.mark.skipif(not is_installed(), reason='openvino is not installed: pip install ".[openvino]"')
needs_bfloat16 = pytest.mark.skipif(
    not is_installed() or not computes_bfloat16(open_core()), reason="openvino or a CPU with bfloat16 is missing"
)
