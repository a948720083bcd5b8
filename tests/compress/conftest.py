"""The tiny families' bundles, as the parity tests export them."""

from __future__ import annotations

from tests.parity.conftest import bundle_of

__all__ = ["bundle_of"]
