"""The memory twin is the chain: the same random actions on both, every result, number and event equal."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import trio

from node.chain.client import EvmChain
from node.chain.memory import MemoryChain, MemoryLedger
from node.chain.tx_policy import DEVNET_POLICY
from node.errors import ChainError
from node.ports import Chain, ClaimEntry, TxResult
from node.signer.bare import Bare
from node.testing.devnet.anvil import find_anvil
from node.testing.devnet.devnet import devnet
from protocol.ids import ZERO_ADDRESS, Address, Hash32
from protocol.keys import PrivateKey
from protocol.typed_data import Allocation, ChannelConfig, Close, HotKey, Voucher

KEYS = [PrivateKey(bytes([n]) * 32) for n in range(11, 15)]
HOUR = 3600
STEP = 1000
"""Seconds of one time jump: far more than the seconds that blocks themselves add on either chain."""

KINDS = [
    pytest.param("anvil", marks=pytest.mark.skipif(find_anvil() is None, reason="anvil is not on this machine")),
    pytest.param("embedded", marks=pytest.mark.skipif(find_spec("eth") is None, reason="py-evm is not installed")),
]


class Side:
    """One of the two chains, driven by plain numbers so that both get the same."""

    def __init__(self, chains: list[Chain], names: Mapping[Address, str]) -> None:
        self.chains = chains
        self.names = names

    def config(self, n: int) -> ChannelConfig:
        payer, session, worker, other = (key.address for key in KEYS)
        token = self.chains[0].token
        shapes = [
            (payer, session, worker, worker, token, HOUR),
            (payer, payer, worker, other, token, HOUR),
            (other, session, worker, worker, ZERO_ADDRESS, HOUR),
            (payer, session, other, ZERO_ADDRESS, token, HOUR),
            (payer, session, worker, worker, token, 60),
            (payer, session, worker, other, token, HOUR),
        ]
        return ChannelConfig(*shapes[n], Hash32(bytes([n]) * 32))

    async def do(self, action: tuple[Any, ...]) -> list[tuple[str, bool, str, bool]]:
        what, who, *rest = action
        chain = self.chains[who]
        domain = chain.domain
        now = (await chain.head()).timestamp
        try:
            match what, rest:
                case "deposit", [native, amount]:
                    found: Any = await chain.deposit(ZERO_ADDRESS if native else chain.token, amount)
                case "withdraw", [native, amount, to]:
                    found = await chain.withdraw(ZERO_ADDRESS if native else chain.token, amount, KEYS[to].address)
                case "allocate", [n, amount, late, signer]:
                    config, before = self.config(n), now + (-1 if late else HOUR)
                    digest = Allocation(config.channel_id(domain), amount, before).digest(domain)
                    found = await chain.allocate(config, amount, before, KEYS[signer].sign(digest))
                case "claim", [parts]:
                    entries = []
                    for n, amount, ceiling, signer in parts:
                        digest = Voucher(self.config(n).channel_id(domain), ceiling).digest(domain)
                        entries.append(ClaimEntry(self.config(n), amount, ceiling, KEYS[signer].sign(digest)))
                    found = await chain.claim(entries)
                case "settle", [native, receiver]:
                    found = await chain.settle(KEYS[receiver].address, ZERO_ADDRESS if native else chain.token)
                case "close", [n, final, ceiling, signer, closer]:
                    channel_id = self.config(n).channel_id(domain)
                    voucher = KEYS[signer].sign(Voucher(channel_id, ceiling).digest(domain))
                    close = KEYS[closer].sign(Close(channel_id, final).digest(domain))
                    found = await chain.close_channel(self.config(n), final, ceiling, voucher, close)
                case "initiate", [n]:
                    found = await chain.initiate_withdraw(self.config(n))
                case "finalize", [n]:
                    found = await chain.finalize_withdraw(self.config(n))
                case "register", [hot, nonce]:
                    owner, hot_key, payout = chain.account, KEYS[hot], KEYS[(hot + 1) % 4].address
                    consent = HotKey(owner, hot_key.address, payout, nonce, now + HOUR).digest(chain.workers_domain)
                    found = await chain.register_worker(hot_key.address, payout, now + HOUR, hot_key.sign(consent))
                case _:
                    raise AssertionError(action)
        except ChainError:
            return [(what, False, "ChainError", False)]
        results: list[TxResult] = [found] if isinstance(found, TxResult) else list(found)
        return [(r.purpose, r.ok, r.error, bool(r.hash)) for r in results]

    async def numbers(self) -> dict[str, object]:
        chain = self.chains[0]
        found: dict[str, object] = {}
        for n in range(6):
            state = await chain.channel(self.config(n).channel_id(chain.domain))
            found[f"channel {n}"] = (state.allocated, state.claimed, bool(state.withdraw_at), state.closed)
        for token in (chain.token, ZERO_ADDRESS):
            vault = await chain.vault(token)
            assert vault.coins >= vault.liabilities
            found[f"vault {token == ZERO_ADDRESS}"] = vault
        for i, key in enumerate(KEYS):
            found[f"payout {i}"] = await chain.payout_of(key.address)
            found[f"coins {i}"] = await chain.token_balance(chain.token, key.address)
            for token in (chain.token, ZERO_ADDRESS):
                found[f"vault {i} {token == ZERO_ADDRESS}"] = await chain.vault_balance(token, key.address)
                found[f"owed {i} {token == ZERO_ADDRESS}"] = await chain.owed(key.address, token)
        return found

    def plain(self, value: Any) -> Any:
        """A value of an event without what differs between the chains: own addresses, ids and times."""
        chain = self.chains[0]
        ids = {self.config(n).channel_id(chain.domain): f"channel {n}" for n in range(6)}
        if isinstance(value, ChannelConfig):
            return next(n for n in range(6) if self.config(n) == value)
        return ids.get(value, self.names.get(value, value)) if isinstance(value, bytes) else value

    async def events(self, count: int) -> list[object]:
        found: list[object] = []
        if count:
            async for event in self.chains[0].events(0):
                if event.name not in ("TokenSet", "Sealed", "RoleGranted", "DefaultAdminTransferScheduled"):
                    args = {k: self.plain(v) for k, v in event.args.items() if k != "withdrawAt"}
                    found.append((event.name, args))
                if len(found) == count:
                    break
        return found


PRELUDE: list[tuple[Any, ...]] = [
    ("deposit", 0, False, 1_000),
    ("deposit", 3, True, 500),
    ("allocate", 2, 0, 40, False, 0),
    ("allocate", 2, 1, 250, False, 0),
    ("allocate", 2, 2, 250, False, 3),
    ("register", 1, 2, 0),
    ("allocate", 2, 5, 100, False, 0),
    ("close", 1, 5, 40, 60, 1, 3),
]
"""So that money is in play from the start, and one close pays a payout address that is not the key."""


def random_action(rng: random.Random) -> tuple[Any, ...]:
    who, amount = rng.randrange(4), rng.choice([0, 1, 40, 100, 250, 300, 10**6])
    channel = rng.choice([0, 0, 0, 1, 2, 3, 4])
    payers = [0, 0, 3, 0, 0]
    sessions = [1, 0, 1, 1, 1]
    closers = [2, 3, 2, 3, 2]

    def mostly(right: int) -> int:
        return right if rng.random() < 0.85 else rng.randrange(4)

    match rng.choices(
        ["deposit", "withdraw", "allocate", "claim", "settle", "close", "initiate", "finalize", "register", "advance"],
        [4, 2, 6, 6, 2, 2, 2, 3, 1, 2],
    )[0]:
        case "deposit":
            return "deposit", rng.choice([0, 0, 3]), rng.random() < 0.3, rng.choice([0, 100, 500, 10**6])
        case "withdraw":
            return "withdraw", who, rng.random() < 0.3, amount, rng.randrange(4)
        case "allocate":
            return "allocate", who, channel, amount, rng.random() < 0.1, mostly(payers[channel])
        case "claim":
            parts = []
            for _ in range(rng.choice([0, 1, 1, 2, 3])):
                n = rng.choice([0, 0, 1, 2, 3])
                ceiling = rng.choice([10, 40, 100, 250])
                parts.append((n, max(0, ceiling - rng.choice([0, 0, 5, -1])), ceiling, mostly(sessions[n])))
            return "claim", who, parts
        case "settle":
            return "settle", who, rng.random() < 0.2, mostly(2)
        case "close":
            final = rng.choice([0, 100, 250, 250])
            return (
                "close",
                who,
                channel,
                final,
                rng.choice([final, final, 40]),
                mostly(sessions[channel]),
                mostly(closers[channel]),
            )
        case "initiate":
            return "initiate", mostly(payers[channel]), channel
        case "finalize":
            return "finalize", who, channel
        case "register":
            return "register", who, rng.randrange(4), rng.choice([0, 0, 1])
        case _:
            return "advance", rng.choice([1, 1, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_memory_and_chain_agree(kind: str) -> None:
    seen: Counter[tuple[str, bool, str]] = Counter()

    async def one_world(seed: int, actions: int) -> None:
        rng = random.Random(seed)
        async with devnet(kind) as net:  # type: ignore[arg-type]
            deployment = await net.deploy()
            ledger = MemoryLedger()
            real: list[Chain] = []
            for key in KEYS:
                await net.faucet(key.address, native=10**20, tokens=2_000)
                ledger.mint(key.address, native=10**20, tokens=2_000)
                real.append(await EvmChain.connect([net.url], deployment, Bare(key), policy=DEVNET_POLICY, poll=0.01))
            twins: list[Chain] = [MemoryChain(ledger, key.address) for key in KEYS]
            left = Side(real, {deployment.channels: "channels", deployment.token: "token"})
            right = Side(twins, {ledger.channels: "channels", ledger.token: "token"})
            history = []
            for action in [*PRELUDE, *(random_action(rng) for _ in range(actions))]:
                history.append(action)
                if action[0] == "advance":
                    await net.advance(STEP * action[1])
                    ledger.advance(STEP * action[1])
                    continue
                one, two = await left.do(action), await right.do(action)
                assert one == two, (seed, history)
                seen.update((action[0], ok, error) for _, ok, error, _ in one)
                if len(history) % 4 == 0:  # forty questions: not after every step
                    assert await left.numbers() == await right.numbers(), (seed, history)
            assert await left.numbers() == await right.numbers(), (seed, history)
            told = ledger.canonical_events()
            assert await left.events(len(told)) == await right.events(len(told)), (seed, history)
            for chain in real:
                await chain.aclose()  # type: ignore[attr-defined]

    async def main() -> None:
        with trio.fail_after(280):
            worlds, actions = (3, 90) if kind == "anvil" else (1, 30)
            for seed in range(worlds):
                await one_world(seed, actions)

    trio.run(main)
    if kind == "anvil":  # a generator that never succeeds would prove nothing
        done = {what for what, ok, _ in seen if ok}
        assert done >= {
            "deposit",
            "withdraw",
            "allocate",
            "claim",
            "settle",
            "close",
            "initiate",
            "finalize",
            "register",
        }
