"""How much the walk may hold, in figures that plans can read without torch."""

BATCH_TOKENS = 4096
"""Tokens that go through a block together: enough for full speed of matrix products."""
PAUSED_SHARE = 0.25
"""Share of the memory bound that paused passes may hold; batches beyond it run again for every group."""
PAUSED_MOST = 2**30
"""Bytes that they may hold where the recipe names no bound: enough for what recipes usually calibrate with."""


def paused_bytes_per_token(hidden: int, widest: int, itemsize: int) -> int:
    """Return what a token of a pass holds while it waits: four times the stream, twice the widest input of a linear."""
    return (4 * hidden + 2 * widest) * itemsize
