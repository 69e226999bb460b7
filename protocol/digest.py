"""Running digests: of a stream's output, token ids with their text bytes or rows of numbers; and of input that is streamed.

Both sides extend it as chunks pass. It does not depend on how tokens were cut into chunks, so the worker may coalesce
freely, and each part of a job that several workers served has its own.

    digest = sha256( "gristmill/output/1" || job id || part as uint32
                     || sha256(token ids, each uint32 big-endian) || sha256(text in UTF-8) [ || sha256(numbers) ] )

The last is there when there are numbers, so that a chat's digest is what it was before there were any.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from protocol.ids import Hash32, JobId

_TAG = b"gristmill/output/1"


class OutputDigest:
    def __init__(self, job_id: JobId, part: int) -> None:
        self._prefix = _TAG + job_id + part.to_bytes(4)
        self._tokens = hashlib.sha256()
        self._text = hashlib.sha256()
        self._data = hashlib.sha256()
        self.count = 0
        """Token ids seen so far."""
        self.size = 0
        """Bytes of numbers seen so far."""

    def extend(self, token_ids: Iterable[int], text: str, data: bytes = b"") -> None:
        ids = tuple(token_ids)
        self._tokens.update(b"".join(i.to_bytes(4) for i in ids))
        self._text.update(text.encode())
        self._data.update(data)
        self.count += len(ids)
        self.size += len(data)

    @property
    def value(self) -> Hash32:
        """Digest of everything so far; more may follow."""
        numbers = self._data.digest() if self.size else b""
        return Hash32(hashlib.sha256(self._prefix + self._tokens.digest() + self._text.digest() + numbers).digest())


class InputDigest:
    """What a receipt binds as the request when media followed the ask: the ask's own hash, and the bytes that were taken.

    hash = sha256( "gristmill/streamed/1" || request hash of the ask || number of bytes as uint64 || sha256(bytes) )
    """

    def __init__(self, request_hash: Hash32) -> None:
        self._prefix = b"gristmill/streamed/1" + request_hash
        self._bytes = hashlib.sha256()
        self.size = 0
        """Bytes so far, without those that came with the ask."""

    def extend(self, data: bytes) -> None:
        self._bytes.update(data)
        self.size += len(data)

    @property
    def value(self) -> Hash32:
        return Hash32(hashlib.sha256(self._prefix + self.size.to_bytes(8) + self._bytes.digest()).digest())
