"""What `demo` claims, checked by what everybody can see: the receipt, the chain, both journals.

Rules
- The receipt is checked from scratch with the pure protocol, over the tokens and text that were printed.
- What was paid and received is read from the contracts, not from either side's word.
- A check that is not so is a problem, and a problem ends the demo non-zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


async def judge(
    answer: dict[str, Any], net: Any, accounts: dict[str, Any], audits: dict[str, str | list[str]], deposit: int
) -> tuple[dict[str, bool], dict[str, Any]]:
    """Every check by what it says, and the facts that they rest on, as the result names them."""
    verified = _verify_receipt(answer, net.deployment, accounts["worker"])
    during = await _transactions_between(net, answer["blocks"]["before"], answer["blocks"]["after"])
    received, left = await _money(net, accounts)
    paid, cost = deposit - left, int(answer["cost"])
    checks = {
        "the receipt is signed by the worker over what was delivered": verified,
        "no transaction during the job": during == 0,
        "what the client paid is the receipt's cost": paid == cost,
        "what the worker received is the receipt's cost": received == cost,
        "the rest is back in the client's vault": left == deposit - cost,
        "the client's journal, its signatures and the chain agree": audits["client"] == "ok",
        "the worker's journal, its signatures and the chain agree": audits["worker"] == "ok",
    }
    facts = {
        "receipt_verified": verified,
        "transactions_during_job": during,
        "client_paid": str(paid),
        "worker_received": str(received),
    }
    return checks, facts


def _verify_receipt(answer: dict[str, Any], deployment: Any, worker: Any) -> bool:
    """From scratch, with the pure protocol only: digest of the tokens and text that were printed, cost, signature."""
    from protocol.digest import OutputDigest
    from protocol.errors import ProtocolError
    from protocol.ids import ChannelId, Hash32, JobId, ModelId
    from protocol.keys import recover
    from protocol.typed_data import Receipt

    fields = dict(answer["receipt"])
    kinds = {"job_id": JobId, "channel_id": ChannelId, "model_id": ModelId}
    for name, value in fields.items():
        if isinstance(value, str) and value.startswith("0x"):
            fields[name] = kinds.get(name, Hash32)(value)
    fields["cost"] = int(fields["cost"])
    receipt = Receipt(**fields)
    digest = OutputDigest(receipt.job_id, receipt.part)
    digest.extend(answer["token_ids"], answer["text"])
    signature = bytes.fromhex(answer["receipt_signature"].removeprefix("0x"))
    try:
        signer = recover(receipt.digest(deployment.domain), signature)
    except ProtocolError:
        return False
    return bool(
        signer == worker and digest.value == receipt.output_digest and receipt.output_tokens == len(answer["token_ids"])
    )


async def _money(net: Any, accounts: dict[str, Any]) -> tuple[int, int]:
    """What the worker's account and the client's hold in the vault."""
    from node.chain.client import EvmChain
    from node.signer.bare import Bare

    token = net.deployment.token
    chain = await EvmChain.connect([net.url], net.deployment, Bare(net.funded_keys[0]))
    try:
        received = await chain.vault_balance(token, await chain.payout_of(accounts["worker"]))
        left = await chain.vault_balance(token, accounts["payer"])
    finally:
        await chain.aclose()
    return received, left


async def _transactions_between(net: Any, before: int, after: int) -> int:
    """Transactions in the blocks after `before` up to `after`: nobody else uses this chain."""
    count = 0
    for number in range(before + 1, after + 1):
        count += int(await net.rpc.call("eth_getBlockTransactionCountByNumber", hex(number)), 16)
    return count


def tell(say: Callable[[str], None], result: dict[str, Any], worker: str, checks: dict[str, bool]) -> None:
    """The result for people, line by line."""
    usage, receipt = result["usage"], result["receipt"]
    say(
        f"receipt   job {receipt['job_id'][:18]}..., {usage['input_tokens']} tokens in, {usage['output_tokens']} out, "
        f"cost {receipt['cost']} units"
    )
    say(f"          signed {receipt['signature'][:34]}... by {worker}")
    say(f"paid      client {result['client_paid']}, worker received {result['worker_received']} units")
    for count, sent in enumerate(result["transactions"]):
        say(f"{'' if count else 'chain':<9} {sent['purpose']:<10} {sent['gas']:>7} gas  {sent['hash']}")
    say(f"          {result['transactions_during_job']} transactions during the job")
    for check, good in checks.items():
        say(f"{'ok' if good else 'FAILED':<9} {check}")
    seconds = result["seconds"]
    say(f"time      first token after {seconds['first_token']:.1f} s in all, the whole demo {seconds['total']:.1f} s")
    for problem in result["problems"]:
        say(f"problem   {problem}")
