"""Numbers of keys and tokens that a share stands for."""

from __future__ import annotations

import math


def num_kept(share: float, total: int) -> int:
    """``ceil(share * total)`` of the decimal number that ``share`` was written as: 3 for 0.1 of 30.

    In binary that product is 3.0000000000000004. A power of a share is off by a few units in its last place, too.
    """
    return math.ceil(share * total * (1 - 1e-12))
