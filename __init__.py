"""faashound: any program as an HTTP function, now or later; see README.md."""

import os
import sys

# Our programs are started where functions lie, and with the variables that functions need: an `email.py` in the
# working directory (`python -m`) or in PYTHONPATH must not stand for the standard library's.  So a program of ours,
# not one that imports us, looks there last.  watchdog.py, which also runs alone, does the same for itself.
if sys.argv[:1] == ["-m"] or os.path.basename("".join(sys.argv[:1])) in ("fwatchdog", "fgateway", "fworker"):  # noqa: PTH119
    _stdlib = os.path.dirname(getattr(os, "__file__", ""))  # noqa: PTH120
    if _stdlib in sys.path:
        sys.path[:] = sys.path[sys.path.index(_stdlib) :] + sys.path[: sys.path.index(_stdlib)]
