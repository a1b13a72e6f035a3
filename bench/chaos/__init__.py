"""Break everything, again and again, under load, and see whether a call that was accepted is lost.

    python -m bench.chaos --minutes 10
    python -m bench.chaos --minutes 1 --seed 7 --rate 20 --workers 2

A gateway with a worker of its own, a second worker beside it, functions (programs behind watchdogs, and one elsewhere)
and a receiver of callbacks run as real processes on one spool.  Asynchronous calls come at `--rate` a second: with and
without callbacks, delays, expiries, idempotency keys, large bodies, ids of their own; some are cancelled.  Functions
and receiver answer by a script that travels in the path.  Meanwhile, at random instants, one after the other: kill -9,
SIGTERM and SIGSTOP (a worker: past its lease) of gateway, worker and watchdog; the receiver down; the disk full.  With
`--workers` the gateway is several worker processes, and each of them is killed and stopped as well.

At the end everything is up again and must drain.  What is audited, and what a broken promise is, stands in ledger.py,
whose table is printed.  The exit status is 1 after a broken promise.  The same seed gives the same calls and the same
faults, at instants that the machine decides.  Full disks need the right to mount a tmpfs.
"""
