#!/usr/bin/env python3
"""Takes the seconds that its body names, or one, telling how far it is: something to wait for, or to cancel."""

import sys
import time

seconds = float(sys.stdin.read().strip() or 1)
deadline_s = time.monotonic() + seconds
while (left_s := deadline_s - time.monotonic()) > 0:
    print(f"{left_s:.0f} s to go", flush=True)
    time.sleep(min(left_s, 1))
print("done")
