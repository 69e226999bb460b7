"""Asking the worker about a job, and fetching its result piece by piece. What comes is judged by the caller."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec

from node.errors import NetworkError, Refused, WorkerFault
from node.network.drive import converse
from node.ports import Network
from protocol.batch import BatchState
from protocol.errors import InvalidValue, RemoteProtocolError
from protocol.ids import Hash32, PeerId
from protocol.keys import require_signer
from protocol.messages import (
    BATCH_PROTOCOL,
    BatchRefusal,
    GetResult,
    JobStatus,
    ResultChunk,
    amount_from_wire,
)
from protocol.tame import one_line
from protocol.typed_data import Submission
from protocol.workload import content_hash

log = logging.getLogger(__name__)
ANSWER_S = 30.0
PIECE_S = 60.0


@dataclass(frozen=True, slots=True)
class Told:
    """What the worker says of a job. Its own word: money goes by what the contract says."""

    done: int
    total: int
    failure: str
    result_hash: Hash32 | None
    claimed: int
    size: int
    transaction: bytes


async def reach(network: Network, state: BatchState) -> PeerId:
    """Be connected to the job's worker. Raises `NetworkError`."""
    try:
        peer = PeerId(state.peer)
    except InvalidValue as error:
        raise NetworkError(f"the journal names no worker for job {state.label!r}: {error}") from error
    if peer in network.peers:
        return peer
    if not state.address:
        raise NetworkError(f"the address of {peer} is not known", hint="name it with --worker MULTIADDR")
    return await network.connect(state.address)


async def ask(network: Network, state: BatchState, question: msgspec.Struct) -> Told:
    """A question that is answered with the job's status. Raises `Refused`, `WorkerFault`, `NetworkError` or `Timeout`."""
    reply = await _converse(network, state, question, ANSWER_S)
    if not isinstance(reply, JobStatus):
        raise WorkerFault(f"{state.peer} answered {type(reply).__name__} to a question about a job")
    told = Told(
        done=reply.done,
        total=reply.total,
        failure=one_line(reply.failure),
        result_hash=Hash32(reply.result_hash) if len(reply.result_hash) == 32 else None,
        claimed=amount_from_wire(reply.claimed),
        size=reply.size,
        transaction=reply.transaction,
    )
    if told.result_hash is not None:
        said = Submission(state.job_id, told.result_hash, told.claimed)
        try:
            require_signer(said.digest(state.domain), reply.submission, state.quote.worker, "submission")
        except RemoteProtocolError as error:
            raise WorkerFault(f"{state.peer}: {error.detail}") from error
    return told


async def fetch(network: Network, state: BatchState, result_hash: Hash32) -> bytes:
    """The bytes of that hash. Raises `WorkerFault` when the worker shows others, and as `ask` does."""
    raw = bytearray()
    while True:
        reply = await _converse(network, state, GetResult(job_id=bytes(state.job_id), offset=len(raw)), PIECE_S)
        if not isinstance(reply, ResultChunk) or reply.offset != len(raw) or reply.job_id != state.job_id:
            raise WorkerFault(f"{state.peer} answered with another piece than was asked for")
        if not reply.data:
            break
        raw += reply.data
        if len(raw) > state.terms.room:
            raise WorkerFault(f"{state.peer} sends more than the {state.terms.room} bytes that the job can give")
    if content_hash(bytes(raw)) != result_hash:
        raise WorkerFault(f"{state.peer} shows {len(raw)} bytes that are not those of the result")
    return bytes(raw)


async def _converse(network: Network, state: BatchState, question: msgspec.Struct, timeout_s: float) -> msgspec.Struct:
    peer = await reach(network, state)
    try:
        reply: msgspec.Struct = await converse(network, peer, BATCH_PROTOCOL, question, timeout_s=timeout_s)
    except RemoteProtocolError as error:
        raise WorkerFault(f"{peer} does not answer: {error}") from error
    if isinstance(reply, BatchRefusal):
        raise Refused(reply.reason, reply.detail)
    return reply
