"""Errors by blame, and the closed vocabularies that cross the wire.

Two names answer "whose fault is it?" for the whole protocol: `LocalProtocolError` (our caller broke a rule) and
`RemoteProtocolError` (the other side did). Pure code raises Local for what it was asked to do and Remote for what it was
given to read; a driver answers the second with its `WireCode`, ends that stream and keeps the process.

Numbers are the wire's: never reuse or renumber one, only append.
"""

from __future__ import annotations

from enum import IntEnum

from protocol.tame import one_line


class WireCode(IntEnum):
    """Why a stream ended early. Sent in `Abort`. The texts here become docs/spec/errors.md."""

    INTERNAL = 1
    """The sender failed for a reason of its own; nothing the peer did.

    Fix: Try another worker; ask again later.
    """
    MALFORMED = 2
    """Bytes that are no message: bad length, bad msgpack, unknown field, wrong type, out of bounds.

    Fix: A bug in the sender. Do not repeat the same bytes.
    """
    TOO_LARGE = 3
    """A frame over the limit of its kind.

    Fix: Send less; the limits are in [messages.md](messages.md).
    """
    UNEXPECTED = 4
    """A well-formed message that the transition table has no key for in this state.

    Fix: A bug in the sender; the table is in [job.md](job.md).
    """
    BAD_SIGNATURE = 5
    """A signature that is malformed, malleable (high s) or by the wrong key.

    Fix: Sign again with the right key, low s.
    """
    WRONG_DOMAIN = 6
    """Signed for another chain, contract or channel.

    Fix: Compare chain id and contract addresses with the offer.
    """
    BAD_VOUCHER = 7
    """A voucher that is lower than the last, over the allocation, or for another channel.

    Fix: Query the channel and go on from what the worker holds.
    """
    EXPIRED = 8
    """An offer, ask or allocation past its time.

    Fix: Fetch the current offer and ask again.
    """
    BAD_RECEIPT = 9
    """A receipt that does not follow from the stream: digest, counts, cost or bindings differ.

    Fix: Do not pay; keep the stream as evidence.
    """
    DEADLINE = 10
    """The agreed deadline passed.

    Fix: Ask with a later deadline, or another worker.
    """
    UNPAID = 11
    """The credit window was used up and no voucher came in time.

    Fix: The client did not keep up: check its clock, connection and allocation.
    """
    CANCELLED = 12
    """The client no longer wants the result.

    Fix: Nothing; the receipt covers what was delivered.
    """
    DRAINING = 13
    """The worker is shutting down.

    Fix: Ask another worker.
    """
    BACKEND = 14
    """The model runtime failed.

    Fix: Ask another worker; the operator looks at the log.
    """
    BAD_INPUT = 15
    """Media that break what the ask said of them: more than declared, cut inside a sample, not coming, or not to be decoded.

    Fix: Declare enough, send without long pauses, and check the file.
    """
    BAD_OUTPUT = 16
    """Output that cannot be an answer: rows cut, too few or too many, values that are no numbers, text where numbers belong.

    Fix: Do not pay for more; ask another worker.
    """


class RefusalReason(IntEnum):
    """Why a worker does not take a job. A closed set: signed, countable, each with its fix, each said somewhere.

    7, 18, 25 and 26 were never said and are gone; their numbers are not given again.
    """

    MODEL_UNKNOWN = 1
    """This worker does not sell that model id.

    Fix: Choose from the current offer, which comes with the refusal.
    """
    CONTEXT_EXCEEDED = 2
    """Prompt and `max_tokens` do not fit the context of the model, or the memory of the worker. Found before any work.

    Fix: Shorten the prompt or lower `max_tokens`.
    """
    MAX_TOKENS_EXCEEDED = 3
    """More tokens asked for than the offer sells in one part.

    Fix: Lower `max_tokens`.
    """
    UNSUPPORTED_PARAM = 4
    """A parameter that this worker does not honour; the detail names it.

    Fix: Leave it out, or choose a worker whose offer lists it.
    """
    OFFER_EXPIRED = 5
    """The ask names an offer past its time.

    Fix: Ask under the current offer.
    """
    OFFER_UNKNOWN = 6
    """The ask names an offer that this worker did not make or no longer remembers.

    Fix: Ask under the current offer.
    """
    CHANNEL_UNKNOWN = 8
    """No such channel is journaled here.

    Fix: Open it first: send the signed allocation.
    """
    CHANNEL_CLOSING = 9
    """The channel is being closed or withdrawn from.

    Fix: Open another channel.
    """
    ALLOCATION_INSUFFICIENT = 10
    """The job can cost more than is left of the allocation.

    Fix: Raise the allocation, or lower `max_tokens`.
    """
    VOUCHER_INSUFFICIENT = 11
    """What is owed is not covered by the voucher plus the credit.

    Fix: Send a higher voucher.
    """
    VOUCHER_INVALID = 12
    """The voucher is not above the last one, or its signature does not hold.

    Fix: Query the channel; sign above what the worker holds.
    """
    SIGNER_MISMATCH = 13
    """The ask or voucher is not signed by the channel's session key.

    Fix: Sign with `payerAuthorizer` of the channel.
    """
    WRONG_WORKER = 14
    """The ask is addressed to another worker.

    Fix: Send it to the address that it names.
    """
    WRONG_DOMAIN = 15
    """Another chain, contract or token than the offer's.

    Fix: Compare with the offer.
    """
    DEADLINE_INVALID = 16
    """The deadline is past or more than a day ahead.

    Fix: Check the clock.
    """
    BUSY = 17
    """No place is free and none is expected in time.

    Fix: Try another worker, or wait.
    """
    CREDIT_EXHAUSTED = 19
    """Unpaid work over all channels is at the operator's cap.

    Fix: Pay ahead: send a voucher that covers the whole job.
    """
    CHAIN_STALE = 20
    """The worker has not seen the chain lately and will not extend trust.

    Fix: Try another worker; the operator checks the RPC server.
    """
    DRAINING = 21
    """The worker is shutting down.

    Fix: Try another worker.
    """
    DUPLICATE_JOB = 22
    """This part of this job was already taken or served.

    Fix: Fetch the kept result instead, or use a new job id.
    """
    PROMPT_INVALID = 23
    """The messages do not form a prompt for this model.

    Fix: Check roles and their order.
    """
    INTERNAL = 24
    """The worker failed for a reason of its own.

    Fix: Try another worker.
    """
    NO_BATCH = 27
    """This worker takes no batch jobs on that chain.

    Fix: Try another worker.
    """
    JOB_UNKNOWN = 28
    """No quote or job of that id is held for this peer; a quote is forgotten when its time is over.

    Fix: Ask for a quote again; ask under the key that asked for the quote.
    """
    OVER_BUDGET = 29
    """The job can cost more than the client would pay.

    Fix: Offer more, lower `max_tokens`, or post fewer inputs.
    """
    BELOW_MINIMUM = 30
    """The job is worth less than the transactions it takes.

    Fix: Post more inputs in one job, or use a channel.
    """
    FUNDS_INSUFFICIENT = 31
    """The client's vault does not hold the job's amount.

    Fix: Deposit, then order again while the quote stands.
    """
    JOB_TOO_LARGE = 32
    """The worker has no room for the job's specification and result.

    Fix: Post fewer inputs, lower `max_tokens`, or try another worker.
    """
    TERMS_UNACCEPTABLE = 33
    """The dispute window, the resolver or the penalty asked for is not what this worker agrees to; the detail says which.

    Fix: Ask for what the detail names.
    """
    RESULT_NOT_READY = 34
    """There is no result yet.

    Fix: Ask for the job's status; ask again when it is done.
    """
    TASK_UNSUPPORTED = 35
    """This worker's model does something else than what is asked of it.

    Fix: Choose a model whose offer lists the task.
    """
    INPUT_INVALID = 36
    """The texts, the audio or the image are nothing that this model can take; the detail says why.

    Fix: Correct what the detail names: a text too long, an image that does not decode, audio that ends inside a sample.
    """

    @property
    def code(self) -> str:
        """The reason as users and JSON see it, for instance ``context_exceeded``."""
        return self.name.lower()


class GristmillError(Exception):
    """Root of every error that Gristmill raises on purpose."""


class ProtocolError(GristmillError):
    """A rule of the protocol was broken; the subclass says by whom."""


class LocalProtocolError(ProtocolError):
    """Our own side asked for something the protocol does not allow. The state is unchanged."""


class RemoteProtocolError(ProtocolError):
    """The other side sent something the protocol does not allow."""

    def __init__(self, code: WireCode, message: str) -> None:
        self.detail = one_line(message)
        """It may be the other side's own words."""
        super().__init__(f"{code.name.lower()}: {self.detail}")
        self.code = code
        """What to send back, and what to count."""


class InvalidValue(LocalProtocolError):
    """A value that cannot exist (an address of 19 bytes, a negative amount). Decoders turn it into Remote."""
