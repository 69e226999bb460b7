"""Every function of the contracts once by hand, and the zoo: strange signatures, tokens, wallets and recipients.

Numbers such as I9 are invariants of contracts/INVARIANTS.md.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")

from hypothesis import given, settings
from hypothesis import strategies as st

from node.testing.contracts import NATIVE, Deployment, config_tuple, high_s, key
from node.testing.evm import Contract, Reverted
from protocol.ids import ZERO_ADDRESS, Address, Hash32, keccak256
from protocol.typed_data import Allocation, ChannelConfig, Close, Domain, HotKey, Voucher

ANN, SESSION, WORKER, OWNER, MALLORY = (key(n) for n in ("ann", "session", "worker", "owner", "mallory"))
PAYOUT = Address(b"\x99" * 20)
ZOO = Path(__file__).parent / "zoo"


class Scene:
    """Ann has 1,000 in the vault; `config` is her channel to the worker."""

    def __init__(self, deployment: Deployment, **changes: object) -> None:
        self.world = deployment
        self.vault, self.workers, self.channels = deployment.vault, deployment.workers, deployment.channels
        self.token = deployment.token.address
        deployment.fund(ANN.address, 1000)
        base = ChannelConfig(
            ANN.address, SESSION.address, WORKER.address, WORKER.address, self.token, 900, Hash32(bytes(32))
        )
        self.config = replace(base, **changes)  # type: ignore[arg-type]

    @property
    def id(self) -> bytes:
        return self.config.channel_id(self.world.domain)

    def allocation(self, amount: int, until: int = 2**40 - 1) -> bytes:
        return ANN.sign(Allocation(self.id, amount, until).digest(self.world.domain))

    def allocate(self, amount: int, signature: bytes | None = None) -> None:
        signature = self.allocation(amount) if signature is None else signature
        self.channels.send(MALLORY.address, "allocate", config_tuple(self.config), amount, 2**40 - 1, signature)

    def voucher(self, amount: int, domain: Domain | None = None) -> bytes:
        return SESSION.sign(Voucher(self.id, amount).digest(domain or self.world.domain))

    def claim(self, *entries: tuple[int, int, bytes]) -> list[int]:
        """Skip reasons of (amount, ceiling, signature) entries; 0 means taken."""
        batch = [(config_tuple(self.config), *entry) for entry in entries]
        result = self.channels.send(MALLORY.address, "claim", batch)
        return [values.get("reason", 0) for _, values in result.events]

    def state(self) -> tuple[int, int, int, bool]:
        return self.channels.call("channel", self.id)  # type: ignore[no-any-return]

    def balance(self, account: Address) -> int:
        return self.vault.call("balanceOf", self.token, account)  # type: ignore[no-any-return]


@pytest.fixture
def scene(deployment: Deployment) -> Scene:
    return Scene(deployment)


def refused(name: str):  # type: ignore[no-untyped-def]
    class _Refused:
        def __enter__(self) -> None: ...

        def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
            assert isinstance(error, Reverted), f"expected {name}, but the call went through"
            assert error.name == name, error
            return True

    return _Refused()


def zoo(world: Deployment, name: str, *args: object) -> Contract:
    artifact = json.loads((ZOO / f"{name}.json").read_text())
    code = bytes.fromhex(artifact["bytecode"][2:])
    return world.evm.deploy_code(artifact["abi"], code, *args, sender=MALLORY.address)


# ------------------------------------------------------------------------------------------------------- the usual way


def test_a_channel_from_deposit_to_withdrawal(scene: Scene) -> None:
    scene.allocate(300)
    assert scene.balance(ANN.address) == 700
    assert scene.claim((120, 150, scene.voucher(150))) == [0]
    assert scene.state() == (300, 120, 0, False)
    assert scene.channels.call("owed", WORKER.address, scene.token) == 120
    scene.channels.send(MALLORY.address, "settle", WORKER.address, scene.token)
    assert scene.balance(WORKER.address) == 120
    closing = WORKER.sign(Close(scene.id, 140).digest(scene.world.domain))
    scene.channels.send(MALLORY.address, "close", config_tuple(scene.config), 140, 150, scene.voucher(150), closing)
    assert scene.state() == (140, 140, 0, True)
    assert (scene.balance(WORKER.address), scene.balance(ANN.address)) == (140, 860)  # I6: claim + refund = amount
    scene.vault.send(WORKER.address, "withdraw", scene.token, 140, PAYOUT)
    assert scene.world.token.call("balanceOf", PAYOUT) == 140
    assert scene.vault.call("liabilities", scene.token) == 860


def test_a_close_takes_nothing_back_and_pays_no_more_than_was_signed(scene: Scene) -> None:
    """I2, I6: below what is claimed, above the voucher, above the allocation, and a second time."""

    def close(final: int, voucher: int) -> None:
        closing = WORKER.sign(Close(scene.id, final).digest(scene.world.domain))
        args = (config_tuple(scene.config), final, voucher, scene.voucher(voucher), closing)
        scene.channels.send(MALLORY.address, "close", *args)

    scene.allocate(300)
    scene.claim((120, 150, scene.voucher(150)))
    for final, voucher, name in ((119, 150, "BelowClaimed"), (151, 150, "OverVoucher"), (301, 301, "OverAllocated")):
        with refused(f"Channels_{name}"):
            close(final, voucher)
    close(120, 0)  # what is claimed needs no voucher
    with refused("Channels_Closed"):
        close(120, 0)
    assert (scene.state(), scene.balance(ANN.address)) == ((120, 120, 0, True), 880)


def test_money_goes_to_the_payout_address_even_after_the_key_is_retired(scene: Scene) -> None:
    def consent(owner: Address, nonce: int) -> bytes:
        struct = HotKey(owner, WORKER.address, PAYOUT, nonce, 2**40 - 1)
        return WORKER.sign(struct.digest(scene.world.workers_domain))

    arguments = (WORKER.address, PAYOUT, 2**40 - 1)
    scene.workers.send(OWNER.address, "register", *arguments, consent(OWNER.address, 0))
    scene.allocate(300)
    scene.claim((100, 100, scene.voucher(100)))
    scene.workers.send(OWNER.address, "revoke", WORKER.address)
    with refused("Workers_HotKeyTaken"):  # a thief of the hot key can consent to anything, and gains nothing
        scene.workers.send(MALLORY.address, "register", *arguments, consent(MALLORY.address, 1))
    scene.channels.send(MALLORY.address, "settle", WORKER.address, scene.token)
    assert scene.balance(PAYOUT) == 100
    scene.workers.send(OWNER.address, "register", *arguments, consent(OWNER.address, 1))
    assert scene.workers.call("worker", WORKER.address) == (OWNER.address, True, PAYOUT, 2)


def test_only_the_owner_says_where_earnings_go(scene: Scene) -> None:
    """I4: a thief of the machine has the hot key, and neither moves its earnings nor retires it."""
    consent = WORKER.sign(HotKey(OWNER.address, WORKER.address, PAYOUT, 0, 2**40 - 1).digest(scene.world.workers_domain))
    scene.workers.send(OWNER.address, "register", WORKER.address, PAYOUT, 2**40 - 1, consent)
    for thief in (WORKER.address, MALLORY.address):
        with refused("Workers_NotOwner"):
            scene.workers.send(thief, "setPayout", WORKER.address, thief)
        with refused("Workers_NotOwner"):
            scene.workers.send(thief, "revoke", WORKER.address)
    with refused("Workers_ZeroAddress"):
        scene.workers.send(OWNER.address, "setPayout", WORKER.address, Address(bytes(20)))
    scene.workers.send(OWNER.address, "revoke", WORKER.address)
    scene.workers.send(OWNER.address, "setPayout", WORKER.address, OWNER.address)
    assert scene.workers.call("worker", WORKER.address) == (OWNER.address, False, OWNER.address, 1)


def test_rotation_keeps_the_payout(scene: Scene) -> None:
    old, new = WORKER, key("worker2")
    consent = old.sign(HotKey(OWNER.address, old.address, PAYOUT, 0, 2**40 - 1).digest(scene.world.workers_domain))
    scene.workers.send(OWNER.address, "register", old.address, PAYOUT, 2**40 - 1, consent)
    consent = new.sign(HotKey(OWNER.address, new.address, PAYOUT, 0, 2**40 - 1).digest(scene.world.workers_domain))
    scene.workers.send(OWNER.address, "rotate", old.address, new.address, 2**40 - 1, consent)
    assert [scene.workers.call("isActive", k.address) for k in (old, new)] == [False, True]
    assert [scene.workers.call("payoutOf", k.address) for k in (old, new)] == [PAYOUT, PAYOUT]
    assert scene.workers.call("ownerOf", old.address) == OWNER.address


def test_withdrawal_waits_for_the_delay_and_leaves_time_to_claim(scene: Scene) -> None:
    scene.allocate(300)
    arguments = (config_tuple(scene.config),)
    begun = scene.world.evm.now
    scene.channels.send(SESSION.address, "initiateWithdraw", *arguments)
    scene.world.evm.set_time(begun + 899)
    with refused("Channels_TooEarly"):  # I5
        scene.channels.send(ANN.address, "finalizeWithdraw", *arguments)
    assert scene.claim((50, 60, scene.voucher(60))) == [0]
    with refused("Channels_WithdrawPending"):
        scene.allocate(400)
    scene.world.evm.set_time(begun + 900)
    scene.channels.send(MALLORY.address, "finalizeWithdraw", *arguments)
    assert scene.balance(ANN.address) == 950
    assert scene.claim((60, 60, scene.voucher(60))) == [1]  # I6: closed is final
    with refused("Channels_Closed"):
        scene.allocate(500)


def test_pause_blocks_deposit_and_allocate_and_no_exit(scene: Scene) -> None:
    """I9"""
    scene.allocate(300)
    scene.vault.send(scene.world.admin, "setPaused", True)
    with refused("Vault_Paused"):
        scene.allocate(400)
    with refused("Vault_Paused"):
        scene.vault.send(ANN.address, "deposit", scene.token, 1, ANN.address)
    assert scene.claim((10, 10, scene.voucher(10))) == [0]
    scene.channels.send(MALLORY.address, "settle", WORKER.address, scene.token)
    scene.vault.send(WORKER.address, "withdraw", scene.token, 10, PAYOUT)
    scene.channels.send(ANN.address, "initiateWithdraw", config_tuple(scene.config))
    scene.world.evm.set_time(scene.world.evm.now + 900)
    scene.channels.send(ANN.address, "finalizeWithdraw", config_tuple(scene.config))
    scene.vault.send(ANN.address, "withdraw", scene.token, 990, ANN.address)


# ------------------------------------------------------------------------------------------------ who may do what (I14)


def test_only_modules_move_entries_and_only_the_deployer_seals_once(scene: Scene) -> None:
    for who in (scene.world.admin, ANN.address, MALLORY.address):
        for function in ("lock", "lockBond", "release"):
            with refused("Vault_NotModule"):
                scene.vault.send(who, function, scene.token, MALLORY.address, 1)
    with refused("Vault_AlreadySealed"):
        scene.vault.send(scene.world.admin, "seal", [scene.workers.address])
    with refused("Vault_NotDeployer"):
        scene.vault.send(MALLORY.address, "seal", [scene.workers.address])
    with refused("AccessControlUnauthorizedAccount"):
        scene.vault.send(MALLORY.address, "setPaused", True)
    with refused("AccessControlUnauthorizedAccount"):
        scene.vault.send(MALLORY.address, "setToken", scene.token, True)


def test_no_deposit_before_the_seal(deployment: Deployment) -> None:
    """I14: otherwise the deployer could name a module of its own after people paid in."""
    world = deployment
    vault = world.evm.deploy("Vault", world.admin, 0, sender=world.admin)
    vault.send(world.admin, "setToken", NATIVE, True)
    world.evm.give(ANN.address, 5)
    with refused("Vault_NotSealed"):
        vault.send(ANN.address, "deposit", NATIVE, 5, ANN.address, value=5)
    with refused("Vault_NotAContract"):
        vault.send(world.admin, "seal", [MALLORY.address])


def test_the_vault_has_no_function_that_these_tests_do_not_know(deployment: Deployment) -> None:
    """I14: a new way to move money fails here until somebody looked at it."""
    views = {"balanceOf", "liabilities", "lockedBy", "isModule", "isTokenAllowed", "isSealed", "paused"}
    roles = {f for f in deployment.vault.functions if "Role" in f or "Admin" in f or "ADMIN" in f}
    known = {"deposit", "withdraw", "lock", "release", "seal", "setToken", "setPaused"}
    known |= {"depositWithPermit", "depositWithAuthorization", "lockBond"}
    assert deployment.vault.functions == views | roles | known | {"GUARDIAN", "owner", "supportsInterface"}


# -------------------------------------------------------------------------------------------------------- signature zoo


def test_signature_zoo(scene: Scene) -> None:
    """I3, I4: one good form of a signature, one domain, one channel, one key."""
    scene.allocate(300)
    good = scene.voucher(100)
    other_chain = Domain(1, scene.channels.address)
    other_contract = Domain(scene.world.evm.chain_id, scene.vault.address)
    other_channel = replace(scene.config, salt=Hash32(b"\1" * 32)).channel_id(scene.world.domain)
    bad = {
        "high s": high_s(good),
        "v 0 or 1": good[:64] + bytes((good[64] - 27,)),
        "other v": good[:64] + bytes((55 - good[64],)),
        "EIP-2098": good[:32] + bytes((good[32] | (good[64] == 28) << 7,)) + good[33:64],
        "66 bytes": good + b"\0",
        "empty": b"",
        "zeros": bytes(65),
        "other chain": scene.voucher(100, other_chain),
        "other contract": scene.voucher(100, other_contract),
        "other channel": SESSION.sign(Voucher(other_channel, 100).digest(scene.world.domain)),
        "payer": ANN.sign(Voucher(scene.id, 100).digest(scene.world.domain)),
        "stranger": MALLORY.sign(Voucher(scene.id, 100).digest(scene.world.domain)),
        "other struct": SESSION.sign(Close(scene.id, 100).digest(scene.world.domain)),
    }
    for name, signature in bad.items():
        assert scene.claim((100, 100, signature)) == [4], name
    assert scene.state()[1] == 0
    assert scene.claim((100, 100, good), (100, 100, good), (99, 100, good), (101, 100, good)) == [0, 2, 2, 5]
    for signature in bad.values():
        with refused("Channels_BadSignature"):
            scene.allocate(301, signature)


def test_an_allocation_pays_once(scene: Scene) -> None:
    """I3: the total is signed, so a replay changes nothing."""
    scene.allocate(300)
    with refused("Channels_NotHigher"):
        scene.allocate(300)
    assert scene.balance(ANN.address) == 700


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
def test_a_batch_equals_its_entries_one_by_one(artifacts: Path, seed: int) -> None:
    """I13, with bad entries between good ones and hostile wallets among the signers."""
    dice = random.Random(seed)
    outcomes = []
    amounts = [(dice.randint(0, 120), dice.randint(0, 120), dice.randint(0, 3)) for _ in range(dice.randint(1, 12))]
    for one_by_one in (False, True):
        scene = Scene(Deployment(artifacts))
        evil = zoo(scene.world, "Wallet", SESSION.address)
        evil.send(MALLORY.address, "setMood", 1 + seed % 4)
        configs = [scene.config, replace(scene.config, payer_authorizer=evil.address)]
        for config in configs:
            scene.config = config
            scene.allocate(100)
        entries = []
        for amount, ceiling, kind in amounts:
            scene.config = configs[kind == 3]
            signature = scene.voucher(ceiling) if kind else MALLORY.sign(keccak256(b"noise"))
            entries.append((config_tuple(scene.config), amount, ceiling, signature))
        for batch in [[e] for e in entries] if one_by_one else [entries]:
            scene.channels.send(MALLORY.address, "claim", batch)
        owed = scene.channels.call("owed", WORKER.address, scene.token)
        ids = [c.channel_id(scene.world.domain) for c in configs]
        outcomes.append((owed, [scene.channels.call("channel", i) for i in ids]))
    assert outcomes[0][0] == outcomes[1][0]
    assert [c[1] for c in outcomes[0][1]] == [c[1] for c in outcomes[1][1]]


# ----------------------------------------------------------------------------------------------------------- wallet zoo


def test_contract_wallets_sign_by_erc_1271(deployment: Deployment) -> None:
    world = deployment
    wallet = zoo(world, "Wallet", ANN.address)
    scene = Scene(world, payer=wallet.address, payer_authorizer=wallet.address, receiver_authorizer=wallet.address)
    world.token.send(ANN.address, "mint", ANN.address, 500)
    world.vault.send(ANN.address, "deposit", scene.token, 500, wallet.address)
    scene.allocate(300)
    voucher = ANN.sign(Voucher(scene.id, 100).digest(world.domain))
    assert scene.claim((100, 100, voucher)) == [0]
    for mood in range(1, 5):  # reverting, gas burner, return bomb, short return: all just a "no"
        wallet.send(MALLORY.address, "setMood", mood)
        higher = ANN.sign(Voucher(scene.id, 200).digest(world.domain))
        assert scene.claim((200, 200, higher)) == [4], mood
        with refused("Channels_BadSignature"):
            scene.allocate(400)
    wallet.send(MALLORY.address, "setMood", 0)
    closing = ANN.sign(Close(scene.id, 100).digest(world.domain))
    world.channels.send(MALLORY.address, "close", config_tuple(scene.config), 100, 0, b"", closing)
    assert scene.balance(wallet.address) == 400


@pytest.mark.parametrize("mood", [1, 2, 3, 4])
def test_a_hostile_wallet_does_not_spend_the_gas_of_the_batch(deployment: Deployment, mood: int) -> None:
    """I13"""
    scene, world = Scene(deployment), deployment
    evil = zoo(world, "Wallet", MALLORY.address)
    evil.send(MALLORY.address, "setMood", mood)
    trap = replace(scene.config, payer_authorizer=evil.address)
    scene.allocate(100)
    good = (config_tuple(scene.config), 40, 40, scene.voucher(40))
    scene.config = trap
    scene.allocate(100)
    world.evm.gas_limit = 500_000
    result = world.channels.send(MALLORY.address, "claim", [(config_tuple(trap), 40, 40, b"x"), good])
    assert [name for name, _ in result.events] == ["ClaimSkipped", "Claimed"]


def test_a_wallet_that_says_yes_to_all_robs_only_itself(deployment: Deployment) -> None:
    """I10"""
    world = deployment
    wallet = zoo(world, "Wallet", MALLORY.address)
    wallet.send(MALLORY.address, "setMood", 5)
    scene = Scene(world, payer=wallet.address)
    with refused("Vault_Insufficient"):
        scene.allocate(1, b"anything")
    assert scene.balance(ANN.address) == 1000


def test_a_signer_without_code_and_key_is_nobody(deployment: Deployment) -> None:
    scene = Scene(deployment, receiver_authorizer=ZERO_ADDRESS)
    scene.allocate(300)
    for signature in (b"", bytes(65), WORKER.sign(Close(scene.id, 0).digest(scene.world.domain))):
        with refused("Channels_BadSignature"):
            scene.channels.send(MALLORY.address, "close", config_tuple(scene.config), 0, 0, b"", signature)


# ------------------------------------------------------------------------------------------------------------ token zoo


def listed(world: Deployment, name: str) -> Contract:
    token = zoo(world, name)
    world.vault.send(world.admin, "setToken", token.address, True)
    return token


def test_a_fee_token_is_credited_with_what_arrived(deployment: Deployment) -> None:
    """I1"""
    token, vault = listed(deployment, "FeeToken"), deployment.vault
    token.send(ANN.address, "mint", ANN.address, 1000)
    token.send(ANN.address, "approve", vault.address, 1000)
    assert vault.send(ANN.address, "deposit", token.address, 1000, ANN.address).value == 900
    assert vault.call("liabilities", token.address) == 900 == token.call("balanceOf", vault.address)
    vault.send(ANN.address, "withdraw", token.address, 900, ANN.address)
    assert token.call("balanceOf", ANN.address) == 810


def test_a_fee_token_by_permit_is_credited_with_what_arrived(deployment: Deployment) -> None:
    """I1: it knows no permit, so the allowance counts."""
    token, vault = listed(deployment, "FeeToken"), deployment.vault
    token.send(ANN.address, "mint", ANN.address, 1000)
    token.send(ANN.address, "approve", vault.address, 1000)
    args = (token.address, 1000, ANN.address, 2**40, 27, bytes(32), bytes(32))
    assert vault.send(ANN.address, "depositWithPermit", *args).value == 900
    assert vault.call("liabilities", token.address) == 900 == token.call("balanceOf", vault.address)


def test_a_token_without_return_value_works(deployment: Deployment) -> None:
    token, vault = listed(deployment, "NoReturnToken"), deployment.vault
    token.send(ANN.address, "mint", ANN.address, 10)
    vault.send(ANN.address, "deposit", token.address, 10, ANN.address)
    vault.send(ANN.address, "withdraw", token.address, 10, PAYOUT)
    assert token.call("balanceOf", PAYOUT) == 10


def test_a_token_that_returns_false_is_refused(deployment: Deployment) -> None:
    token = listed(deployment, "FalseToken")
    with refused("SafeERC20FailedOperation"):
        deployment.vault.send(ANN.address, "deposit", token.address, 10, ANN.address)


def test_a_token_that_calls_back_is_kept_out(deployment: Deployment) -> None:
    """I1: neither a second deposit inside a deposit nor a withdrawal inside one."""
    token, vault = listed(deployment, "ReentrantToken"), deployment.vault
    token.send(ANN.address, "mint", ANN.address, 100)
    token.send(ANN.address, "approve", vault.address, 100)
    vault.send(ANN.address, "deposit", token.address, 50, token.address)
    for attack in (
        vault.encode("deposit", token.address, 1, token.address),
        vault.encode("withdraw", token.address, 50, MALLORY.address),
    ):
        token.send(MALLORY.address, "arm", vault.address, attack)
        with refused("ReentrancyGuardReentrantCall"):
            vault.send(ANN.address, "deposit", token.address, 50, ANN.address)
    assert vault.call("liabilities", token.address) == 50


def test_a_recipient_that_calls_back_gets_its_money_once(deployment: Deployment) -> None:
    world = deployment
    greedy = zoo(world, "Greedy", world.vault.address)
    world.evm.give(ANN.address, 20)
    world.vault.send(ANN.address, "deposit", NATIVE, 10, ANN.address, value=10)
    greedy.send(ANN.address, "deposit", value=10)
    with pytest.raises(Reverted):
        greedy.send(MALLORY.address, "take", 5)
    assert world.vault.call("balanceOf", NATIVE, greedy.address) == 10
    assert world.evm.native_balance(world.vault.address) == 20 == world.vault.call("liabilities", NATIVE)


def test_forced_coins_are_nobodys(deployment: Deployment) -> None:
    """I1: tokens sent past `deposit` never become a liability."""
    deployment.token.send(MALLORY.address, "mint", deployment.vault.address, 77)
    assert deployment.vault.call("liabilities", deployment.token.address) == 0


def test_batch_sizes(scene: Scene) -> None:
    scene.allocate(300)
    entry = (config_tuple(scene.config), 1, 1, b"")
    for size in (0, 401):
        with refused("Channels_BatchSize"):
            scene.channels.send(MALLORY.address, "claim", [entry] * size)
    assert scene.claim(*[(1, 1, b"")] * 400) == [4] * 400
