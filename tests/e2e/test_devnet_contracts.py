"""Our contracts through the Chain port on each simulated chain of this machine, and on the memory twin."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import trio

from node.chain.artifacts import contract
from node.chain.client import EvmChain
from node.chain.deployment import Deployment
from node.chain.memory import MemoryChain, MemoryLedger
from node.chain.tx_policy import DEVNET_POLICY
from node.errors import ChainError, ConfigError
from node.ports import Chain, ClaimEntry, TxResult, WorkerOnChain
from node.signer.bare import Bare
from node.testing.devnet.anvil import find_anvil
from node.testing.devnet.devnet import Devnet, devnet
from protocol.ids import ZERO_ADDRESS, Address, Hash32, keccak256
from protocol.keys import PrivateKey
from protocol.typed_data import Allocation, ChannelConfig, Close, HotKey, Voucher

PAYER, SESSION, WORKER, OWNER = (PrivateKey(bytes([n]) * 32) for n in (1, 2, 3, 4))
PAYOUT = Address(b"\x99" * 20)
HOUR = 3600

KINDS = [
    pytest.param("anvil", marks=pytest.mark.skipif(find_anvil() is None, reason="anvil is not on this machine")),
    pytest.param("embedded", marks=pytest.mark.skipif(find_spec("eth") is None, reason="py-evm is not installed")),
    "memory",
]
REAL = KINDS[:2]
BEST = KINDS[:1] if find_anvil() is not None else KINDS[1:2]
"""Where the kind of chain makes no difference one is enough: the embedded chain takes seconds to start."""


@dataclass
class World:
    """One chain seen by four accounts."""

    chains: dict[Address, Chain]
    advance: Callable[[int], Awaitable[None]]
    net: Devnet | None = None

    def __getitem__(self, key: PrivateKey) -> Any:
        return self.chains[key.address]


@asynccontextmanager
async def world(kind: str) -> AsyncIterator[World]:
    people = (PAYER, SESSION, WORKER, OWNER)
    if kind == "memory":
        ledger = MemoryLedger()
        for key in people:
            ledger.mint(key.address, native=10**20, tokens=10_000)

        async def advance(seconds: int) -> None:
            ledger.advance(seconds)

        yield World({key.address: MemoryChain(ledger, key.address) for key in people}, advance)
        return
    async with devnet(kind) as net:  # type: ignore[arg-type]
        deployment = await net.deploy()
        chains: dict[Address, Chain] = {}
        for key in people:
            await net.faucet(key.address, native=10**20, tokens=10_000)
            chains[key.address] = await EvmChain.connect(
                [net.url], deployment, Bare(key), policy=DEVNET_POLICY, poll=0.01
            )
        try:
            yield World(chains, net.advance, net)
        finally:
            for chain in chains.values():
                await chain.aclose()  # type: ignore[attr-defined]


def run(kind: str, main: Callable[[World], Awaitable[None]]) -> None:
    async def timed() -> None:
        with trio.fail_after(120):
            async with world(kind) as w:
                await main(w)

    trio.run(timed)


def a_config(chain: Chain, salt: int = 0) -> ChannelConfig:
    return ChannelConfig(
        PAYER.address, SESSION.address, WORKER.address, WORKER.address, chain.token, HOUR, Hash32(bytes([salt]) * 32)
    )


async def allocate(w: World, config: ChannelConfig, allocated: int, by: PrivateKey = WORKER) -> TxResult:
    chain = w[by]
    valid_before = (await chain.head()).timestamp + HOUR
    order = Allocation(config.channel_id(chain.domain), allocated, valid_before)
    return await chain.allocate(config, allocated, valid_before, PAYER.sign(order.digest(chain.domain)))


def voucher(chain: Chain, config: ChannelConfig, cumulative: int, amount: int | None = None) -> ClaimEntry:
    digest = Voucher(config.channel_id(chain.domain), cumulative).digest(chain.domain)
    return ClaimEntry(config, cumulative if amount is None else amount, cumulative, SESSION.sign(digest))


async def collect(chain: Chain, count: int) -> list[Any]:
    found: list[Any] = []
    with trio.fail_after(20):
        async for event in chain.events(0):
            found.append(event)
            if len(found) == count:
                return found
    return found


def ok(results: TxResult | Sequence[TxResult]) -> None:
    for result in [results] if isinstance(results, TxResult) else results:
        assert result.ok, result


@pytest.mark.parametrize("kind", KINDS)
def test_deposit_allocate_claim_settle_withdraw(kind: str) -> None:
    async def main(w: World) -> None:
        payer, worker, token = w[PAYER], w[WORKER], w[PAYER].token
        config = a_config(payer)
        channel_id = config.channel_id(payer.domain)
        sent = await payer.deposit(token, 5_000)
        ok(sent)
        assert [result.purpose for result in sent] == ["approve", "deposit"]
        assert await payer.vault_balance(token, PAYER.address) == 5_000
        assert await payer.token_balance(token, PAYER.address) == 5_000
        deadline = (await worker.head()).timestamp + HOUR
        consent = HotKey(OWNER.address, WORKER.address, PAYOUT, 0, deadline)
        ok(
            await w[OWNER].register_worker(
                WORKER.address, PAYOUT, deadline, WORKER.sign(consent.digest(worker.workers_domain))
            )
        )
        assert await worker.payout_of(WORKER.address) == PAYOUT
        assert await worker.worker(WORKER.address) == WorkerOnChain(OWNER.address, True, PAYOUT, 1)
        ok(await allocate(w, config, 1_000))
        ok(await allocate(w, config, 1_500))
        state = await worker.channel(channel_id)
        assert (state.allocated, state.claimed, state.withdraw_at, state.closed) == (1_500, 0, 0, False)
        ok(await worker.claim([voucher(worker, config, 700)]))
        ok(await worker.claim([voucher(worker, config, 700), voucher(worker, config, 1_000, amount=900)]))
        assert (await worker.channel(channel_id)).claimed == 900 and await worker.owed(WORKER.address, token) == 900
        ok(await worker.settle(WORKER.address, token))
        assert await worker.owed(WORKER.address, token) == 0
        assert await worker.vault_balance(token, PAYOUT) == 900
        final = Close(channel_id, 1_000)
        entry = voucher(worker, config, 1_200)
        ok(await payer.close_channel(config, 1_000, 1_200, entry.signature, WORKER.sign(final.digest(payer.domain))))
        assert await payer.vault_balance(token, PAYER.address) == 4_000
        ok(await payer.withdraw(token, 4_000, SESSION.address))
        assert await payer.token_balance(token, SESSION.address) == 14_000
        names = [event.name for event in await collect(worker, 15)]
        assert names == [
            "Deposited", "Registered", "Allocated", "Locked", "Allocated", "Locked", "Claimed", "ClaimSkipped", "Claimed",
            "Settled", "Released", "Closed", "Released", "Released", "VaultWithdrawn",
        ]  # fmt: skip

    run(kind, lambda w: skip_sealing(w, main))


async def skip_sealing(w: World, main: Callable[[World], Awaitable[None]]) -> None:
    """The deploy script's own events come first on a real chain; readers start after them."""
    if w.net is not None:
        for chain in w.chains.values():
            chain.deployment = replace(chain.deployment, block=(await chain.head()).number + 1)  # type: ignore[attr-defined]
    await main(w)


@pytest.mark.parametrize("kind", KINDS)
def test_the_payer_gets_its_money_back_from_a_silent_worker(kind: str) -> None:
    async def main(w: World) -> None:
        payer = w[PAYER]
        config = a_config(payer)
        ok(await payer.deposit(payer.token, 1_000))
        ok(await allocate(w, config, 1_000, by=PAYER))
        ok(await w[SESSION].initiate_withdraw(config))
        began = await payer.channel(config.channel_id(payer.domain))
        assert began.withdraw_at > (await payer.head()).timestamp
        early = await payer.finalize_withdraw(config)
        assert (early.ok, early.error, early.hash) == (False, "Channels_TooEarly", b"")
        ok(await w[WORKER].claim([voucher(payer, config, 250)]))
        await w.advance(HOUR + 1)
        ok(await w[WORKER].finalize_withdraw(config))
        assert await payer.vault_balance(payer.token, PAYER.address) == 750
        assert (await payer.channel(config.channel_id(payer.domain))).closed
        late = await w[WORKER].finalize_withdraw(config)
        assert late.error == "Channels_Closed"

    run(kind, main)


@pytest.mark.parametrize("kind", [*BEST, "memory"])
def test_native_coins(kind: str) -> None:
    async def main(w: World) -> None:
        payer = w[PAYER]
        sent = await payer.deposit(ZERO_ADDRESS, 10**18)
        ok(sent)
        assert [result.purpose for result in sent] == ["deposit"]
        assert await payer.vault_balance(ZERO_ADDRESS, PAYER.address) == 10**18
        before = await payer.native_balance(PAYOUT)
        ok(await payer.withdraw(ZERO_ADDRESS, 10**17, PAYOUT))
        assert await payer.native_balance(PAYOUT) == before + 10**17
        with pytest.raises(ChainError):
            await payer.deposit(ZERO_ADDRESS, 10**30)

    run(kind, main)


@pytest.mark.parametrize("kind", KINDS)
def test_every_refusal_has_its_name_and_costs_no_gas(kind: str) -> None:
    async def main(w: World) -> None:
        payer, worker = w[PAYER], w[WORKER]
        token, config = payer.token, a_config(payer)
        now = (await payer.head()).timestamp
        channel_id = config.channel_id(payer.domain)

        def order(amount: int, before: int, key: PrivateKey = PAYER) -> tuple[ChannelConfig, int, int, bytes]:
            return config, amount, before, key.sign(Allocation(channel_id, amount, before).digest(payer.domain))

        spent = await worker.native_balance(WORKER.address)
        cases = [
            (worker.allocate(*order(100, now + HOUR)), "Vault_Insufficient"),
            (worker.allocate(*order(100, now - 1)), "Channels_Expired"),
            (worker.allocate(*order(100, now + HOUR, WORKER)), "Channels_BadSignature"),
            (worker.allocate(config, 100, now + HOUR, b""), "Channels_BadSignature"),
            (worker.allocate(replace(config, withdraw_delay=1), 1, now + HOUR, b""), "Channels_DelayOutOfRange"),
            (worker.settle(WORKER.address, token), "Channels_NothingOwed"),
            (worker.initiate_withdraw(config), "Channels_Unknown"),
            (worker.finalize_withdraw(config), "Channels_Unknown"),
            (worker.claim([]), "Channels_BatchSize"),
            (worker.withdraw(token, 1, WORKER.address), "Vault_Insufficient"),
            (worker.withdraw(token, 0, WORKER.address), "Vault_ZeroAmount"),
            (worker.withdraw(token, 1, ZERO_ADDRESS), "Vault_BadRecipient"),
            (worker.register_worker(OWNER.address, ZERO_ADDRESS, now + HOUR, b""), "Workers_ZeroAddress"),
            (worker.register_worker(OWNER.address, PAYOUT, now + HOUR, bytes(65)), "Workers_BadSignature"),
        ]
        for call, name in cases:
            result = await call
            assert (result.ok, result.error, result.hash, result.gas_used) == (False, name, b"", 0)
        assert await worker.native_balance(WORKER.address) == spent
        deposits = await payer.deposit(PAYOUT, 5)
        assert deposits[-1].error == "Vault_TokenNotAllowed"
        deposits = await payer.deposit(token, 10**9)
        assert deposits[-1].error == "ERC20InsufficientBalance"
        for bad in (-1, 1 << 256):
            with pytest.raises(ChainError):
                await payer.deposit(token, bad)
        with pytest.raises(ChainError):
            await payer.allocate(config, 1 << 128, now + HOUR, b"")

    run(kind, main)


@pytest.mark.parametrize("kind", REAL)
def test_a_chain_or_contract_that_is_not_ours_is_refused_at_connect(kind: str) -> None:
    async def main(w: World) -> None:
        assert w.net is not None
        good = await w.net.deploy()
        other, _ = await fresh_deployment(w.net)

        async def refused(deployment: Deployment, message: str) -> None:
            with pytest.raises(ChainError, match=message):
                await EvmChain.connect([w.net.url], deployment, Bare(PAYER))  # type: ignore[union-attr]

        await refused(replace(good, chain_id=1), "not of chain 1")
        await refused(replace(good, channels=PAYOUT), "no contract at")
        await refused(replace(good, vault=good.workers, workers=good.vault), "is not our Vault")
        await refused(replace(good, channels=good.token), "is not our Channels")
        await refused(replace(good, vault=other.vault), "stands on another vault")
        for name in ("workers", "jobs", "disputes", "committee"):
            stranger = replace(good, **{name: getattr(other, name)})  # type: ignore[arg-type]
            await refused(stranger, f"{name.title()} at .* stands on another vault")
        await refused(replace(good, attestations=good.token), "is not our Attestations")
        _, extra = await w.net.funder.create("deploy Workers", contract("Workers").initcode(good.vault))
        await refused(replace(good, workers=extra), "does not know these Workers")
        impostor = await clone_with_foreign_domain(w.net, good)
        await refused(replace(good, channels=impostor), "another EIP-712 domain")
        with pytest.raises(ChainError, match=r"is a node of chain"):
            await EvmChain.connect([w.net.url], replace(good, chain_id=good.chain_id + 1), Bare(PAYER))

    run(kind, main)


async def fresh_deployment(net: Devnet) -> tuple[Deployment, list[TxResult]]:
    from node.chain.deploy import deploy

    return await deploy(net.funder, net.chain_id, test_token=True)


async def clone_with_foreign_domain(net: Devnet, good: Deployment) -> Address:
    """Our own runtime code at another address, with the immutable hash of the domain's name replaced."""
    code = await net.eth.code(good.channels)
    assert contract("Channels").is_runtime(code)
    code = code.replace(keccak256(b"Gristmill"), keccak256(b"Millstone"))
    size = len(code).to_bytes(2)
    # PUSH2 size, DUP1, PUSH1 11, PUSH0, CODECOPY, PUSH0, RETURN
    initcode = b"\x61" + size + b"\x80\x60\x0a\x5f\x39\x5f\xf3" + code
    _, address = await net.funder.create("deploy clone", initcode)
    assert await net.eth.code(address) == code
    return address


@pytest.mark.parametrize("kind", BEST)
def test_one_changed_byte_of_code_is_refused(kind: str) -> None:
    async def main(w: World) -> None:
        assert w.net is not None
        good = await w.net.deploy()
        ours = contract("Channels")
        code = await w.net.eth.code(good.channels)
        assert ours.is_runtime(code)
        filled = {i for start, length in ours.immutables for i in range(start, start + length)}
        for i in range(0, len(code), 97):
            changed = code[:i] + bytes([code[i] ^ 1]) + code[i + 1 :]
            assert ours.is_runtime(changed) is (i in filled)
        assert not ours.is_runtime(code + b"\0") and not ours.is_runtime(code[:-1])

    run(kind, main)


def test_deployment_files_are_checked(tmp_path: Path) -> None:
    good = Deployment(
        1, *(Address(bytes([n]) * 20) for n in (1, 2, 3, 4)), 5, *(Address(bytes([n]) * 20) for n in (5, 6, 7, 8))
    )
    without = replace(good, committee=ZERO_ADDRESS)
    assert Deployment.from_json(without.to_json()) == without
    assert not without.has("Committee")
    with pytest.raises(ConfigError, match="no Committee"):
        without.address_of("Committee")
    path = tmp_path / "deployment.json"
    good.save(path)
    assert Deployment.load(path) == good
    text = good.to_json().decode()
    bad = {
        "": "not a deployment file",
        "[" * 5000: "not a deployment file",
        text.replace('"block"', '"blok"'): "not a deployment file",
        text.replace('"version": 2', '"version": 3'): "version 3",
        text.replace('"version": 2', '"version": 1').replace(
            '"jobs"', '"not yet"'
        ): "version 1, .* its contracts are others",
        text.replace('"chain_id": 1', '"chain_id": -1'): "out of range",
        text.replace(str(good.channels), "0x1234"): "not an address",
        text.replace(str(good.workers), str(good.vault)): "an address of its own",
        text.replace(str(good.committee), str(good.vault)): "an address of its own",
        text.replace(str(good.disputes), str(ZERO_ADDRESS)): "an address of its own",
        text + " " * 20_000: "at most",
    }
    for content, message in bad.items():
        with pytest.raises(ConfigError, match=message):
            Deployment.from_json(content.encode())
    with pytest.raises(ConfigError, match="cannot read"):
        Deployment.load(tmp_path / "absent.json")
