"""Whether two processes share one network: the same kernel, and the same network namespace of it.

Only then does a loopback address mean the same to both: a container has its machine's kernel and its own loopback.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def network_identity() -> str:
    """Return text that only processes of this very network namespace share; "" where the kernel does not tell."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot_id}/{os.stat('/proc/self/ns/net').st_ino}"  # noqa: PTH116 - of what the link leads to
    except OSError:
        return ""
