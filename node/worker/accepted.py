"""What a worker is paid in: its assets, and the amounts that go with each.

An amount is in the smallest unit of one asset and means nothing in another, so every amount that the operator decides stands here
once per asset; nothing adds or compares two of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from node.errors import ConfigError
from protocol.channel import ChannelState
from protocol.ids import UINT128_MAX, Address
from protocol.offers import ACCEPTS_MAX, Asset
from protocol.pricing import Price, cost
from protocol.tasks import UNITS, Task
from protocol.typed_data import Domain


@dataclass(frozen=True, slots=True)
class Accepted:
    """One asset that the worker is paid in. Amounts are in its smallest unit."""

    domain: Domain
    token: Address
    price: Price
    """Of chats, and of every task that has none of its own."""
    min_allocation: int = 1
    """What an allocation must add; below it the gas of allocating and claiming is not worth it."""
    credit_limit: int = 0
    """Most that may be unpaid over all channels in this asset; 0 = no limit."""
    min_job: int = 1
    """What a batch job must be able to bring; below it the gas of opening, submitting and settling is not worth it. 0: none."""
    max_penalty: int = 0
    """The most of the owner's stake that answers for one batch job."""

    task_prices: Mapping[Task, Price] = field(default_factory=dict)
    """Per unit of the task (`protocol.tasks.UNITS`)."""

    @property
    def asset(self) -> Asset:
        return Asset.of(self.domain, self.token)

    def price_of(self, task: Task) -> Price:
        return self.task_prices.get(task, self.price)

    def ahead_cost(self, units: int, tasks: Iterable[Task]) -> int:
        """The most that so many units of these tasks cost, of what is billed as it goes: output, and input that is streamed."""
        prices = [(self.price_of(task), UNITS[task].streamed) for task in tasks]
        dearest = max(max(price.output, price.input if streamed else 0) for price, streamed in prices)
        return cost(Price(output=dearest), 0, units)


class AcceptedAssets:
    """In the order of the offer."""

    def __init__(
        self,
        accepted: Iterable[Accepted],
        *,
        tick_tokens: int,
        credit_tokens: int,
        tasks: Iterable[Task] = (Task.CHAT,),
    ) -> None:
        """`tasks`: what is sold. Raises `ConfigError` for none, too many, or one asset twice."""
        self._tasks = frozenset(tasks) or {Task.CHAT}
        self._all = tuple(accepted)
        self._by_asset = {one.asset: one for one in self._all}
        self._tick_tokens = tick_tokens
        self._credit_tokens = credit_tokens
        if not 1 <= len(self._all) <= ACCEPTS_MAX:
            raise ConfigError(f"a worker is paid in 1 to {ACCEPTS_MAX} tokens, not {len(self._all)}")
        if len(self._by_asset) != len(self._all):
            raise ConfigError(
                "two of the accepted tokens are one token on one chain", hint="look at worker.accept and [tokens.NAME]"
            )

    def __iter__(self) -> Iterator[Accepted]:
        return iter(self._all)

    def get(self, domain: Domain | None, token: Address) -> Accepted | None:
        return None if domain is None else self._by_asset.get(Asset.of(domain, token))

    def of(self, state: ChannelState) -> Accepted | None:
        """What a channel is paid in; None when that is not accepted (any more)."""
        return self.get(state.domain, state.config.token)

    def tick(self, state: ChannelState) -> int:
        """What a client pays ahead on this channel at most: the cost of one tick of whatever is dearest.

        Where there is no price any more the largest amount there is: then nothing counts as certainly earned
        (`protocol.payment.recovered_costs`), and a voucher must settle what is owed to be worth its record.
        """
        accepted = self.of(state)
        return UINT128_MAX if accepted is None else accepted.ahead_cost(self._tick_tokens, self._tasks)

    def credit(self, state: ChannelState) -> int:
        """Cost of what this channel may be ahead of its vouchers, at most."""
        accepted = self.of(state)
        return 0 if accepted is None else accepted.ahead_cost(self._credit_tokens, self._tasks)
