"""The limits of the spool, each with its reason."""

from __future__ import annotations

GROUP_COUNT = 512  # writes in one commit; bounds how long one process keeps the others waiting


ROWS_COUNT = 64  # calls that one statement queues; longer ones take longer to prepare, and save nothing more


STEP_COUNT = 500  # rows or pages that housekeeping touches in one commit, for the same reason


SPARE_PAGE_COUNT = 256  # free pages left in the file for the next calls (1 MiB)


LOCK_S = 8.0  # for the lock that processes take turns by


LOCK_PAUSE_S = 0.0002  # between two tries


BUSY_S = 5.0  # only strangers (a backup, a shell) can hold SQLite's lock: ours take turns by `writer.lock`


IDLE_S = 30.0  # longest sleep without a look at the queue: bounds the harm of a wall clock that is set


SET_BACK_S = 60.0  # a wall clock that is set back by less only delays what is due


RECLAIM_S = 1.0  # shortest time between two looks for dead owners


STOOD_STILL_S = 0.5  # a look that is so late: this process stood still, and first has as long to renew its own leases


KEPT_HEADERS_CHARS = 1024  # of a request's fields, as stored: longer ones go when its payload does


DEAD_LETTER_BYTES = 1024  # what a dead letter without bodies is reckoned to take


ORPHAN_S = 3600.0  # a stored body that no row names after this time is a crash's leftover


SETTLED_NS = 1_000_000_000  # a directory not changed for so long shows its next change by another time stamp


FILE_CHUNK_BYTES = 256 * 1024  # bodies go to and from files in pieces of this size, one thread hop each


RESERVE_PART = 8  # of a small disk, the part that the reserve takes at most


RESULTS_PART = 0.75  # of the reserve, what results may take; the rest is for steps that give room back


SLACK_PART = 4  # of the reserve, the part that is to be free besides: for the rows that are written beside bodies


PAGE_BYTES = 4096  # of SQLite's file


AMPLE_BYTES = 64 << 20  # with so much room for one commit, the disk is not looked at again for AMPLE_S


AMPLE_S = 0.05  # a disk takes less than half of AMPLE_BYTES in that time


TOLD_S = 60.0  # between two lines about the same disk


ROOM_PAUSE_S = 1.0  # before a result that has found no room is tried again


SHORT_STEP_COUNT = 32  # the same while the reserve is in use, which has to hold all that a commit changes
DATABASE = "spool.sqlite3"
FUNCTIONS_COUNT = 4096  # with calls waiting at once: where callers can make up names, each costs 1.5 us in every claim
