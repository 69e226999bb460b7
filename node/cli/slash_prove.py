"""`slash prove`: convict a worker by two receipts that contradict each other, out of the journal or out of two files."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.cli.main import Shared
from node.config import DEFAULT

if TYPE_CHECKING:
    from node.chain.client import EvmChain
    from node.client.client import Client
    from protocol.equivocation import Contradiction, SignedReceipt
    from protocol.typed_data import ChannelConfig

PROVEN = "Disputes_ConvictedBefore"
MAX_BYTES = 64 << 20
"""Longest file of a receipt: `chat --json` prints the answer before it."""


async def from_journal(shared: Shared, name: str | None) -> None:
    """Every worker that has contradicted itself to this client, on one chain or on all."""
    from node.cli.connected import connected
    from node.store.evidence import contradictions

    async with connected(shared, online=False) as client:
        wanted = None if name is None else client.wallet.chains.named(name)
        found = 0
        for one in contradictions(client.book.ledger):
            chain = _chain_of(client, one)
            if chain is not None and wanted in (None, chain):
                found += 1
                await _prove(shared, chain, one, client.book.channels[one.first.receipt.channel_id].config)
        if not found and not shared.output.json:
            shared.output.result({}, "no two receipts in this journal contradict each other")


async def from_files(shared: Shared, first: Path, second: Path, key: str, name: str | None) -> None:
    from node.cli.slash import as_key
    from node.errors import ConfigError
    from protocol.equivocation import Contradiction

    found = Contradiction(read_receipt(first), read_receipt(second))
    channel_id = found.first.receipt.channel_id
    async with as_key(shared, key, name or DEFAULT) as chain:
        config = await chain.slashes.config_of(channel_id)
        if config is None:
            raise ConfigError(
                f"no node tells of channel {channel_id}",
                hint="is it on another --chain? its payer can prove without files",
            )
        await _prove(shared, chain, found, config)


async def _prove(shared: Shared, chain: EvmChain, found: Contradiction, config: ChannelConfig) -> None:
    from node.chain.slashes import newest
    from node.chain.stakes import Stakes
    from node.cli.slash import slash_data, slash_text
    from node.cli.start import transaction
    from node.errors import ConfigError
    from protocol.equivocation import fault
    from protocol.escrow.state import PPM
    from protocol.escrow.workers import SLASH_CAP_PPM
    from protocol.ids import ZERO_ADDRESS

    number, why_not = found.first.receipt.sequence, fault(found, config, chain.domain)
    if why_not is not None:
        raise ConfigError(f"these two receipts prove nothing: {why_not}")
    worker, owner = config.receiver, (await chain.worker(config.receiver)).owner
    data: dict[str, Any] = {"worker": str(worker), "channel": str(found.first.receipt.channel_id), "sequence": number}
    info, stake = await chain.token_info(config.token), None
    if owner != ZERO_ADDRESS:
        stake = await Stakes(chain).of(owner, config.token)
    amount = 0 if stake is None else (stake.active + stake.unbonding) * SLASH_CAP_PPM // PPM
    shared.output.say(
        f"proving that worker {worker} signed two receipts with number {number}: its key is retired for ever, and "
        f"{info.show(amount)} of its owner's stake is slashed: half for the payer {config.payer}, a quarter for {chain.account}"
    )
    before = await newest(chain.slashes)
    result = await chain.slashes.prove(found, config)
    if not result.ok and result.error == PROVEN:  # told by a simulation: nothing was sent
        text = f"worker {worker} was convicted in this token before, which happens once; nothing was sent"
        shared.output.row({**data, "slash": None, "transactions": []}, text)
        return
    result.sound()
    now, booked = (await chain.head()).timestamp, None
    for slash_id in range(before + 1, await newest(chain.slashes, before) + 1):
        slash = await chain.slashes.get(slash_id)
        if slash.owner == owner and slash.victim == config.payer and slash.reporter == chain.account:
            booked = (slash_id, slash)
    text = f"worker {worker} is convicted\n"
    none = "nothing is slashed: its owner has no stake in this token, or the key was retired long ago"
    text += slash_text(*booked, info, now, {chain.account}) if booked else none
    data["slash"] = slash_data(*booked, info) if booked else None
    shared.output.row({**data, "transactions": [transaction(result)]}, text)


def _chain_of(client: Client, found: Contradiction) -> EvmChain | None:
    state = client.book.channels.get(found.first.receipt.channel_id)
    return None if state is None else client.wallet.chains.get(state.domain)  # type: ignore[return-value]


def read_receipt(path: Path) -> SignedReceipt:
    """A receipt as `chat --json` prints it: alone, or in the last line. Raises `ConfigError`."""
    from node.errors import ConfigError
    from node.nesting import loads
    from protocol.equivocation import SignedReceipt
    from protocol.errors import GristmillError

    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is longer than any receipt")
        text = path.read_text("utf-8").strip()
        if not text.startswith("{") or "\n{" in text:
            text = text.splitlines()[-1]
        found = loads(text)
        return SignedReceipt(_receipt(found["receipt"]), _bytes(found["receipt_signature"]))
    except (ValueError, TypeError, KeyError, IndexError, GristmillError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} holds no receipt: {error!r:.200}", hint="gristmill chat --json prints one in its last line"
        ) from None


def _receipt(given: dict[str, Any]) -> Any:
    from protocol.ids import ChannelId, Hash32, JobId, ModelId
    from protocol.typed_data import Receipt

    kinds: dict[str, Any] = {"job_id": JobId, "channel_id": ChannelId, "model_id": ModelId, "cost": int}
    hashes = {"request_hash", "params_hash", "output_digest", "commitment"}
    values = {}
    for field in fields(Receipt):
        raw = given[field.name]
        if field.name in hashes or field.name in ("job_id", "channel_id", "model_id"):
            values[field.name] = kinds.get(field.name, Hash32)(_bytes(raw))
        else:
            values[field.name] = int(str(raw))
    return Receipt(**values)


def _bytes(raw: str) -> bytes:
    return bytes.fromhex(raw.removeprefix("0x"))
