"""What the system's allocator does with the memory of a step, between steps."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of two of glibc's settings (malloc.h)."""
LARGEST_KEPT = 1 << 25
"""Bytes of the largest block that glibc can be told to keep."""
ALL = 2**31 - 1


def give_back_freed_memory() -> None:
    """Hand all freed blocks back to the system, so that what a process holds is what it needs; nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory(up_to: int = ALL) -> bool:
    """Keep freed blocks with this process, so that the next step finds its buffers mapped.

    glibc hands large freed blocks back to the system at once and takes new ones for the next gradient or activation; the
    system then clears every page of them again, which costs several times the copy that they are for. Results do not
    change; memory that a run once needed stays its own until it ends.

    Args:
        up_to: bytes at the end of the heap that are kept; what lies beyond is given back.

    Returns:
        whether the allocator took the settings; False on systems without glibc.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(set_option(_MMAP_THRESHOLD, LARGEST_KEPT) and set_option(_TRIM_THRESHOLD, up_to))
