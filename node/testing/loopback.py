"""One real worker and one real client in one process: libp2p over loopback, journals on disk, the real model, a simulated chain.

For benchmarks. Client and worker share an interpreter, which is harder on the market than two machines are.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from node.app import open_worker
from node.client.client import Client
from node.client.connect import connect
from node.config import Config, load
from node.testing.devnet.devnet import Devnet, devnet
from node.testing.market import key
from node.worker.worker import Worker

MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class Loopback:
    worker: Worker
    client: Client
    net: Devnet

    async def blocks(self) -> int:
        """How many there are: on this chain each transaction makes one."""
        return int(await self.net.rpc.call("eth_blockNumber"), 16)


@asynccontextmanager
async def open_loopback(deposit: int, **settings: object) -> AsyncIterator[Loopback]:
    """`deposit`: smallest units that the client has in the vault. `settings`: of both, `__` for the dot."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gristmill-loopback-")))
        folder.chmod(0o700)
        net = await stack.enter_async_context(devnet())
        (await net.deploy()).save(folder / "deployment.json")
        hot, payer, session = key("bench worker"), key("bench payer"), key("bench session")
        await net.faucet(hot.address, native=10**18)
        await net.faucet(payer.address, native=10**18, tokens=deposit)

        def config(role: str) -> Config:
            (folder / role).mkdir(mode=0o700)
            return load(
                {
                    "data_dir": folder / role,
                    "chain.rpc_urls": [net.url],
                    "chain.deployment": str(folder / "deployment.json"),
                    "fence_dir": folder / "fence",
                    "models.folder": str(load({}).models_dir),
                    "worker.models": [MODEL],
                    **{name.replace("__", "."): value for name, value in settings.items()},
                }
            )

        running = await stack.enter_async_context(open_worker(config("worker"), hot))
        worker = running.worker
        client = await stack.enter_async_context(
            connect(config("client"), payer=payer, session=session, workers=worker.network.addresses)
        )
        await client.deposit(deposit)
        yield Loopback(worker, client, net)
