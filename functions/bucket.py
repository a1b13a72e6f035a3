"""Deployments, secrets and namespaces in a bucket of NATS, where every gateway of a cluster sees the same.

    documents = BucketDocuments(bucket, "functions")   # a `Store`, as Documents on a disk is
    shelves = BucketShelves(bucket, "secrets")         # and `Shelves`

Keys are `functions.NAME.NAMESPACE`, `secrets.NAMESPACE.NAME` and `namespaces.NAME`.  What changes documents blocks, and
belongs in a thread: it waits for the loop that the bucket was opened in.  It raises ChangedMeanwhile where another
gateway was faster, and the queue's errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..calls.names import is_label

if TYPE_CHECKING:  # which wants nats-py, an extra
    from ..queues.jetstream.bucket import Bucket


class BucketDocuments:
    """Those keys of a bucket that begin with `kind.`, as a `Store`."""

    def __init__(self, bucket: Bucket, kind: str) -> None:
        self._bucket = bucket
        self._kind = kind

    def place(self, name: str) -> str:
        """See `Store`."""
        return f"{self._kind}.{name} in NATS"

    def names(self) -> list[str]:
        """See `Store`."""
        start = f"{self._kind}."
        return sorted(key.removeprefix(start) for key in self._bucket.kept if key.startswith(start))

    def read_all(self) -> Iterator[tuple[str, bytes | OSError]]:
        """See `Store`."""
        for name in self.names():
            value = self.read(name)
            if value is not None:
                yield name, value

    def read(self, name: str) -> bytes | None:
        """See `Store`."""
        found = self._bucket.kept.get(f"{self._kind}.{name}")
        return None if found is None else found.value

    def write(self, name: str, content: bytes) -> None:
        """See `Store`."""
        self._bucket.wait_for(self._bucket.put(f"{self._kind}.{name}", content))

    def delete(self, name: str) -> None:
        """See `Store`."""
        self._bucket.wait_for(self._bucket.delete(f"{self._kind}.{name}"))


class BucketShelves:
    """The secrets of a bucket: a `Store` for each namespace, see `Shelves`."""

    def __init__(self, bucket: Bucket, kind: str) -> None:
        self._bucket = bucket
        self._kind = kind

    def spaces(self) -> list[str]:
        """See `Shelves`."""
        names = BucketDocuments(self._bucket, self._kind).names()
        return sorted({space for space in (name.partition(".")[0] for name in names) if is_label(space)})

    def space(self, name: str) -> BucketDocuments:
        """See `Shelves`."""
        return BucketDocuments(self._bucket, f"{self._kind}.{name}")
