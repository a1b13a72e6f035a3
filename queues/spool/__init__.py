"""The queue of one machine: SQLite and files in one directory."""
