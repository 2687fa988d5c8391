"""A short form of the fuzzer of model surgery; ``benchmarks/fuzz.py`` has the long one."""

from __future__ import annotations

import pytest
from fuzz_surgery import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", range(12))
def test_surgery(seed: int) -> None:
    run(seed)
