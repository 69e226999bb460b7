"""Discovery over libp2p: an offer reaches a client through a worker that is not its own, and a forged one does not."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import trio

from node.chain.memory import MemoryChain, MemoryLedger
from node.chains import Chains
from node.network.discovery import OfferBook, follow_gossip
from node.network.host import open_host
from node.signer.bare import Bare
from node.store.ledger import Ledger
from node.testing.fake_backend import FakeBackend
from node.testing.market import key
from node.wiring import now_ms
from node.worker.accepted import Accepted
from node.worker.worker import Worker, WorkerSettings
from protocol.messages import OFFER_TOPIC, encode
from protocol.pricing import Price


def test_an_offer_comes_by_way_of_another_worker(tmp_path: Path) -> None:
    async def main() -> None:
        chain = MemoryLedger()
        settings = WorkerSettings(
            accepts=(Accepted(chain.domain, chain.token, Price(output=1_000_000)),), offer_ttl_ms=1000
        )
        async with AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())
            stack.callback(nursery.cancel_scope.cancel)
            workers: list[Worker] = []
            for name in ("near", "far"):
                folder = tmp_path / name
                folder.mkdir(mode=0o700)
                bootstrap = workers[0].network.addresses if workers else ()
                network = await stack.enter_async_context(open_host(key(name), bootstrap=bootstrap))
                ledger = Ledger.open(folder / "journal.sqlite", chain_tag=bytes(key(name).address))
                stack.callback(ledger.close)
                worker = Worker(
                    key=Bare(key(name)),
                    network=network,
                    chains=Chains({"default": MemoryChain(chain, key(name).address)}),
                    ledger=ledger,
                    backend=FakeBackend(),
                    settings=settings,
                    now_ms=now_ms,
                )
                await nursery.start(worker.run)
                workers.append(worker)
            near, far = workers
            client = await stack.enter_async_context(
                open_host(key("client"), listen=(), bootstrap=near.network.addresses)
            )
            book = OfferBook(now_ms)
            await follow_gossip(client, book)
            with trio.fail_after(30):
                while book.of(far.key.peer_id) is None:
                    await trio.sleep(0.05)
            assert far.key.peer_id not in client.peers
            forged = replace_signature(encode(await far.desk.renew()))
            await far.network.publish(OFFER_TOPIC, forged)
            with trio.fail_after(30):
                while not near.offers.refused["bad_signature"]:
                    await trio.sleep(0.05)
            assert not book.refused["bad_signature"]  # the worker between did not pass it on
            nursery.cancel_scope.cancel()

    trio.run(main)


def replace_signature(raw: bytes) -> bytes:
    """The same offer, signed by nobody who may."""
    from protocol.messages import OFFER_PROTOCOL, OfferMessage, decode

    message = decode(OFFER_PROTOCOL, raw)
    assert isinstance(message, OfferMessage)
    return encode(OfferMessage(document=message.document, signature=key("thief").sign(bytes(32))))
