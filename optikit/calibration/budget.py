"""Memory bounds of the walk, importable without torch, for plans."""

BATCH_TOKENS = 4096
"""Tokens that go through a block together: enough for full speed of matrix products."""
PAUSED_SHARE = 0.25
"""Share of the memory bound for paused passes; batches beyond it run again for every group."""
PAUSED_MOST = 2**30
"""Bytes for paused passes where the recipe names no bound: enough for the usual calibration."""


def paused_bytes_per_token(hidden: int, widest: int, itemsize: int) -> int:
    """Return the bytes per token of a waiting pass: four residual streams, two of the widest input of a linear."""
    return (4 * hidden + 2 * widest) * itemsize
