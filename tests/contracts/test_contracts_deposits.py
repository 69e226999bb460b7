"""The signed ways into the vault: EIP-2612 permit and EIP-3009 authorization, and bonds under a pause."""

from __future__ import annotations

import pytest

pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")

from eth_abi.abi import encode

from node.testing.contracts import NATIVE, PUPPET, Deployment, key
from node.testing.evm import Reverted
from protocol.ids import ZERO_ADDRESS, keccak256

ANN, MALLORY = key("ann"), key("mallory")
FOREVER = 2**40 - 1
NONCE = b"\x0e" * 32
PERMIT = b"Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"
RECEIVE = b"ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"


def refused(name: str):  # type: ignore[no-untyped-def]
    return pytest.raises(Reverted, match=rf"^{name}\(")


def signed(world: Deployment, struct: bytes) -> tuple[int, bytes, bytes]:
    """(v, r, s) by Ann in the domain of the token."""
    domain = world.token.call("DOMAIN_SEPARATOR")
    signature = ANN.sign(keccak256(b"\x19\x01" + domain + keccak256(struct)))
    return signature[64], signature[:32], signature[32:64]


def permit(world: Deployment, amount: int, nonce: int = 0) -> tuple[int, bytes, bytes]:
    fields = (keccak256(PERMIT), ANN.address, world.vault.address, amount, nonce, FOREVER)
    return signed(world, encode(["bytes32", "address", "address", "uint256", "uint256", "uint256"], fields))


def authorization(world: Deployment, amount: int) -> tuple[int, bytes, bytes]:
    fields = (keccak256(RECEIVE), ANN.address, world.vault.address, amount, 0, FOREVER, NONCE)
    return signed(world, encode(["bytes32", "address", "address", *["uint256"] * 3, "bytes32"], fields))


@pytest.fixture
def world(deployment: Deployment) -> Deployment:
    deployment.token.send(ANN.address, "mint", ANN.address, 1000)
    return deployment


def balance(world: Deployment, who: object = ANN) -> int:
    return world.vault.call("balanceOf", world.token.address, who.address)  # type: ignore[no-any-return, attr-defined]


def test_a_permit_deposits_in_one_transaction(world: Deployment) -> None:
    args = (world.token.address, 300, MALLORY.address, FOREVER, *permit(world, 300))
    assert world.vault.send(ANN.address, "depositWithPermit", *args).value == 300
    assert balance(world, MALLORY) == 300 == world.vault.call("liabilities", world.token.address)


def test_a_permit_that_somebody_used_first_does_not_stop_the_deposit(world: Deployment) -> None:
    proof = permit(world, 300)
    world.token.send(MALLORY.address, "permit", ANN.address, world.vault.address, 300, FOREVER, *proof)
    world.vault.send(ANN.address, "depositWithPermit", world.token.address, 300, ANN.address, FOREVER, *proof)
    assert balance(world) == 300


def test_a_permit_pulls_from_its_sender_only(world: Deployment) -> None:
    """I10: Ann's permit in Mallory's hands gives Mallory nothing of Ann's."""
    proof = permit(world, 300)
    with refused("ERC20InsufficientAllowance"):
        world.vault.send(
            MALLORY.address, "depositWithPermit", world.token.address, 300, MALLORY.address, FOREVER, *proof
        )
    assert world.token.call("balanceOf", ANN.address) == 1000


def test_an_authorization_credits_its_signer_whoever_submits(world: Deployment) -> None:
    """I3, I10"""
    args = (world.token.address, ANN.address, 300, 0, FOREVER, NONCE, *authorization(world, 300))
    assert world.vault.send(MALLORY.address, "depositWithAuthorization", *args).value == 300
    assert (balance(world), balance(world, MALLORY)) == (300, 0)
    with refused("ERC3009UsedAuthorization"):
        world.vault.send(MALLORY.address, "depositWithAuthorization", *args)


def test_an_authorization_of_another_amount_is_refused(world: Deployment) -> None:
    args = (world.token.address, ANN.address, 301, 0, FOREVER, NONCE, *authorization(world, 300))
    with refused("ERC3009InvalidSignature"):
        world.vault.send(MALLORY.address, "depositWithAuthorization", *args)


def calls(world: Deployment) -> dict[str, tuple[object, ...]]:
    token = world.token.address
    return {
        "depositWithPermit": (token, 5, ANN.address, FOREVER, *permit(world, 5)),
        "depositWithAuthorization": (token, ANN.address, 5, 0, FOREVER, NONCE, *authorization(world, 5)),
    }


def test_signed_deposits_obey_pause_and_list(world: Deployment) -> None:
    for name, args in calls(world).items():
        world.vault.send(world.admin, "setPaused", True)
        with refused("Vault_Paused"):
            world.vault.send(ANN.address, name, *args)
        world.vault.send(world.admin, "setPaused", False)
        world.vault.send(world.admin, "setToken", world.token.address, False)
        with refused("Vault_TokenNotAllowed"):
            world.vault.send(ANN.address, name, *args)
        world.vault.send(world.admin, "setToken", world.token.address, True)
        who = (args[0], args[1], ZERO_ADDRESS, *args[3:]) if name == "depositWithPermit" else (args[0], ZERO_ADDRESS)
        with refused("Vault_ZeroAddress"):
            world.vault.send(ANN.address, name, *(who + args[len(who) :]))


def test_signed_deposits_bring_no_native_coin_and_take_no_value(world: Deployment) -> None:
    world.evm.give(ANN.address, 100)
    for name, args in calls(world).items():
        with refused("Vault_WrongValue"):
            world.vault.send(ANN.address, name, NATIVE, *args[1:])
        with pytest.raises(Reverted):
            world.vault.send(ANN.address, name, *args, value=5)
    assert world.evm.native_balance(world.vault.address) == 0


def test_a_permit_for_nothing_credits_nothing(world: Deployment) -> None:
    args = (world.token.address, 0, ANN.address, FOREVER, *permit(world, 0))
    with refused("Vault_ZeroAmount"):
        world.vault.send(ANN.address, "depositWithPermit", *args)


def test_a_bond_is_locked_under_a_pause_and_other_locks_are_not(puppet: Deployment) -> None:
    """I9: a dispute is a way out."""
    vault, token = puppet.vault, puppet.token.address
    puppet.fund(ANN.address, 100)
    vault.send(puppet.admin, "setPaused", True)
    with refused("Vault_Paused"):
        vault.send(MALLORY.address, "lock", token, ANN.address, 40, via=PUPPET)
    vault.send(MALLORY.address, "lockBond", token, ANN.address, 40, via=PUPPET)
    assert (balance(puppet), vault.call("lockedBy", PUPPET, token)) == (60, 40)
    with refused("Vault_Insufficient"):
        vault.send(MALLORY.address, "lockBond", token, ANN.address, 61, via=PUPPET)


def test_a_stranger_releases_not_even_nothing(puppet: Deployment) -> None:
    world = puppet
    for amount in (0, 1):
        with refused("Vault_NotModule"):
            world.vault.send(MALLORY.address, "release", world.token.address, MALLORY.address, amount)
    with refused("Vault_ReleaseExceedsLocked"):
        world.vault.send(MALLORY.address, "release", world.token.address, MALLORY.address, 1, via=PUPPET)
