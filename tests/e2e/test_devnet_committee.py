"""A case from challenge to fee on each simulated chain: real blocks, real headers, gas as a node estimates it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import trio

from node.chain.artifacts import contract, decode_log, error_name
from node.chain.deploy import PLAY_COMMITTEE
from node.chain.headers import header_rlp
from node.chain.tx_policy import DEVNET_POLICY
from node.chain.txs import TxSender
from node.signer.bare import Bare
from node.testing.contracts import quote_tuple
from node.testing.devnet.anvil import find_anvil
from node.testing.devnet.devnet import Devnet, devnet
from protocol.escrow.committee import SEED_DELAY, commitment_of
from protocol.escrow.state import Outcome
from protocol.ids import Address, Hash32, keccak256
from protocol.keys import PrivateKey
from protocol.typed_data import Domain, Order, Quote, Submission

CLIENT, WORKER, JUROR = (PrivateKey(bytes([n]) * 32) for n in (1, 3, 5))
RESULT, SALT = Hash32(b"\xab" * 32), Hash32(b"\xcd" * 32)
TICKETS = 3
KINDS = [
    pytest.param("anvil", marks=pytest.mark.skipif(find_anvil() is None, reason="anvil is not on this machine")),
    pytest.param("embedded", marks=pytest.mark.skipif(find_spec("eth") is None, reason="py-evm is not installed")),
]


class World:
    """A chain, our contracts on it, and one sender per key."""

    def __init__(self, net: Devnet) -> None:
        self.net = net
        self.where: Any = net.deployment
        self._senders = {
            key.address: TxSender(net.eth, Bare(key), net.chain_id, error_name=error_name, policy=DEVNET_POLICY)
            for key in (CLIENT, WORKER, JUROR)
        }

    async def do(self, who: PrivateKey, name: str, function: str, *args: Any, at: Address | None = None) -> Any:
        """The transaction's result; it must have worked."""
        to = at or self.where.address_of(name)
        result = await self._senders[who.address].send(function, to, contract(name).encode(function, *args))
        assert result.ok, f"{name}.{function}: {result.error}"
        return result

    async def view(self, name: str, function: str, *args: Any) -> Any:
        shipped = contract(name)
        answer = await self.net.eth.eth_call(self.where.address_of(name), shipped.encode(function, *args))
        return shipped.decode(function, answer)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_on_a_real_chain(kind: Any) -> None:
    trio.run(_case, kind)


async def _case(kind: Any) -> None:
    async with devnet(kind) as net:
        await net.deploy()
        world = World(net)
        token, vault = world.where.token, world.where.vault
        for key, coins in ((CLIENT, 10_000), (WORKER, 0), (JUROR, TICKETS * PLAY_COMMITTEE.seat_bond)):
            await net.faucet(key.address, native=10**18, tokens=coins)
            if coins:
                await world.do(key, "TestToken", "approve", vault, coins, at=token)
                await world.do(key, "Vault", "deposit", token, coins, key.address)
        await world.do(JUROR, "Committee", "enroll", TICKETS)
        head = await net.eth.header()
        assert head is not None
        quote = Quote(
            *(Hash32(b"\x01" * 32), CLIENT.address, WORKER.address, token, 1000, 0),
            *(head.timestamp + 3000, head.timestamp + 3000, 3600, world.where.committee, Hash32(bytes(32))),
        )
        domain = Domain(net.chain_id, world.where.jobs)
        job_id, terms = quote.job_id(domain), quote_tuple(quote)
        order = CLIENT.sign(Order(job_id).digest(domain))
        await world.do(WORKER, "Jobs", "open", terms, WORKER.sign(quote.digest(domain)), order)
        word = WORKER.sign(Submission(job_id, RESULT, 900).digest(domain))
        await world.do(WORKER, "Jobs", "submit", terms, RESULT, 900, word)
        opened = await world.do(CLIENT, "Disputes", "open", terms, Hash32(b"\xee" * 32))

        # A cold resolver on a chain took the case with the gas that a node's estimate gave it.
        logs = await net.eth.logs_between([world.where.disputes], opened.block, opened.block)
        events = [decode_log(contract("Disputes"), log) for log in logs]
        assert [event.args["resolverTook"] for event in events if event] == [True]
        assert opened.gas_used < 400_000

        case = await world.view("Committee", "caseOf", job_id)
        seed_block, commit_ends, reveal_ends = case[1:4]
        assert seed_block == opened.block + SEED_DELAY
        await net.mine(SEED_DELAY + 1)
        shown = await net.rpc.call("eth_getBlockByNumber", hex(seed_block), False)
        header = header_rlp(shown)
        await world.do(CLIENT, "Committee", "seal", job_id, header)
        randao = bytes.fromhex(shown["mixHash"][2:])
        assert (await world.view("Committee", "caseOf", job_id))[8] == keccak256(randao + job_id)

        for ticket in range(TICKETS):
            said = commitment_of(job_id, JUROR.address, ticket, Outcome.REJECT, RESULT, SALT)
            await world.do(JUROR, "Committee", "commit", job_id, ticket, said)
        await _until(net, commit_ends)
        for ticket in range(TICKETS):
            await world.do(JUROR, "Committee", "reveal", job_id, ticket, Outcome.REJECT, RESULT, SALT)
        assert await world.view("Committee", "outcome", job_id) == Outcome.REJECT
        assert (await net.eth.header()).timestamp < reveal_ends  # type: ignore[union-attr]
        await world.do(WORKER, "Disputes", "resolve", terms)
        for ticket in range(TICKETS):
            await world.do(JUROR, "Committee", "claimFee", terms, ticket)

        left = {
            name: await world.view("Vault", "balanceOf", token, account)
            for name, account in (("client", CLIENT.address), ("worker", WORKER.address), ("juror", JUROR.address))
        }
        assert left == {"client": 10_000 - 900 - 100, "worker": 900 + 50, "juror": 50}
        for module in ("Jobs", "Disputes"):
            assert await world.view("Vault", "lockedBy", world.where.address_of(module), token) == 0


async def _until(net: Devnet, at: int) -> None:
    head = await net.eth.header()
    assert head is not None
    if head.timestamp < at:
        await net.advance(at - head.timestamp)
