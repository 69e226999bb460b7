"""Where a worker's earnings go, and who may say so.

Rules
- The Workers contract decides, not the configuration. Unregistered, earnings go to the hot key's own account.
- The *owner* registers the hot key and is the only account that can change the payout. It must not be the hot key: whoever
  steals the worker's machine would then own the earnings to come. The hot key's consent is needed once, to register.
- A running worker only looks: `start` never sends a transaction about this.
"""

from __future__ import annotations

from node.errors import KeyError_
from node.ports import Chain, Signer, TxResult
from protocol.ids import ZERO_ADDRESS, Address
from protocol.typed_data import HotKey

CONSENT_SECONDS = 600
"""Chain time that a registration has to be mined."""


async def needs_consent(chain: Chain, worker: Address) -> bool:
    """Whether `worker` is not registered yet, so that its hot key must sign. Raises `KeyError_` for another's worker."""
    owner = (await chain.worker(worker)).owner
    if owner == ZERO_ADDRESS:
        return True
    if owner != chain.account:
        raise KeyError_(
            f"the owner of worker {worker} is {owner}, and our owner key is {chain.account}",
            hint="use the owner key that registered it; ownership cannot be passed on, a lost owner means a new worker key",
        )
    return False


async def set_payout(chain: Chain, worker: Address, payout: Address, hot_key: Signer | None = None) -> TxResult | None:
    """Send the earnings of `worker` to `payout`; None when they go there already.

    `chain.account` is the owner: it signs and pays the gas. `hot_key` is the worker's key and signs its consent; only needed
    while the worker is unregistered. Raises `ChainError`, and `KeyError_` when one of the keys is not the right one.
    """
    if worker == chain.account:
        raise KeyError_(
            f"the owner key is the worker's hot key, {worker}: whoever takes the machine could take its earnings",
            hint="gristmill wallet new owner",
        )
    if await needs_consent(chain, worker):
        if hot_key is None or hot_key.address != worker:
            raise KeyError_(
                f"worker {worker} is not registered: its own key must consent", hint="run this beside the worker's key"
            )
        nonce = (await chain.worker(worker)).nonce
        deadline = (await chain.head()).timestamp + CONSENT_SECONDS
        consent = HotKey(owner=chain.account, hot_key=worker, payout=payout, nonce=nonce, deadline=deadline)
        signature = await hot_key.sign(consent, chain.workers_domain)
        result = await chain.register_worker(worker, payout, deadline, signature)
    elif await chain.payout_of(worker) == payout:
        return None
    else:
        result = await chain.set_payout(worker, payout)
    return result.sound()


async def payout_notice(chain: Chain, worker: Address, wanted: Address | None) -> str:
    """What the operator should know of the payout at a start; empty when it is as `wanted`, the `worker.payout` setting."""
    payout = await chain.payout_of(worker)
    if wanted is not None and wanted != payout:
        return (
            f"warning: earnings go to {payout}, not to {wanted} as worker.payout says; "
            f"set it with `gristmill payout set {wanted}`"
        )
    if payout == worker:
        return (
            f"note: earnings go to this worker's own account, {worker}, whose key is on this machine; "
            "`gristmill payout set ADDRESS` sends them elsewhere"
        )
    return ""
