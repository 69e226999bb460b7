"""Vault: the ledger. Balances and locks change here and nowhere else.

*Coins* stay outside: a deposit is told what arrived, or that the token refused; `withdraw` only books. *Roles* too: who may
pause or list tokens is the caller's affair. *Permits and authorizations* are the token's: a bad one is a refusal.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from protocol.escrow.state import Escrow, EscrowError, Module, add, require
from protocol.ids import ZERO_ADDRESS, Address

COINS_REFUSED: Final = "the token refuses"
"""In place of an error name: each token has its own."""


def set_token(state: Escrow, token: Address, allowed: bool) -> Escrow:
    return replace(state, tokens=state.tokens | {token} if allowed else state.tokens - {token})


def set_paused(state: Escrow, paused: bool) -> Escrow:
    return replace(state, paused=paused)


def deposit(
    state: Escrow, token: Address, amount: int, beneficiary: Address, *, value: int = 0, received: int | None = None
) -> Escrow:
    """Credit `beneficiary`. `value` is the native coin sent along, `received` what the token really delivered."""
    _admit(state, token, beneficiary)
    require(value == (amount if token == ZERO_ADDRESS else 0), "Vault_WrongValue")
    return _credited(state, token, beneficiary, amount if received is None else received)


def deposit_with_permit(state: Escrow, token: Address, beneficiary: Address, received: int | None) -> Escrow:
    """As `deposit`, for tokens only. `received` is None when the token refused, with the permit or without."""
    _admit(state, token, beneficiary)
    require(token != ZERO_ADDRESS, "Vault_WrongValue")
    return _credited(state, token, beneficiary, received)


def deposit_with_authorization(state: Escrow, token: Address, sender: Address, received: int | None) -> Escrow:
    """EIP-3009: whoever submits, the credit is `sender`'s, who signed. `received` is None when the token refused."""
    return deposit_with_permit(state, token, sender, received)


def withdraw(state: Escrow, caller: Address, token: Address, amount: int, to: Address) -> Escrow:
    """Book `amount` out of the vault. The coins go to `to`; a token that refuses makes the whole call revert."""
    require(to not in (ZERO_ADDRESS, state.vault), "Vault_BadRecipient")
    require(amount > 0, "Vault_ZeroAmount")
    return _debit(state, token, caller, amount)


# ------------------------------------------------------------------------------------------------------ modules only


def lock(state: Escrow, module: Module, token: Address, account: Address, amount: int) -> Escrow:
    """A free balance -> the module's lock. Stopped by a pause."""
    require(not state.paused, "Vault_Paused")
    return lock_bond(state, module, token, account, amount)


def lock_bond(state: Escrow, module: Module, token: Address, account: Address, amount: int) -> Escrow:
    """As `lock`, pause or not: a bond is part of a way out (I9)."""
    state = _debit(state, token, account, amount)
    return replace(state, locked=add(state.locked, (module, token), amount))


def release(state: Escrow, module: Module, token: Address, to: Address, amount: int) -> Escrow:
    """The module's lock -> a free balance."""
    require(amount <= state.locked_by(module, token), "Vault_ReleaseExceedsLocked")
    return _credit(replace(state, locked=add(state.locked, (module, token), -amount)), token, to, amount)


def _admit(state: Escrow, token: Address, beneficiary: Address) -> None:
    require(not state.paused, "Vault_Paused")
    require(token in state.tokens, "Vault_TokenNotAllowed")
    require(beneficiary != ZERO_ADDRESS, "Vault_ZeroAddress")


def _credited(state: Escrow, token: Address, beneficiary: Address, received: int | None) -> Escrow:
    if received is None:
        raise EscrowError(COINS_REFUSED)
    require(received > 0, "Vault_ZeroAmount")
    return _credit(state, token, beneficiary, received)


def _credit(state: Escrow, token: Address, account: Address, amount: int) -> Escrow:
    return replace(state, balances=add(state.balances, (token, account), amount))


def _debit(state: Escrow, token: Address, account: Address, amount: int) -> Escrow:
    balance = state.balance_of(token, account)
    if amount > balance:
        raise EscrowError("Vault_Insufficient", f"{account} holds {balance}, {amount} wanted")
    return _credit(state, token, account, -amount)
