"""Several threads and sessions at once, and pools of every size."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.kernels_cpu.products import assert_close, open_product, random_product, run


def test_sessions_run_at_once_from_many_threads(isa: str) -> None:
    products = [random_product(200, 160, bits, block, seed=bits) for bits, block in ((8, 0), (4, 32))]
    sessions = [open_product(product) for product in products]
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((rows, 160), np.float32) for rows in (1, 3, 40, 130, 7, 64, 2, 90)]
    expected = [[product.expect(x) for x in inputs] for product in products]

    def work(index: int) -> None:
        for turn in range(6):
            which = (index + turn) % 2
            assert_close(run(sessions[which], x=inputs[index]), expected[which][index])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_number_of_threads_changes_nothing(threads: int) -> None:
    product = random_product(1000, 512, 4, 64, activation="gelu")
    x = np.random.default_rng(0).standard_normal((300, 512), np.float32)
    np.testing.assert_array_equal(
        run(open_product(product, threads=threads), x=x), run(open_product(product, threads=1), x=x)
    )
