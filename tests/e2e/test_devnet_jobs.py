"""A batch job that ends in a dispute, on a real simulated chain: a cheating worker, a client that notices, and every verdict."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from node.audit import audit
from node.chain.client import EvmChain
from node.chain.committee import EvmCommittee
from node.chain.deploy import PLAY_COMMITTEE
from node.chain.stakes import Stakes
from node.chain.tx_policy import DEVNET_POLICY
from node.cli import main as frame
from node.client.client import Client
from node.client.job import Job
from node.client.job_quotes import JobWish
from node.client.settings import ClientSettings
from node.errors import ChainError, JobFailed
from node.signer.bare import Bare
from node.testing.devnet.devnet import Devnet, available, devnet
from node.testing.fake_backend import FakeBackend, FakeSettings
from node.testing.market import START_MS, Market, key, open_market
from node.worker import batch_run
from node.worker.batch_run import RunSettings
from node.worker.payout import set_payout
from node.worker.worker import Worker
from protocol import escrow
from protocol.batch import Timing
from protocol.escrow import JobState, Module, Outcome
from protocol.escrow.committee import SEED_DELAY
from protocol.ids import Address, Hash32, keccak256
from protocol.workload import NOT_BEGUN

pytestmark = pytest.mark.skipif(
    not available(), reason="no simulated chain: neither anvil nor the embedded one is installed"
)

ZOO = Path(__file__).parents[1] / "contracts" / "zoo"
SET = keccak256(b"set(uint8,uint8,uint8)")[:4]
HONEST = 0
DEPOSIT, STAKE, PENALTY = 10_000_000, 20_000, 400
DAY = 24 * 3600
LINES = [f"line number {n}" for n in range(10)]
FAST = Timing(submit_margin=2, accept_grace=1, settle_patience=1, finalize_patience=1, dispute_margin=2)


@dataclass
class World:
    net: Devnet
    market: Market
    judge: Address
    """A resolver that says what the test tells it."""
    worker: Worker
    client: Client
    owner: EvmChain
    payout: Address
    miner: Miner

    @property
    def chain(self) -> EvmChain:
        found = self.client.wallet.chain
        assert isinstance(found, EvmChain)
        return found

    async def judged(self, outcome: Outcome) -> None:
        data = SET + b"".join(n.to_bytes(32) for n in (HONEST, HONEST, outcome))
        assert (await self.net.funder.send("judge", self.judge, data)).ok

    async def balances(self) -> tuple[int, int, int]:
        """Free in the vault: the client's, the worker's payout account's, the owner's."""
        token = self.chain.token
        who = (self.chain.account, self.payout, self.owner.account)
        a, b, c = [await self.chain.vault_balance(token, account) for account in who]
        return a, b, c

    async def locked(self, module: Module) -> int:
        where = {Module.JOBS: self.net.deployment.jobs, Module.DISPUTES: self.net.deployment.disputes}[module]  # type: ignore[union-attr]
        return int(await self.chain.view("Vault", "lockedBy", where, self.chain.token))


def _initcode() -> bytes:
    return bytes.fromhex(json.loads((ZOO / "StrangeResolver.json").read_text())["bytecode"][2:])


async def until(true: Callable[[], Any], within_s: float = 60) -> None:
    with trio.fail_after(within_s):
        while not true():
            await trio.sleep(0.02)


class Miner:
    """Blocks without transactions, so that those with some get confirmed."""

    def __init__(self, net: Devnet) -> None:
        self._net = net
        self.seconds = 1
        """Between two blocks, on the chain."""
        self.works = trio.Event()

    async def run(self) -> None:
        while True:
            await self.works.wait()
            await self._net.advance(self.seconds)
            await trio.sleep(0.05)


def run(main: Callable[[World], Awaitable[None]], confirmations: int = 0) -> None:
    async def timed() -> None:
        with trio.fail_after(300):
            async with AsyncExitStack() as stack:
                world = await _world(stack, confirmations)
                await main(world)
                world.market.nursery.cancel_scope.cancel()

    trio.run(timed)


async def _world(stack: AsyncExitStack, confirmations: int) -> World:
    net = await stack.enter_async_context(devnet())
    head = await net.eth.header()
    assert head is not None
    await net.advance(START_MS // 1000 - head.timestamp)  # the market's own clock begins there
    deployment = await net.deploy()
    _, judge = await net.funder.create("judge", _initcode())
    for who, tokens in (("w", 0), ("c payer", DEPOSIT), ("owner", STAKE)):
        await net.faucet(key(who).address, tokens=tokens)
    market = await stack.enter_async_context(open_market())
    market.further["devnet"] = deployment  # type: ignore[assignment]

    miner = Miner(net)
    market.nursery.start_soon(miner.run)
    if confirmations:
        miner.works.set()

    async def chain_of(who: str) -> EvmChain:
        policy = replace(DEVNET_POLICY, confirmations=confirmations)
        chain = await EvmChain.connect([net.url], deployment, Bare(key(who)), policy=policy, poll=0.02)
        stack.push_async_callback(chain.aclose)
        return chain

    owner, payout = await chain_of("owner"), key("payout").address
    await set_payout(owner, key("w").address, payout, Bare(key("w")))
    for result in await owner.deposit(owner.token, STAKE):
        assert result.ok
    assert (await Stakes(owner).stake(owner.token, STAKE)).ok
    assert (await Stakes(owner).expose(owner.token, STAKE)).ok

    settings = market.settings(market.accepted(ledger=deployment))  # type: ignore[arg-type]
    assert settings.batch is not None
    allowed = settings.batch.quotes.resolvers | {judge, deployment.committee}
    quotes = replace(settings.batch.quotes, resolvers=allowed, margin_s=2, min_duration=4)
    batch = replace(settings.batch, quotes=quotes, run=RunSettings(margin_s=2, pause_s=0.02, piece_s=0.05), timing=FAST)
    backend = FakeBackend(FakeSettings(tokens=6))
    worker = await market.worker(backend, replace(settings, batch=batch), name="w", on=await chain_of("w"))
    quick = ClientSettings(jobs=FAST, job_poll_s=0.1, job_reread_s=0.3, slash_look_s=0.3)
    means = [market.means(ledger=deployment)]  # type: ignore[arg-type]
    client = await market.client(name="c", deposit=DEPOSIT, means=means, settings=quick, on=await chain_of("c payer"))
    return World(net, market, judge, worker, client, owner, payout, miner)


def cheat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker submits an input that it never ran."""
    honest = batch_run.BatchResult
    monkeypatch.setattr(
        batch_run, "BatchResult", lambda spec_hash, items: honest(spec_hash=spec_hash, items=(NOT_BEGUN, *items[1:]))
    )


async def disputed(world: World, resolver: Address) -> tuple[Job, int]:
    """A job under dispute, and what its worker has claimed."""
    wish = JobWish(min_penalty=PENALTY, resolver=resolver, open_s=60)
    job = await world.client.post_job("fake", LINES, max_tokens=8, id="job", wish=wish)
    await until(lambda: job.state.chain is JobState.SUBMITTED)
    with pytest.raises(JobFailed, match="not its result"):
        await job.result(30)
    claimed = job.state.claimed
    assert claimed > 0
    await job.dispute(Hash32(b"\x05" * 32))
    assert job.state.chain is JobState.DISPUTED
    return job, claimed


async def ended(world: World, job: Job, claimed: int, outcome: Outcome) -> None:
    """The money is where the table of docs/spec/batch.md says, nothing is locked, and both journals agree with the chain."""
    await until(lambda: job.state.ended)
    batch = world.worker.batch
    assert batch is not None
    await until(lambda: batch.book.jobs[job.job_id].ended)
    bond = escrow.bond_for(job.state.quote)
    to_worker = {Outcome.ACCEPT: 0, Outcome.REJECT: claimed}.get(outcome, claimed // 2)
    back = {Outcome.REJECT: 0, Outcome.NONE: bond}.get(outcome, bond - bond // 2)
    share = bond - bond // 2 if outcome is Outcome.REJECT else 0
    assert await world.balances() == (DEPOSIT - to_worker - bond + back, to_worker + share, 0)
    assert job.state.paid == to_worker and job.state.accepted is None
    assert (await world.locked(Module.JOBS), await world.locked(Module.DISPUTES)) == (0, 0)
    stake = await Stakes(world.owner).of(world.owner.account, world.owner.token)
    # A lost dispute books the slash: it has left the stake, and moves after the veto delay.
    lost = PENALTY if outcome is Outcome.ACCEPT else 0
    assert (stake.active, stake.held) == (STAKE - lost, 0)
    for node in (world.worker, world.client):
        await node.book.change([])
        chains = node.wallet.chains if isinstance(node, Client) else node.chains
        assert await audit(node.book.ledger, node.book.role, chains) == []
    assert world.market.failures == {}


@pytest.mark.parametrize("outcome", [Outcome.ACCEPT, Outcome.REJECT, Outcome.DRAW])
def test_a_verdict_is_executed_by_itself(outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(world: World) -> None:
        cheat(monkeypatch)
        job, claimed = await disputed(world, world.judge)
        await world.judged(outcome)
        await ended(world, job, claimed, outcome)

    run(main)


def test_a_resolver_that_says_nothing_ends_as_a_draw_with_the_bond_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(world: World) -> None:
        cheat(monkeypatch)
        job, claimed = await disputed(world, world.judge)
        await world.net.advance(15 * DAY)
        await ended(world, job, claimed, Outcome.NONE)

    run(main)


def test_a_committee_without_jurors_ends_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(world: World) -> None:
        cheat(monkeypatch)
        job, claimed = await disputed(world, world.net.deployment.committee)  # type: ignore[union-attr]
        await world.net.advance(15 * DAY)
        await ended(world, job, claimed, Outcome.NONE)

    run(main)


def test_an_opening_that_waits_for_its_confirmations_is_not_void() -> None:
    """Twelve blocks of twelve seconds take longer than a quote stands. Nobody may take the job for one that never was."""

    async def main(world: World) -> None:
        jobs, jobs_view = world.client.jobs, world.chain
        wish = JobWish(min_penalty=PENALTY, open_s=120)
        posted: list[Job] = []

        async def post() -> None:
            posted.append(await world.client.post_job("fake", LINES, max_tokens=8, id="job", wish=wish))

        async def opened() -> bool:
            state = next(iter(jobs.book.jobs.values()), None)
            return state is not None and bool((await jobs_view.view("Jobs", "job", state.job_id))[0])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(post)
            with trio.fail_after(30):
                while not await opened():
                    await trio.sleep(0.01)
            (ordered,) = jobs.book.jobs.values()
            world.miner.seconds = 20
            with trio.fail_after(60):
                while (await world.net.eth.header()).timestamp < ordered.quote.valid_before + 60:  # type: ignore[union-attr]
                    await trio.sleep(0.05)
            world.miner.seconds = 1
        (job,) = posted
        await job.result(60)
        await until(lambda: job.state.ended)
        assert job.state.chain is JobState.SETTLED and job.state.paid > 0
        assert len(jobs.book.jobs) == 1 and not jobs.book.quarantined
        for node in (world.worker, world.client):
            await node.book.change([])
            with node.book.ledger.reading() as connection:
                kinds = {kind for (kind,) in connection.execute("SELECT kind FROM records")}
            assert "batch_ordered" in kinds and "batch_voided" not in kinds
        assert (await Stakes(world.owner).of(world.owner.account, world.owner.token)).active == STAKE

    run(main, confirmations=12)


# -------------------------------------------------------------------------------------------------------------- a juror


class JurorAtHome:
    """A person with three tickets and a command line, in a data dir of its own."""

    def __init__(self, world: World, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        assert world.net.deployment is not None
        self._world, self._capfd = world, capfd
        folder.mkdir(mode=0o700)
        world.net.deployment.save(folder / "deployment.json")
        self._words = ["--json", "--data-dir", str(folder / "data"), "--set", "keys.scrypt_n=4096"]
        self._words += [
            "--set",
            f"chain.rpc_urls={world.net.url}",
            "--set",
            f"chain.deployment={folder / 'deployment.json'}",
        ]
        self.said = ""
        """On stderr, by the last command."""

    async def __call__(self, *words: str) -> tuple[int, list[dict[str, Any]]]:
        self._capfd.readouterr()
        status = await trio.to_thread.run_sync(frame.main, [*self._words, *words])
        told = self._capfd.readouterr()
        self.said = told.err
        return status, [json.loads(line) for line in told.out.splitlines()]

    async def one(self, *words: str) -> dict[str, Any]:
        status, (answer,) = await self(*words)
        assert status == 0, answer
        return answer


async def a_juror(world: World, folder: Path, capfd: pytest.CaptureFixture[str], tickets: int = 3) -> JurorAtHome:
    juror = JurorAtHome(world, folder, capfd)
    await juror.one("init")
    address = Address((await juror.one("wallet", "new", "owner"))["address"])
    status, (error,) = await juror("juror", "enroll", "3")
    assert status == 8 and "nothing to pay gas with" in error["error"]["message"]
    await world.net.faucet(address, tokens=tickets * PLAY_COMMITTEE.seat_bond)
    assert (await juror("juror", "enroll", str(tickets + 1)))[0] == 8
    mine = await juror.one("juror", "enroll", str(tickets), "--id", "first")
    assert [one["purpose"] for one in mine["transactions"]] == ["approve", "deposit", "enroll"]
    assert f"buying {tickets} tickets" in juror.said and f"{10 * tickets} tUSD" in juror.said and "8 days" in juror.said
    again = await juror.one("juror", "enroll", str(tickets), "--id", "first")
    bond = str(tickets * PLAY_COMMITTEE.seat_bond)
    assert (again["tickets"], again["bond"], again["vault_balance"]) == (tickets, bond, "0")
    return juror


def purposes(answer: dict[str, Any]) -> list[str]:
    return [one["purpose"] for one in answer["transactions"]]


def states(answer: dict[str, Any]) -> list[str]:
    return [seat["state"] for seat in answer["seats"]]


def test_a_juror_judges_a_cheat_is_paid_and_the_penalty_reaches_the_client_by_itself(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def main(world: World) -> None:
        cheat(monkeypatch)
        committee = world.net.deployment.committee  # type: ignore[union-attr]
        juror = await a_juror(world, tmp_path / "juror", capfd)
        job, claimed = await disputed(world, committee)
        case = str(job.job_id)
        status, (error,) = await juror("juror", "vote", "0x" + "11" * 32, "accept")
        assert status != 0 and "no case" in error["error"]["message"]

        # Decided before the seed is known: kept, and not sent.
        early = await juror.one("juror", "vote", case, "reject")
        assert (early["phase"], early["vote"], early["transactions"]) == ("seed", "reject", [])
        await world.net.mine(SEED_DELAY + 1)
        # Another mind, as long as nothing has left. The vote seals the case and takes all three seats.
        voted = await juror.one("juror", "vote", case, "accept", "--result", "0x" + "22" * 32)
        assert purposes(voted) == ["juror_seal", *["juror_commit"] * 3]
        assert (voted["phase"], states(voted)) == ("commit", ["committed"] * 3)
        assert "the challenge is right" in juror.said and "10 tUSD is burnt" in juror.said
        assert (await juror.one("juror", "vote", case, "accept", "--result", "0x" + "22" * 32))["transactions"] == []
        status, (error,) = await juror("juror", "vote", case, "reject")
        assert status != 0 and "is final" in error["error"]["message"]
        assert (await juror.one("juror", "tend"))["transactions"] == []

        await world.net.advance(PLAY_COMMITTEE.commit_window)
        done = await juror.one("juror", "tend")
        steps = purposes(done)
        assert steps[:3] == ["juror_reveal"] * 3 and done["accepts"] == 3 and done["found"] == "accept"
        await ended(world, job, claimed, Outcome.ACCEPT)  # by whoever was first: worker, client or juror
        await juror.one("juror", "tend")
        last = await juror.one("juror", "tend")
        assert (last["phase"], states(last), last["transactions"]) == ("ended", ["paid"] * 3, [])
        fee = escrow.bond_for(job.state.quote) // 2
        account, shown = (await juror("juror", "show"))[1]
        assert (account["vault_balance"], shown["job"], shown["vote"]) == (str(fee), case, "accept")

        # The penalty: a week in which nothing moves, and then it comes to the client without anybody asking.
        free, _, _ = await world.balances()
        (slash,) = (await juror("slash", "list", "--all"))[1]
        assert (slash["state"], slash["amount"], slash["cause"]) == ("booked", str(PENALTY), case)
        assert slash["victim"] == str(world.chain.account) and slash["to_victim"] == str(PENALTY // 2)
        assert (await juror("slash", "list"))[1] == []
        status, (error,) = await juror("slash", "move", "1", "--key", "owner")
        assert status == 6 and "can not be moved before" in error["error"]["message"]
        status, (error,) = await juror("slash", "cancel", "1")
        assert status == 6 and "no guardian" in error["error"]["message"]
        await trio.sleep(1)
        assert (await world.balances())[0] == free
        await world.net.advance(7 * DAY)
        with trio.fail_after(30):
            while (await world.balances())[0] < free + PENALTY // 2:
                await trio.sleep(0.05)
        assert (await juror("slash", "list", "--all"))[1][0]["state"] == "moved"
        moved = await juror.one("slash", "move", "1", "--key", "owner")
        assert moved["transactions"] == [], "what has moved is not moved again"

        # The bond leaves by its own delay.
        gone = await juror.one("juror", "resign", "3")
        assert (gone["tickets"], gone["leaving"]) == (0, str(3 * PLAY_COMMITTEE.seat_bond))
        assert (await juror.one("juror", "withdraw"))["transactions"] == []
        await world.net.advance(8 * DAY)
        home = await juror.one("juror", "withdraw")
        assert home["vault_balance"] == str(3 * PLAY_COMMITTEE.seat_bond + fee)
        assert world.market.failures == {}

    run(main)


def test_a_vote_survives_a_chain_that_is_away_and_silence_costs_a_seat_its_ticket(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def main(world: World) -> None:
        cheat(monkeypatch)
        honest = await a_juror(world, tmp_path / "honest", capfd)
        silent = await a_juror(world, tmp_path / "silent", capfd, tickets=2)
        job, claimed = await disputed(world, world.net.deployment.committee)  # type: ignore[union-attr]
        case = str(job.job_id)
        await world.net.mine(SEED_DELAY + 1)
        sealed = await silent.one("juror", "vote", case, "reject")
        assert purposes(sealed) == ["juror_seal", *["juror_commit"] * 2]

        do = EvmCommittee.do

        async def away(self: EvmCommittee, sight: Any, due: Any) -> Any:
            if due.ticket == 1:
                raise ChainError("planted")
            return await do(self, sight, due)

        monkeypatch.setattr(EvmCommittee, "do", away)
        status, (half,) = await honest("juror", "vote", case, "accept")
        assert status == 1 and states(half) == ["committed", "none", "committed"] and "planted" in half["problems"][0]
        monkeypatch.setattr(EvmCommittee, "do", do)
        rest = await honest.one("juror", "tend")
        assert purposes(rest) == ["juror_commit"] and states(rest) == ["committed"] * 3

        await world.net.advance(PLAY_COMMITTEE.commit_window)
        assert purposes(await honest.one("juror", "tend", "--forfeit"))[:3] == ["juror_reveal"] * 3
        assert not job.state.ended, "two seats may still reveal"
        await world.net.advance(PLAY_COMMITTEE.reveal_window)
        await ended(world, job, claimed, Outcome.ACCEPT)
        done = await honest.one("juror", "tend", "--forfeit")
        assert [one["ticket"] for one in done["forfeited"]] == [0, 1] and states(done) == ["paid"] * 3
        assert "was silent: a tenth of its bond is burnt" in honest.said
        assert (await honest.one("juror", "tend", "--forfeit"))["forfeited"] == []
        late = await silent.one("juror", "tend")
        assert (late["transactions"], states(late)) == ([], ["forfeited"] * 2)
        lost, _ = (await silent("juror", "show"))[1]
        assert (lost["tickets"], lost["leaving"]) == (0, str(2 * PLAY_COMMITTEE.seat_bond * 9 // 10))

    run(main)
