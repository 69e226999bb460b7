"""Build a `Client` from a `Config`: libp2p host, chain, journal, keys. Everything heavy is imported here, when it is used."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from fractions import Fraction

import trio

from node.books import Key, open_books
from node.chains import Chains
from node.client.client import Client
from node.client.settings import ClientSettings, Means
from node.client.vocabulary import LocalModels
from node.client.wallet import ClientWallet
from node.config import DEFAULT, Config
from node.errors import KeyError_
from node.network.discovery import OfferBook, follow_gossip
from node.network.offline import OfflineNetwork
from node.ports import Network, Signer
from node.signer.sources import KeyFile
from node.wiring import now_ms, now_s, open_chains, random32, token_of
from protocol.ids import Address
from protocol.selection import PriceLimit
from protocol.signing import KeyRole

PASSWORD_FILE = "password"  # noqa: S105 (a file's name)


@asynccontextmanager
async def connect(
    config: Config,
    *,
    payer: Key | None = None,
    session: Key | None = None,
    workers: Sequence[str] = (),
    online: bool = True,
    wait_s: float = 0,
    payees: Sequence[Address] = (),
) -> AsyncIterator[Client]:
    """A connected client for the length of the block.

    `payer`, `session`: keys in hand, or where they are; by default those of the config's keystore, opened by the signer with the
    keystore's password file. `payees`: accounts besides the payer's own that money may leave the vault for. `workers`:
    multiaddrs to meet besides `p2p.bootstrap`. `online=False` meets nobody (for money commands). `wait_s`: keep dialling peers
    that cannot be met yet for so long.

    Raises `ConfigError`, `KeyError_`, `SignerError`, `ChainError`, `LedgerError`, `NetworkError`.
    """
    keys = {
        KeyRole.PAYER: payer or _source(config, "payer"),
        KeyRole.SESSION: session or _source(config, "session"),
    }
    settings = client_settings(config)
    async with AsyncExitStack() as stack:
        books = await stack.enter_async_context(open_books(config, "client", keys, payees))
        book, signers = books.book, books.signers
        chains = await stack.enter_async_context(open_chains(config, signers[KeyRole.PAYER], books.ledger))
        network = await stack.enter_async_context(_network(config, signers[KeyRole.SESSION], online=online))
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        await book.close_open_jobs(lambda _: 0)
        offers = OfferBook(now_ms)
        models = LocalModels(config.models_dir, stack)
        client = Client(
            network=network,
            wallet=ClientWallet(
                payer=signers[KeyRole.PAYER],
                session=signers[KeyRole.SESSION],
                ahead=books.ahead,
                chains=chains,
                means=client_means(config, chains),
                network=network,
                book=book,
                settings=settings,
                random32=random32,
                now_s=now_s,
            ),
            offers=offers,
            settings=settings,
            spawn=nursery.start_soon,
            now_ms=now_ms,
            random32=random32,
            bootstrap=(*config.p2p.bootstrap, *workers),
            counter=models.count,
            vocabulary=models.get,
        )
        for state in list(book.channels.values()):
            if not state.closed and chains.get(state.domain) is not None:
                await client.wallet.refresh(state.channel_id)
        if len(client.wallet.means) > 1:  # what is empty is not chosen
            await client.wallet.look()
        if online:
            if config.p2p.gossip:
                await follow_gossip(network, offers)
            client.problems = await client.discover()
            until = trio.current_time() + wait_s
            while client.problems and trio.current_time() < until:
                await trio.sleep(0.1)
                client.problems = await client.discover()
            nursery.start_soon(_keep_fresh, client)
            nursery.start_soon(client.jobs.run)
        try:
            yield client
        finally:
            nursery.cancel_scope.cancel()


def _network(config: Config, session: Signer, *, online: bool) -> AbstractAsyncContextManager[Network]:
    if not online:
        return nullcontext(OfflineNetwork(session.peer_id))
    from node.network.host import open_host

    return open_host(session, listen=config.p2p.listen)


async def _keep_fresh(client: Client) -> None:
    while True:
        await trio.sleep(5)
        await client.refresh_offers()


def client_settings(config: Config) -> ClientSettings:
    given = config.client
    return ClientSettings(
        withdraw_delay_s=given.withdraw_delay_s,
        deadline_ms=given.deadline_ms,
        first_token_ms=given.first_token_ms,
        stall_ms=given.stall_ms,
        slash_min=given.slash_min,
    )


def client_means(config: Config, chains: Chains) -> list[Means]:
    """What the client pays with, in the order of `client.pay_with`. Raises `ConfigError`."""
    return [_means(config, chains, name) for name in config.client.pay_with]


def _means(config: Config, chains: Chains, name: str) -> Means:
    chain, address = token_of(config, chains, name)
    if name == DEFAULT:
        given = config.client
        return Means(
            domain=chain.domain,
            token=address,
            allocation=given.allocation,
            rate=Fraction(1),
            max_cost=given.max_cost,
            max_price=_limit(given.max_price_request, given.max_price_input, given.max_price_output),
        )
    token = config.tokens[name]
    return Means(
        domain=chain.domain,
        token=address,
        name=name,
        allocation=token.allocation,
        rate=Fraction(token.rate) if token.rate else None,
        max_cost=token.max_cost,
        max_price=_limit(token.max_price_request, token.max_price_input, token.max_price_output),
    )


def _limit(request: int, input_: int, output: int) -> PriceLimit:
    """In the configuration 0 means no limit."""
    return PriceLimit(request=request or None, input=input_ or None, output=output or None)


def _source(config: Config, name: str) -> KeyFile:
    """A key of the keystore, with the password of the configured file."""
    from node.keystore import MAX_PASSWORD_BYTES, Keystore, read_private

    path = config.keys.password_file or config.keys_dir / PASSWORD_FILE
    if not path.exists():
        raise KeyError_(f"the key {name} needs a password", hint=f"put it into {path} (mode 0600), or hand in the key")
    password = read_private(path, MAX_PASSWORD_BYTES + 2).removesuffix(b"\n").removesuffix(b"\r")
    return KeyFile(str(Keystore(config.keys_dir).path(name)), password)
