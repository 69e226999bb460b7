"""Attestations: what issuers say about workers. Nothing here moves money."""

from __future__ import annotations

from dataclasses import replace

from protocol.escrow.state import Attestation, Escrow, EscrowError, put, require
from protocol.ids import ZERO_ADDRESS, Address, Hash32


def attest(
    state: Escrow, now: int, caller: Address, subject: Address, topic: Hash32, data: Hash32, valid_until: int
) -> Escrow:
    """The caller vouches for `topic` of `subject`, in place of what it said before."""
    require(subject != ZERO_ADDRESS, "Attestations_ZeroAddress")
    require(now < valid_until, "Attestations_Expired")
    before = state.attestations.get((caller, subject, topic))
    version = before.version + 1 if before else 1
    return _put(state, caller, subject, topic, Attestation(data, now, valid_until, False, version))


def revoke_attestation(state: Escrow, caller: Address, subject: Address, topic: Hash32) -> Escrow:
    """Attestations.revoke: the caller takes back what it said."""
    said = state.attestations.get((caller, subject, topic))
    if said is None:
        raise EscrowError("Attestations_Unknown")
    require(not said.revoked, "Attestations_Revoked")
    return _put(state, caller, subject, topic, replace(said, revoked=True))


def is_valid(state: Escrow, now: int, issuer: Address, subject: Address, topic: Hash32) -> bool:
    said = state.attestations.get((issuer, subject, topic))
    return said is not None and not said.revoked and now < said.valid_until


def _put(state: Escrow, issuer: Address, subject: Address, topic: Hash32, said: Attestation) -> Escrow:
    return replace(state, attestations=put(state.attestations, (issuer, subject, topic), said))
