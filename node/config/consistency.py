"""What binds several settings: each is in its bounds, and still they may not fit together.

Raises ConfigError that names the settings and where they came from.
"""

from __future__ import annotations

from typing import Final

from node.config.bounds import DEFAULT
from node.config.config import Config
from node.errors import ConfigError

CREDIT_TOKENS_MAX: Final = 65_536
"""Most output on credit that an offer can state."""


def check(config: Config) -> None:
    """Raises ConfigError."""
    _check_credit(config)
    _check_fence(config)
    _check_tokens(config)


def _check_credit(config: Config) -> None:
    """The offer states the credit in tokens, and has a bound for it."""
    ticks, each = config.worker.credit_ticks, config.worker.tick_tokens
    if ticks * each > CREDIT_TOKENS_MAX:
        raise ConfigError(
            f"worker.credit_ticks ({config.origins['worker.credit_ticks']}) times worker.tick_tokens "
            f"({config.origins['worker.tick_tokens']}) is {ticks * each} tokens; an offer may grant {CREDIT_TOKENS_MAX}",
            hint="lower one of the two",
        )


def _check_fence(config: Config) -> None:
    if config.fence_dir is not None and config.fence_dir.is_relative_to(config.data_dir):
        raise ConfigError(
            f"{config.origins['fence_dir']}: fence_dir lies in the data dir, so a backup of the one would carry the other",
            hint="name a folder outside of it",
        )


def _check_tokens(config: Config) -> None:
    """Names lead somewhere, and a token that is used has the amounts that its use needs: none has a default, because what is
    little of one token is a fortune of another."""
    for name, token in config.tokens.items():
        if token.chain not in config.chain_names:
            raise ConfigError(
                f"{config.origins[f'tokens.{name}.chain']}: tokens.{name}.chain: no chain is called {token.chain!r}",
                hint=f"there are {', '.join(config.chain_names)}; write a [chains.{token.chain}]",
            )
    for key, names in (("worker.accept", config.worker.accept), ("client.pay_with", config.client.pay_with)):
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"{config.origins[key]}: {key} names at least one token, and each one once")
        for name in names:
            if name != DEFAULT and name not in config.tokens:
                raise ConfigError(
                    f"{config.origins[key]}: {key}: no token is called {name!r}", hint=f"write a [tokens.{name}]"
                )
    for name in set(config.worker.accept) & set(config.tokens):
        token = config.tokens[name]
        if not (token.price_request or token.price_input or token.price_output):
            raise _lacks(name, "price_output", "worker.accept")
        for needed in ("global_credit", "claim_min"):
            if not getattr(token, needed):
                raise _lacks(name, needed, "worker.accept")
    for name in set(config.client.pay_with) & set(config.tokens):
        if not config.tokens[name].allocation:
            raise _lacks(name, "allocation", "client.pay_with")


def _lacks(token: str, key: str, user: str) -> ConfigError:
    return ConfigError(
        f"tokens.{token}.{key} is not set, and {user} names the token", hint=f"set it in [tokens.{token}]"
    )
