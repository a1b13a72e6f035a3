"""The tables of the queue's file, version by version; what opens an older file runs the scripts that it lacks."""

from __future__ import annotations

# --------------------------------------------------------------------------------------------------------------------
# Schema
#
# `calls` holds what changes and what is searched for, in rows short enough that changing a state does not copy a body;
# `requests`, `results` and `attempts` hang on its integer key. Every partial index exists for one question:
#
#   calls_queued      which functions have work due, and which call is the first of each? Delayed calls sort behind the
#                     due ones of their function, so they cost nothing; a million rows cost as much as ten.
#   calls_expiring    which queued calls are past their `expires_s`?
#   calls_idempotent  has this key been seen for this function?
#   calls_state       lists and counts by state and function
#   calls_finished    which rows may retention drop? (never dead letters: they are not in it)
#   calls_dead        which dead letters are past their `keep_dead`?
#   callbacks_ready   which destinations have a delivery due, and which is the first of each? As `calls_queued`, but
#                     only what has been found due is in it (`ready`): receivers that are down for hours, thousands of
#                     them, are not passed over by each claim.
#   callbacks_due     which deliveries fall due next?
#
# A lease's primary key is its fence: AUTOINCREMENT never gives a number twice, so an old fence matches nothing.
# --------------------------------------------------------------------------------------------------------------------

APPLICATION_ID = 0x66616173  # "faas", in the file's header


SQLITE_VERSION = (3, 38, 0)  # STRICT tables, and json_each always there


MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE calls (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        function TEXT NOT NULL,
        queue TEXT NOT NULL,
        state TEXT NOT NULL,
        due_s REAL NOT NULL,
        expires_s REAL,
        idempotency_key TEXT,
        accepted_s REAL NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        started_s REAL,
        finished_s REAL,
        status INTEGER,
        error TEXT,
        duration_s REAL,
        cancel_requested INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE INDEX calls_queued ON calls (queue, function, due_s, id) WHERE state = 'queued';
    CREATE INDEX calls_expiring ON calls (expires_s) WHERE state = 'queued' AND expires_s IS NOT NULL;
    CREATE UNIQUE INDEX calls_idempotent ON calls (function, idempotency_key) WHERE idempotency_key IS NOT NULL;
    CREATE INDEX calls_state ON calls (state, function);
    CREATE INDEX calls_finished ON calls (finished_s) WHERE state IN ('done', 'cancelled', 'expired');

    CREATE TABLE requests (
        seq INTEGER PRIMARY KEY REFERENCES calls ON DELETE CASCADE,
        method TEXT NOT NULL,
        path TEXT NOT NULL,
        query TEXT NOT NULL,
        callback_url TEXT,
        headers TEXT NOT NULL,
        bytes_count INTEGER NOT NULL,
        file TEXT,
        inline BLOB
    ) STRICT;
    CREATE INDEX requests_file ON requests (file) WHERE file IS NOT NULL;

    CREATE TABLE results (
        seq INTEGER PRIMARY KEY REFERENCES calls ON DELETE CASCADE,
        stored_s REAL NOT NULL,
        headers TEXT NOT NULL,
        excerpt BLOB,
        bytes_count INTEGER,
        file TEXT,
        inline BLOB
    ) STRICT;
    CREATE INDEX results_file ON results (file) WHERE file IS NOT NULL;
    CREATE INDEX results_stored ON results (stored_s) WHERE bytes_count IS NOT NULL;

    CREATE TABLE attempts (
        seq INTEGER NOT NULL REFERENCES calls ON DELETE CASCADE,
        number INTEGER NOT NULL,
        started_s REAL NOT NULL,
        finished_s REAL NOT NULL,
        status INTEGER,
        error TEXT,
        PRIMARY KEY (seq, number)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE callbacks (
        seq INTEGER PRIMARY KEY REFERENCES calls ON DELETE CASCADE,
        state TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        due_s REAL NOT NULL,
        status INTEGER,
        error TEXT
    ) STRICT;
    CREATE INDEX callbacks_pending ON callbacks (due_s) WHERE state = 'pending';
    CREATE INDEX callbacks_state ON callbacks (state);

    CREATE TABLE leases (
        fence INTEGER PRIMARY KEY AUTOINCREMENT,
        seq INTEGER NOT NULL UNIQUE REFERENCES calls ON DELETE CASCADE,
        kind TEXT NOT NULL,
        owner TEXT NOT NULL,
        boot TEXT NOT NULL,
        until_s REAL NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE clock (boot TEXT NOT NULL, offset_s REAL NOT NULL) STRICT;
    """,
    """
    ALTER TABLE callbacks ADD COLUMN queue TEXT NOT NULL DEFAULT '';
    ALTER TABLE callbacks ADD COLUMN destination TEXT NOT NULL DEFAULT '';
    ALTER TABLE callbacks ADD COLUMN ready INTEGER NOT NULL DEFAULT 0;
    UPDATE callbacks SET
        queue = (SELECT queue FROM calls WHERE calls.seq = callbacks.seq),
        destination = (SELECT destination_of(callback_url) FROM requests WHERE requests.seq = callbacks.seq);
    DROP INDEX callbacks_pending;
    CREATE INDEX callbacks_ready ON callbacks (queue, destination, due_s) WHERE state = 'pending' AND ready = 1;
    CREATE INDEX callbacks_due ON callbacks (ready, due_s) WHERE state = 'pending';
    """,
    """
    UPDATE calls SET function = function || '.openfaas-fn' WHERE instr(function, '.') = 0;
    """,
    """
    ALTER TABLE requests ADD COLUMN body_digest TEXT;
    """,
    # What each function has waiting, that is queued or running, so that a put need not count.
    """
    CREATE TABLE waiting (function TEXT PRIMARY KEY, calls INTEGER NOT NULL, bytes INTEGER NOT NULL)
    STRICT, WITHOUT ROWID;
    INSERT INTO waiting SELECT function, count(*), sum(bytes_count) FROM calls JOIN requests USING (seq)
        WHERE state IN ('queued', 'running') GROUP BY function;
    CREATE INDEX calls_dead ON calls (finished_s) WHERE state = 'dead';
    """,
)
