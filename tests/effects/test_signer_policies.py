"""The policies that nodes start their signers with, against real calldata of our contracts."""

from __future__ import annotations

from typing import Any

import pytest

from node.chain.artifacts import contract
from node.chain.deployment import Deployment
from node.signer.policies import Spending, client_policy, consent_policy, owner_policy, worker_policy
from node.testing.pair import key
from protocol.ids import ZERO_ADDRESS, Address, Hash32
from protocol.signing import ChannelAllocation, KeyRole, Policy, Rulebook, SigningReason, SigningRefused, request
from protocol.signing_policy import check
from protocol.transactions import Transaction
from protocol.typed_data import Allocation, ChannelConfig, HotKey

KEYS = {role: key(role.value) for role in KeyRole}
HERE = Deployment(31337, *(Address(bytes([n]) * 20) for n in (1, 2, 3, 4)), 0)
THERE = Deployment(10, *(Address(bytes([n]) * 20) for n in (5, 6, 7, 8)), 0)
BOTH = (HERE, THERE)
STRANGER, PAYEE = key("stranger").address, key("payee").address
CLIENT = client_policy(BOTH, [Spending(31337, HERE.token, 100), Spending(10, ZERO_ADDRESS, 0)], payees=[PAYEE])
WORKER, OWNER = worker_policy(BOTH), owner_policy(BOTH)
VAULT, TOKEN, CHANNELS, WORKERS = (contract(name) for name in ("Vault", "TestToken", "Channels", "Workers"))


def ask(policy: Policy, role: KeyRole, struct: Any, domain: Any = None) -> SigningReason | None:
    book = Rulebook(policy, {role: held.address for role, held in KEYS.items()})
    try:
        check(book, {}, request(role, struct, domain), 0)
    except SigningRefused as no:
        return no.reason
    return None


def send(policy: Policy, role: KeyRole, to: Address, data: bytes, value: int = 0, chain_id: int = 31337) -> Any:
    return ask(policy, role, Transaction(chain_id, 0, 1, 10**9, 100_000, to, value, data))


def own(role: KeyRole) -> Address:
    return KEYS[role].address


def test_a_payer_puts_money_into_the_vault_and_takes_it_home() -> None:
    role, me = KeyRole.PAYER, own(KeyRole.PAYER)
    allowed = [
        (HERE.vault, VAULT.encode("deposit", HERE.token, 5, me), 0),
        (HERE.vault, VAULT.encode("deposit", ZERO_ADDRESS, 5, me), 5),
        (HERE.vault, VAULT.encode("withdraw", HERE.token, 5, me), 0),
        (HERE.vault, VAULT.encode("withdraw", HERE.token, 5, PAYEE), 0),
        (HERE.token, TOKEN.encode("approve", HERE.vault, 5), 0),
    ]
    for to, data, value in allowed:
        assert send(CLIENT, role, to, data, value) is None
    refused = [
        (HERE.vault, VAULT.encode("deposit", HERE.token, 5, STRANGER), 0),
        (HERE.vault, VAULT.encode("withdraw", HERE.token, 5, STRANGER), 0),
        (HERE.vault, VAULT.encode("withdraw", HERE.token, 5, me), 1),
        (HERE.vault, VAULT.encode("setPaused", True), 0),
        (HERE.token, TOKEN.encode("approve", STRANGER, 5), 0),
        (HERE.token, TOKEN.encode("approve", THERE.vault, 5), 0),
        (HERE.token, TOKEN.encode("transfer", STRANGER, 5), 0),
        (THERE.token, TOKEN.encode("approve", HERE.vault, 5), 0),
        (STRANGER, b"", 10**18),
        (HERE.vault, VAULT.encode("withdraw", HERE.token, 5, me)[:-1], 0),
    ]
    for to, data, value in refused:
        assert send(CLIENT, role, to, data, value) is SigningReason.CALL, data.hex()
    assert send(CLIENT, role, HERE.vault, allowed[0][1], chain_id=1) is SigningReason.DOMAIN


def test_a_payer_moves_penalties_and_asks_nothing_else_of_the_registry() -> None:
    role, me = KeyRole.PAYER, own(KeyRole.PAYER)
    assert send(CLIENT, role, HERE.workers, WORKERS.encode("moveSlash", 7)) is None
    assert send(CLIENT, role, HERE.workers, WORKERS.encode("moveSlash", 7), 1) is SigningReason.CALL
    for data in (
        WORKERS.encode("cancelSlash", 7),
        WORKERS.encode("stake", HERE.token, 5),
        WORKERS.encode("setExposure", HERE.token, 5),
        WORKERS.encode("setPayout", me, STRANGER),
        WORKERS.encode("revoke", me),
    ):
        assert send(CLIENT, role, HERE.workers, data) is SigningReason.CALL
    assert send(WORKER, KeyRole.WORKER, HERE.workers, WORKERS.encode("moveSlash", 7)) is SigningReason.CALL


def test_each_chain_has_its_own_addresses() -> None:
    me = own(KeyRole.PAYER)
    data = VAULT.encode("deposit", ZERO_ADDRESS, 5, me)
    assert send(CLIENT, KeyRole.PAYER, THERE.vault, data, 5, chain_id=10) is None
    assert send(CLIENT, KeyRole.PAYER, HERE.vault, data, 5, chain_id=10) is SigningReason.CALL


def test_a_client_locks_only_what_it_pays_with_and_so_much_a_day() -> None:
    def lock(token: Address, amount: int, where: Deployment) -> SigningReason | None:
        payer, session = own(KeyRole.PAYER), own(KeyRole.SESSION)
        config = ChannelConfig(payer, session, STRANGER, STRANGER, token, 900, Hash32(bytes(32)))
        channel = config.channel_id(where.domain)
        return ask(CLIENT, KeyRole.PAYER, ChannelAllocation(config, Allocation(channel, amount, 1)), where.domain)

    assert lock(HERE.token, 100, HERE) is None
    assert lock(HERE.token, 101, HERE) is SigningReason.OVER_DAY
    assert lock(THERE.token, 1, THERE) is SigningReason.NOT_OURS
    assert lock(ZERO_ADDRESS, 10**20, THERE) is None


def test_a_worker_claims_and_never_sells_itself() -> None:
    """What decides where its earnings go is not signed for a running worker, whoever asks."""
    role, me = KeyRole.WORKER, own(KeyRole.WORKER)
    assert send(WORKER, role, HERE.channels, CHANNELS.encode("settle", me, HERE.token)) is None
    assert send(WORKER, role, HERE.vault, VAULT.encode("withdraw", HERE.token, 5, me)) is None
    consent = HotKey(STRANGER, me, STRANGER, 0, 100)
    assert ask(WORKER, role, consent, HERE.workers_domain) is SigningReason.DOMAIN
    assert ask(consent_policy(BOTH), role, consent, HERE.workers_domain) is None
    assert send(consent_policy(BOTH), role, HERE.channels, CHANNELS.encode("settle", me, HERE.token)) is not None
    for to, data in (
        (HERE.workers, WORKERS.encode("setPayout", me, STRANGER)),
        (HERE.vault, VAULT.encode("withdraw", HERE.token, 5, STRANGER)),
        (HERE.token, TOKEN.encode("transfer", STRANGER, 5)),
    ):
        assert send(WORKER, role, to, data) is SigningReason.CALL


def test_an_owner_sets_payouts_and_signs_nothing_else() -> None:
    role, me = KeyRole.OWNER, own(KeyRole.OWNER)
    assert send(OWNER, role, HERE.workers, WORKERS.encode("setPayout", STRANGER, PAYEE)) is None
    assert send(OWNER, role, HERE.vault, VAULT.encode("deposit", HERE.token, 5, me)) is None
    assert send(OWNER, role, HERE.token, TOKEN.encode("approve", HERE.vault, 5)) is None
    assert send(OWNER, role, HERE.channels, CHANNELS.encode("settle", me, HERE.token)) is SigningReason.CALL
    for kind in CLIENT.domains:
        assert kind not in OWNER.domains


def test_fees_of_a_day() -> None:
    policy = worker_policy(BOTH, day_fees={31337: 10**15})
    data = CHANNELS.encode("settle", own(KeyRole.WORKER), HERE.token)
    assert send(policy, KeyRole.WORKER, HERE.channels, data) is None
    dear = Transaction(31337, 0, 1, 10**11, 100_000, HERE.channels, 0, data)
    assert ask(policy, KeyRole.WORKER, dear) is SigningReason.OVER_DAY
    assert ask(WORKER, KeyRole.WORKER, dear) is None


@pytest.mark.parametrize("policy", [CLIENT, WORKER, OWNER])
def test_a_policy_survives_the_line(policy: Policy) -> None:
    import msgspec

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(policy), type=Policy) == policy
