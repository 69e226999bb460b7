"""Batch jobs on a `Deployment`, up to the moment that a test is about: a staked worker, a client with money, jobs between them.

The worker's owner has put up stake and allowed all of it as exposure; the client's purse is deep. Each job differs by its salt.
"""

from __future__ import annotations

from typing import Any

from node.testing.contracts import Deployment, key, quote_tuple
from node.testing.evm import Result
from protocol.ids import ZERO_ADDRESS, Address, Hash32, keccak256
from protocol.typed_data import HotKey, Order, Quote, Submission

CLIENT, WORKER, OWNER = (key(n) for n in ("batch client", "batch worker", "batch owner"))
PAYOUT = Address(b"\x98" * 20)
SPEC, RESULT, EVIDENCE = (Hash32(keccak256(name)) for name in (b"spec", b"result", b"evidence"))
DAY = 24 * 3600
PURSE = 10**9
STAKE = 10**6


class Batch:
    """Jobs of one client and one worker; `resolver` judges those that do not say otherwise."""

    def __init__(self, world: Deployment, resolver: Address = ZERO_ADDRESS) -> None:
        self.world = world
        self.resolver = resolver
        self.token = world.token.address
        self._made = 0
        for account in (CLIENT.address, OWNER.address):
            world.fund(account, PURSE)
        until = 2**40 - 1
        consent = HotKey(OWNER.address, WORKER.address, PAYOUT, 0, until).digest(world.workers_domain)
        world.workers.send(OWNER.address, "register", WORKER.address, PAYOUT, until, WORKER.sign(consent))
        world.workers.send(OWNER.address, "stake", self.token, STAKE)
        world.workers.send(OWNER.address, "setExposure", self.token, STAKE)

    def quote(self, **changes: Any) -> Quote:
        """Terms that nobody has used yet: 1,000 for the job, 500 if it fails, an hour to dispute."""
        self._made += 1
        now = self.world.evm.now
        terms: dict[str, Any] = {
            "spec_hash": SPEC,
            "client": CLIENT.address,
            "worker": WORKER.address,
            "token": self.token,
            "amount": 1000,
            "penalty": 500,
            "valid_before": now + 600,
            "deadline": now + DAY,
            "window": 3600,
            "resolver": self.resolver,
            "salt": Hash32(self._made.to_bytes(32)),
        }
        return Quote(**terms | changes)

    def open(self, quote: Quote) -> Result:
        domain = self.world.jobs_domain
        order = CLIENT.sign(Order(quote.job_id(domain)).digest(domain))
        arguments = (quote_tuple(quote), WORKER.sign(quote.digest(domain)), order)
        return self.world.jobs.send(WORKER.address, "open", *arguments)

    def submit(self, quote: Quote, claimed: int) -> Result:
        domain = self.world.jobs_domain
        proof = WORKER.sign(Submission(quote.job_id(domain), RESULT, claimed).digest(domain))
        return self.world.jobs.send(CLIENT.address, "submit", quote_tuple(quote), RESULT, claimed, proof)

    def submitted(self, claimed: int | None = None, **changes: Any) -> Quote:
        """A job whose result is there; the worker asks for `claimed`, the whole amount by default."""
        quote = self.quote(**changes)
        self.open(quote)
        self.submit(quote, quote.amount if claimed is None else claimed)
        return quote

    def challenge(self, quote: Quote) -> Result:
        return self.world.disputes.send(CLIENT.address, "open", quote_tuple(quote), EVIDENCE)

    def disputed(self, claimed: int | None = None, **changes: Any) -> Quote:
        """A job that its client has challenged."""
        quote = self.submitted(claimed, **changes)
        self.challenge(quote)
        return quote

    def resolve(self, quote: Quote) -> Result:
        """By somebody whom it does not concern."""
        return self.world.disputes.send(key("mallory").address, "resolve", quote_tuple(quote))

    def id(self, quote: Quote) -> Hash32:
        return quote.job_id(self.world.jobs_domain)

    def balance(self, account: Address, token: Address | None = None) -> int:
        """In the vault, free."""
        found = self.world.vault.call("balanceOf", self.token if token is None else token, account)
        return int(found)
