"""The attacker itself: it reads right, encodes right, finds a wrong rule, and cuts the finding down to what matters.

That each of its invariants can fail is shown by `scripts/check-mutants --table`.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")

from eth_abi.abi import encode

from node.testing.attacker import Attacker, Disagreement, abi, drain, fuzz
from node.testing.evm import Reverted, artifact
from protocol.escrow import jobs
from protocol.ids import Address

ZOO = Path(__file__).parent / "zoo"
CONTRACTS = ("Vault", "Workers", "Channels", "Jobs", "Disputes", "Committee", "Attestations")


def value(kind: str, dice: random.Random) -> object:
    if kind.endswith("[]"):
        return [value(kind[:-2], dice) for _ in range(dice.randint(0, 3))]
    if kind.startswith("("):
        return tuple(value(part, dice) for part in abi.split(kind[1:-1]))
    if kind == "string":
        return "x" * dice.randint(0, 70)
    if kind == "bytes":
        return dice.randbytes(dice.choice((0, 1, 31, 32, 33, 65)))
    if kind == "address":
        return Address(dice.randbytes(20))
    if kind == "bool":
        return dice.random() < 0.5
    if kind.startswith("bytes"):
        return dice.randbytes(int(kind[5:]))
    return dice.choice((0, 1, 2 ** int(kind[4:]) - 1))


@pytest.mark.parametrize("name", CONTRACTS)
def test_arguments_are_encoded_as_eth_abi_does(artifacts: Path, name: str) -> None:
    dice, attacker = random.Random(name), Attacker(artifacts, Counter(), ZOO)
    for entry in artifact(artifacts / f"{name}.json")[0]:
        if entry["type"] == "function":
            _, kinds, _ = attacker.contracts[name].signature(entry["name"])
            for _ in range(5):
                values = [value(kind, dice) for kind in kinds]
                assert abi.arguments(kinds, values) == encode(kinds, values), (entry["name"], values)


def test_all_numbers_at_once_are_the_numbers_one_by_one(artifacts: Path) -> None:
    attacker = Attacker(artifacts, Counter(), ZOO)
    for step in range(150):
        attacker.act(random.Random(step))
    attacker.numbers.read(full=True)
    world, values = attacker.world, attacker.numbers.values
    for (token, account), words in attacker.numbers.of("balance").items():
        assert words == (world.vault.call("balanceOf", token, account),)
    for job_id, words in attacker.numbers.of("job").items():
        state, *rest, result = world.jobs.call("job", job_id)
        assert words == (state, *rest, int.from_bytes(result))
    for key, words in attacker.numbers.of("stake").items():
        assert words == world.workers.call("stakeOf", *key)
    assert len(attacker.numbers.of("job")) > 3
    assert values["coins", attacker.tokens[0]][0] == world.token.call("balanceOf", world.vault.address)


def test_what_was_undone_is_forgotten(artifacts: Path) -> None:
    attacker = Attacker(artifacts, Counter(), ZOO)
    before = attacker.numbers.peek()
    with attacker.evm.undone():
        attacker.world.vault.send(attacker.world.admin, "setPaused", True)
        assert attacker.numbers.peek() != before
    assert attacker.numbers.peek() == before
    assert attacker.world.vault.call("paused") is False


def test_a_wrong_rule_is_found_and_cut_down(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is wrong in the model here, which is the same to the attacker as wrong in the contract."""
    monkeypatch.setattr(jobs, "FAIL_DIVISOR", 5)
    zoo = fuzz.Zoo(artifacts, ZOO)
    found = fuzz.hunt(zoo, 20, 400)
    assert found is not None
    seed, disagreement = found
    assert disagreement.what.startswith("Jobs.fail: "), disagreement
    steps = fuzz.shrink(zoo, seed, range(400), seconds=60)
    assert len(steps) <= 3, "an open and a fail are enough"
    told = fuzz.explain(zoo, seed, steps).splitlines()
    assert told[0].startswith(f"seed {seed}: Jobs.fail: ")
    assert "Jobs.open(" in told[-2] and "Jobs.fail(" in told[-1]


def test_a_view_that_reverts_is_found_and_a_market_that_does_not_stand_is_not(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is the contracts' fault, the second may be the test's own."""

    def reverts(*_: object) -> None:
        raise Reverted("Panic", (17,))

    zoo = fuzz.Zoo(artifacts, ZOO)
    with monkeypatch.context() as patch:
        patch.setattr(Attacker, "act", reverts)
        found = fuzz.failing(zoo, 0, range(1))
        assert found is not None and found.what == "what must never fail reverts"
    monkeypatch.setattr(Attacker, "_begin", reverts)
    with pytest.raises(Reverted):
        fuzz.failing(zoo, 0, range(1))


@pytest.mark.parametrize(
    ("left_out", "what"),
    [("_stakes", "I12: WORKERS still holds something"), ("_channels", "I12: CHANNELS still holds something")],
)
def test_the_drain_sees_what_stays_locked(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch, left_out: str, what: str
) -> None:
    attacker = Attacker(artifacts, Counter(), ZOO)
    for step in range(120):
        attacker.act(random.Random(step))
    monkeypatch.setattr(drain, left_out, lambda a: None)
    with pytest.raises(Disagreement) as caught:
        drain.drain(attacker)
    assert caught.value.what == what
