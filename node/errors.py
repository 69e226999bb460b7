"""Errors of the node, each with a stable code, an exit status and a hint where one helps.

Client errors are typed by blame: `NoWorker`, `Refused` and `InsufficientFunds` are for the caller to mend, `WorkerFault` and
`VerificationFailed` are the worker's, `ChainError` and `NetworkError` are the world's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from protocol.errors import GristmillError, RefusalReason
from protocol.tame import one_line, tame

if TYPE_CHECKING:
    from protocol.signing import SigningReason


class NodeError(GristmillError):
    """An error shown to a person: what happened, and what to do about it."""

    code: ClassVar[str] = "failure"
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = tame(message)
        """Peers and servers have a word in it."""
        super().__init__(self.message)
        self.hint = hint

    def details(self) -> Mapping[str, Any]:
        """For programs, beside the code: `reason` out of a closed set, or `reasons` per worker; empty when there is none."""
        return {}


class ConfigError(NodeError):
    code = "config"
    exit_status = 3


class KeyError_(NodeError):
    """A key cannot be opened or does not fit."""

    code = "key"
    exit_status = 4


class SignerError(NodeError):
    """The signer cannot be started, or its table does not fit."""

    code = "signer"
    exit_status = 4


class SignerLocked(SignerError):
    """Another process has these keys open: one key, one signer."""

    code = "signer_locked"


class SignerFailed(SignerError):
    """The signer is gone or cannot record what it signs. Nothing more is signed until the next start."""

    code = "signer_failed"


class SignerOutdated(SignerError):
    """Journal and signer's table do not belong together: one of them is an old copy, or lost."""

    code = "signer_outdated"


class SignerRefused(SignerError):
    """The policy does not let the key sign this; `reason` is of the closed set of `protocol.signing.SigningReason`."""

    code = "signer_refused"

    def __init__(self, reason: SigningReason, detail: str, *, hint: str = "") -> None:
        super().__init__(f"not signed ({reason.value}): {detail}", hint=hint)
        self.reason = reason
        self.detail = detail

    def details(self) -> Mapping[str, Any]:
        return {"reason": self.reason.value}


class NetworkError(NodeError):
    code = "network"
    exit_status = 5


class ChainError(NodeError):
    code = "chain"
    exit_status = 6


class TxTimeout(ChainError):
    """A transaction was sent and has no receipt yet. It may still land, so nothing is known about it but its hash."""

    code = "chain_timeout"


class ContractRefused(ChainError):
    """A contract took a transaction and said no; `reason` is the name of its error, empty when it gave none."""

    code = "contract_refused"

    def __init__(self, purpose: str, reason: str, *, hint: str = "") -> None:
        super().__init__(
            f"the {purpose} transaction was refused by the contract: {reason or 'no reason given'}", hint=hint
        )
        self.reason = reason

    def details(self) -> Mapping[str, Any]:
        return {"reason": self.reason}


class ChainMoved(ChainError):
    """What a call was derived from has changed since: look again, and derive it anew."""


class RequestConflict(ChainError):
    """A request id that was used before comes with another call. Nothing was sent."""

    code = "request_conflict"


class ReorgTooDeep(ChainError):
    """The chain changed further back than we remember; what was told can not be undone event by event."""


class ModelError(NodeError):
    code = "model"
    exit_status = 7


class DeviceNotFound(NodeError):
    """What is to compute is not there."""

    code = "device"
    exit_status = 7


class PromptInvalid(ModelError):
    """The request cannot become a prompt: empty, a role out of order, a template that refuses it."""

    code = "prompt_invalid"


class InputInvalid(ModelError):
    """The input of a task is not what it was declared as, or more than the model takes: a text too long, an image that does not
    decode."""

    code = "input_invalid"


class InsufficientFunds(NodeError):
    code = "insufficient_funds"
    exit_status = 8


class LedgerError(NodeError):
    code = "ledger"
    exit_status = 1


class Timeout(NodeError):
    code = "timeout"
    exit_status = 5


class NoWorker(NodeError):
    """No offer fits the request and the policy; `reasons` says why, per worker."""

    code = "no_worker"
    exit_status = 5

    def __init__(self, message: str, reasons: Mapping[str, tuple[str, ...]], *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reasons = dict(reasons)

    def details(self) -> Mapping[str, Any]:
        return {"reasons": self.reasons}


class Refused(NodeError):
    """The chosen worker signed a refusal."""

    code = "refused"
    exit_status = 1

    def __init__(self, reason: RefusalReason, detail: str, *, hint: str = "") -> None:
        self.detail = one_line(detail)
        said = f" ({self.detail})" if self.detail else ""
        super().__init__(f"the worker refused: {reason.code}{said}", hint=hint)
        self.reason = reason

    def details(self) -> Mapping[str, Any]:
        return {"reason": self.reason.code}


class WorkerFault(NodeError):
    """The worker broke off or broke the protocol; what was delivered until then stays with the caller."""

    code = "worker_fault"


class VerificationFailed(NodeError):
    """The worker's receipt does not follow from what it sent. Nothing more is paid."""

    code = "verification_failed"


class JobFailed(NodeError):
    """A batch job ended, or will end, without a result. What was locked for it comes back, but for what silence or a dispute has
    paid."""

    code = "job_failed"
