"""Memory that a tensor on the CPU has had is kept for the next one.

glibc gives large blocks back to the kernel as they are freed, and gets them anew, page by page, for the next
tensor: page faults that a CPU spends some hundredths of an update on. This module knows nothing of training.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_NEVER, _LARGEST = -1, 2**31 - 1


def keep_freed_memory() -> None:
    """In this process, from now on, where its allocator is glibc's and nobody has set it up otherwise."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if mallopt is not None and not is_set:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _NEVER)
