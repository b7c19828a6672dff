"""One walk in several processes, started by torchrun: each calibrates its share of the windows, statistics add up.

Every process walks all blocks with its own windows, adds its statistic to the others', and then makes of the sum what
the others make of it, bit by bit: nothing but sums crosses. The first process writes the result; the others' scratch
and result are thrown away. Sums over processes are added in another order than in one process, so that the result for
two is that for one up to rounding.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, distributed

from optikit.errors import StageFailedError


def count() -> int:
    """Return how many processes walk together; joins them at the first call."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 1
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return distributed.get_world_size()


def share(windows: Tensor) -> Tensor:
    """Return the windows that this process calibrates with: every so many-th.

    Raises:
        StageFailedError: There are more processes than windows.
    """
    ranks = count()
    if len(windows) < ranks:
        message = f"{ranks} processes can't share {len(windows)} calibration windows"
        raise StageFailedError(message, fix="use fewer --ranks, or raise calibration.samples")
    return windows[distributed.get_rank() :: ranks] if ranks > 1 else windows


def agreed(value: int) -> bool:
    """Return whether all processes have the same value."""
    if count() == 1:
        return True
    most = torch.tensor([value, -value])
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return bool(most[0] == -most[1])


def total(tensor: Tensor) -> Tensor:
    """Add up a tensor of all processes in place, and return it."""
    distributed.all_reduce(tensor)
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """Take the largest elements of all processes in place, and return them."""
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


def gathered(rows: Tensor) -> Tensor:
    """Return the rows of all processes, one process after the other; each may have another number of them."""
    ranks = count()
    lengths = torch.zeros(ranks, dtype=torch.int64, device=rows.device)
    lengths[distributed.get_rank()] = len(rows)
    most = int(total(lengths).max())
    padded = rows.new_zeros((most, *rows.shape[1:]))
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in range(ranks)]
    distributed.all_gather(found, padded)
    return torch.cat([each[:length] for each, length in zip(found, lengths.tolist(), strict=True)])
