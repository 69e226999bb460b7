"""Running digest of a stream's output: token ids, and the text bytes that go with them.

Both sides extend it as chunks pass. It does not depend on how tokens were cut into chunks, so the worker may coalesce
freely, and each part of a job that several workers served has its own.

    digest = sha256( "gristmill/output/1" || job id || part as uint32
                     || sha256(token ids, each uint32 big-endian) || sha256(text in UTF-8) )
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
        self.count = 0
        """Token ids seen so far."""

    def extend(self, token_ids: Iterable[int], text: str) -> None:
        ids = tuple(token_ids)
        self._tokens.update(b"".join(i.to_bytes(4) for i in ids))
        self._text.update(text.encode())
        self.count += len(ids)

    @property
    def value(self) -> Hash32:
        """Digest of everything so far; more may follow."""
        return Hash32(hashlib.sha256(self._prefix + self._tokens.digest() + self._text.digest()).digest())
