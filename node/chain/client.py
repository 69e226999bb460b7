"""`EvmChain`: the Chain port over JSON-RPC, for one account: what it reads (`node.chain.reading`), and what it changes.

Rules
- Before the first use the chain and our contracts on it are checked (`node.chain.deployed`), and what was sent before is brought
  to its end.
- Whatever changes the chain goes through one `TxSender`: one nonce at a time, journaled before it is sent.
- What follows from what the chain shows is sent as `derived`, so that it is not asked for twice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from node.chain.agreed import AgreedEth
from node.chain.artifacts import contract, error_name
from node.chain.deployed import CHECK_THE_FILE, check_deployment
from node.chain.deployment import Deployment
from node.chain.endpoints import Endpoints, Rules
from node.chain.jobs import EvmJobs
from node.chain.pending import History, Journal, no_journal
from node.chain.reading import EvmReader
from node.chain.requesting import Requesting
from node.chain.slashes import EvmSlashes
from node.chain.tx_policy import DEFAULT_POLICY, TxPolicy
from node.chain.txs import TxSender
from node.errors import ChainError
from node.ports import ClaimEntry, Signer, TxResult
from protocol.ids import ZERO_ADDRESS, Address
from protocol.typed_data import ChannelConfig


def config_tuple(config: ChannelConfig) -> tuple[bytes | int, ...]:
    """A channel config in the order of its Solidity struct."""
    return (
        config.payer,
        config.payer_authorizer,
        config.receiver,
        config.receiver_authorizer,
        config.token,
        config.withdraw_delay,
        config.salt,
    )


class EvmChain(EvmReader):
    """Implements `node.ports.Chain`. Make it with `connect`; `aclose` when done."""

    def __init__(
        self,
        nodes: Endpoints,
        deployment: Deployment,
        sender: TxSender | Requesting,
        *,
        poll: float,
        confirmations: int,
    ) -> None:
        super().__init__(nodes, deployment, poll=poll, confirmations=confirmations)
        self._sender = sender
        self._jobs = EvmJobs(self, confirmations=confirmations) if deployment.has("Jobs") else None

    @classmethod
    async def connect(
        cls,
        endpoints: Sequence[str],
        deployment: Deployment,
        signer: Signer,
        *,
        journal: Journal = no_journal,
        history: History = (),
        policy: TxPolicy = DEFAULT_POLICY,
        poll: float = 2.0,
        timeout: float = 20.0,
        rules: Rules | None = None,
    ) -> EvmChain:
        """Check the chain and our contracts, then bring the unfinished transactions of the journal (`history`) to their end.

        `poll` is seconds between looks for new blocks. Raises `ChainError` when no quorum of the nodes is reachable, one is of
        another chain, or the contracts are not ours.
        """
        nodes = Endpoints.over_http(endpoints, chain_id=deployment.chain_id, timeout=timeout, rules=rules)
        try:
            await nodes.meet()
            eth = AgreedEth(nodes)
            await check_deployment(eth, deployment)
            anchor = await eth.header(deployment.block)
            if anchor is None:
                raise ChainError(
                    f"the chain has no block {deployment.block}, where our contracts were made", hint=CHECK_THE_FILE
                )
            sender = TxSender(
                eth,
                signer,
                deployment.chain_id,
                anchor=anchor.hash,
                journal=journal,
                error_name=error_name,
                policy=policy,
            )
            await sender.resume(history)
        except BaseException:
            await nodes.aclose()
            raise
        return cls(nodes, deployment, sender, poll=poll, confirmations=policy.confirmations)

    async def aclose(self) -> None:
        await self.nodes.aclose()

    @property
    def jobs(self) -> EvmJobs | None:
        return self._jobs

    @property
    def slashes(self) -> EvmSlashes:
        return EvmSlashes(self)

    @property
    def account(self) -> Address:
        return self._sender.account

    async def fee(self) -> int:
        return await self._sender.fee()

    def once(self, request: str) -> EvmChain:
        """The same chain, whose transactions are asked for under `request`: whatever is done again under this id is not sent
        again. An empty id is no id. Shares everything; close the original."""
        if not request:
            return self
        twin = copy.copy(self)
        twin._sender = Requesting(self._sender, request)
        return twin

    def has_answered(self, request: str, purpose: str) -> bool:
        """Whether the transaction called `purpose` of this request has its end."""
        return self._sender.has_answered(f"{request}:{purpose}")

    async def catch_up(self) -> None:
        await self._sender.catch_up()

    async def deposit(self, token: Address, amount: int) -> Sequence[TxResult]:
        """Into the vault, for this account. A token needs an approval of exactly `amount` first: two transactions.

        Stops at the first transaction that does not succeed.
        """
        vault = self.deployment.vault
        results = []
        if token != ZERO_ADDRESS:
            data = contract("TestToken").encode("approve", vault, amount)
            results.append(await self._sender.send("approve", token, data))
            if not results[-1].ok:
                return results
        data = self._vault.encode("deposit", token, amount, self.account)
        value = amount if token == ZERO_ADDRESS else 0
        results.append(await self._sender.send("deposit", vault, data, value))
        return results

    async def withdraw(self, token: Address, amount: int, to: Address) -> TxResult:
        data = self._vault.encode("withdraw", token, amount, to)
        return await self._sender.send("withdraw", self.deployment.vault, data)

    async def allocate(self, config: ChannelConfig, allocated: int, valid_before: int, signature: bytes) -> TxResult:
        arguments = (config_tuple(config), allocated, valid_before, signature)
        return await self._change("allocate", "allocate", *arguments, derived=True)

    async def claim(self, entries: Sequence[ClaimEntry]) -> TxResult:
        batch = [(config_tuple(e.config), e.amount, e.cumulative, e.signature) for e in entries]
        return await self._change("claim", "claim", batch, derived=True)

    async def settle(self, receiver: Address, token: Address) -> TxResult:
        return await self._change("settle", "settle", receiver, token, derived=True)

    async def close_channel(
        self,
        config: ChannelConfig,
        final: int,
        voucher: int,
        voucher_signature: bytes,
        close_signature: bytes,
    ) -> TxResult:
        return await self._change(
            "close", "close", config_tuple(config), final, voucher, voucher_signature, close_signature
        )

    async def initiate_withdraw(self, config: ChannelConfig) -> TxResult:
        return await self._change("initiate_withdraw", "initiateWithdraw", config_tuple(config))

    async def finalize_withdraw(self, config: ChannelConfig) -> TxResult:
        return await self._change("finalize_withdraw", "finalizeWithdraw", config_tuple(config))

    async def register_worker(self, hot_key: Address, payout: Address, deadline: int, signature: bytes) -> TxResult:
        data = self._workers.encode("register", hot_key, payout, deadline, signature)
        return await self._sender.send("register", self.deployment.workers, data)

    async def set_payout(self, hot_key: Address, payout: Address) -> TxResult:
        data = self._workers.encode("setPayout", hot_key, payout)
        return await self._sender.send("set_payout", self.deployment.workers, data)

    async def _change(self, purpose: str, function: str, *args: object, derived: bool = False) -> TxResult:
        return await self.change(purpose, "Channels", function, *args, derived=derived)

    async def change(self, purpose: str, name: str, function: str, *args: object, derived: bool = False) -> TxResult:
        """Send a transaction to the contract called `name`. `derived`: it follows from what the chain shows."""
        data = contract(name).encode(function, *args)
        return await self._sender.send(purpose, self.deployment.address_of(name), data, derived=derived)
