"""Settings of the system's allocator: what happens to the memory of a step between steps."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of two of glibc's settings (malloc.h)."""
LARGEST_KEPT = 1 << 25
"""Bytes of the largest block that glibc can be told to keep."""
ALL = 2**31 - 1


def give_back_freed_memory() -> None:
    """Return all freed blocks to the system, so that a process holds only what it needs; no-op without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory(up_to: int = ALL) -> bool:
    """Keep freed blocks in this process, so that the next step reuses its buffers.

    glibc returns large freed blocks to the system at once and requests new ones for the next gradient or activation. The
    system then clears every page again, which costs several times the copy that they are for. Results do not change;
    memory that a run once needed stays allocated until it ends.

    Args:
        up_to: bytes at the end of the heap to keep; the rest is returned.

    Returns:
        whether the allocator took the settings; False on systems without glibc.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(set_option(_MMAP_THRESHOLD, LARGEST_KEPT) and set_option(_TRIM_THRESHOLD, up_to))
