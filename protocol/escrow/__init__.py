"""Executable model of the contracts: all of their money and rights as one value, and pure functions on it.

Each function is one Solidity function: the same checks in the same order, the same error names, a new state or an
`EscrowError`. Readability before speed; the differential tests hold the compiled contracts to it after every step.

    state.py         the value
    vault.py         balances and locks
    workers.py       keys, payout addresses, stake, slashes
    channels.py      allocations, vouchers, withdrawals
    jobs.py          escrow for batch jobs
    disputes.py      equivocation, challenges
    committee.py     jurors, cases, seats
    attestations.py  what issuers say

Three things stay outside. *Signatures*: the caller recovers the signer over the digest that the contract computes and
passes the address, or None when the bytes are no signature at all; for a contract wallet it passes the wallet's address
when ERC-1271 says yes. *Coins*: `deposit` is told what arrived, `withdraw` only books. *Sealing and roles*: the state
begins after `Vault.seal`; who may pause or list tokens is the caller's affair.

Times are Unix seconds of the block; amounts the smallest unit of their token; the native coin is the zero address.
"""

from protocol.escrow.attestations import attest, is_valid, revoke_attestation
from protocol.escrow.channels import (
    MAX_BATCH,
    MAX_WITHDRAW_DELAY,
    MIN_WITHDRAW_DELAY,
    Claim,
    SkipReason,
    allocate,
    claim,
    close,
    finalize_withdraw,
    initiate_withdraw,
    settle,
)
from protocol.escrow.committee import (
    claim_fee,
    commit,
    commitment_of,
    enroll,
    forfeit,
    has_seat,
    resign,
    reveal,
    seal,
    wins,
    withdraw_bond,
)
from protocol.escrow.disputes import (
    bond_for,
    most_beside_bond,
    open_dispute,
    prove_equivocation,
    resolve_dispute,
    resolver_says,
)
from protocol.escrow.jobs import fail, finalize, open_job, refund, settle_job, submit
from protocol.escrow.state import (
    BURNT,
    Attestation,
    Capability,
    Case,
    Channel,
    CommitteeTerms,
    Dispute,
    Escrow,
    EscrowError,
    Job,
    JobState,
    Juror,
    Module,
    Outcome,
    Seat,
    SeatState,
    Slash,
    SlashState,
    Stake,
    Worker,
)
from protocol.escrow.vault import (
    deposit,
    deposit_with_authorization,
    deposit_with_permit,
    set_paused,
    set_token,
    withdraw,
)
from protocol.escrow.workers import (
    announce,
    cancel_slash,
    is_retired,
    locked_stake,
    move_slash,
    register,
    revoke,
    rotate,
    set_exposure,
    set_payout,
    stake,
    unstake,
    withdraw_stake,
)

__all__ = [
    "BURNT",
    "MAX_BATCH",
    "MAX_WITHDRAW_DELAY",
    "MIN_WITHDRAW_DELAY",
    "Attestation",
    "Capability",
    "Case",
    "Channel",
    "Claim",
    "CommitteeTerms",
    "Dispute",
    "Escrow",
    "EscrowError",
    "Job",
    "JobState",
    "Juror",
    "Module",
    "Outcome",
    "Seat",
    "SeatState",
    "SkipReason",
    "Slash",
    "SlashState",
    "Stake",
    "Worker",
    "allocate",
    "announce",
    "attest",
    "bond_for",
    "cancel_slash",
    "claim",
    "claim_fee",
    "close",
    "commit",
    "commitment_of",
    "deposit",
    "deposit_with_authorization",
    "deposit_with_permit",
    "enroll",
    "fail",
    "finalize",
    "finalize_withdraw",
    "forfeit",
    "has_seat",
    "initiate_withdraw",
    "is_retired",
    "is_valid",
    "resign",
    "locked_stake",
    "move_slash",
    "most_beside_bond",
    "open_dispute",
    "open_job",
    "prove_equivocation",
    "refund",
    "register",
    "resolve_dispute",
    "resolver_says",
    "reveal",
    "revoke",
    "revoke_attestation",
    "rotate",
    "seal",
    "set_exposure",
    "set_paused",
    "set_payout",
    "set_token",
    "settle",
    "settle_job",
    "stake",
    "submit",
    "unstake",
    "wins",
    "withdraw",
    "withdraw_bond",
    "withdraw_stake",
]
