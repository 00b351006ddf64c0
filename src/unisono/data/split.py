"""Which blocks are held out for evaluation: a pure function of their number, the share and the seed.

Contract: at least one block, and never all, when a share above zero is asked of two blocks or more.
Cost: 8 bytes a held-out block. In `concat` packing a document that a cut divides may have one part
on either side: the share is of blocks.
"""

import numpy as np
import numpy.typing as npt

from unisono.data.order import Order

# Keeps this choice apart from the order of training under the same seed.
_SALT = 0x6576616C


def held_out(num_blocks: int, fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Sorted numbers of the held-out blocks."""
    if fraction <= 0 or num_blocks < 2:
        return np.empty(0, np.int64)
    count = min(max(round(num_blocks * fraction), 1), num_blocks - 1)
    return np.sort(Order(num_blocks, seed ^ _SALT).at(np.arange(count)))
