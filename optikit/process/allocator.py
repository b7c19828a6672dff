"""Give freed memory back: glibc keeps an arena per thread, and paused passes are threads.

Without this a walk that holds 300 MB of activations shows 600 MB; it costs nothing measurable. Other libcs are left
as they are.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache

M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3
"""`mallopt` parameters, from glibc's malloc.h."""
MAPPED, MAPPED_BOUNDED = 8 * 2**20, 2**20
"""Bytes from which an allocation is a mapping of its own, given back when it is freed; the second if bounded.
Left to itself, glibc raises the bound to 32 MiB, and matrices leave holes in the heap, more with every block: pages
that go back, but a limit on a process's data counts addresses. Mapping what is small costs time instead."""


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def one_arena(*, bounded: bool) -> None:
    """Let all threads allocate from the main arena, and matrices outside of it; smaller ones, too, if `bounded`."""
    library = _glibc()
    if library is not None:
        library.mallopt(M_ARENA_MAX, 1)
        library.mallopt(M_MMAP_THRESHOLD, MAPPED_BOUNDED if bounded else MAPPED)


def settle() -> None:
    """Tell the collector that whatever lives now (modules, mostly) stays, so that it needn't look at it every time."""
    gc.collect()
    gc.freeze()


def return_memory() -> None:
    """Collect garbage and give free pages back to the system."""
    gc.collect()
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
