"""Attestations on the shipped bytecode: who said what about whom, until when, and that nobody else can change it."""

from __future__ import annotations

import pytest

pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")

from node.testing.contracts import Deployment, key
from node.testing.evm import Contract, Reverted
from protocol.ids import ZERO_ADDRESS, Hash32, keccak256

ISSUER, OTHER, WORKER, MALLORY = (key(n).address for n in ("issuer", "other issuer", "worker", "mallory"))
REGION, SOC2 = (Hash32(keccak256(name)) for name in (b"region:eu", b"soc2"))
DATA = Hash32(b"\x0d" * 32)
DAY = 24 * 3600


def refused(name: str):  # type: ignore[no-untyped-def]
    return pytest.raises(Reverted, match=rf"^{name}\(")


@pytest.fixture
def book(deployment: Deployment) -> Contract:
    return deployment.attestations


def attest(book: Contract, until: int, issuer: bytes = ISSUER, topic: Hash32 = REGION, data: Hash32 = DATA) -> object:
    return book.send(issuer, "attest", WORKER, topic, data, until, "https://issuer.example/evidence")


def valid(book: Contract, issuer: bytes = ISSUER, topic: Hash32 = REGION) -> bool:
    return bool(book.call("isValid", issuer, WORKER, topic))


def test_an_attestation_holds_until_its_time(book: Contract) -> None:
    now = book.evm.now
    assert not valid(book)
    result = attest(book, now + DAY)
    assert dict(result.events)["Attested"] == {  # type: ignore[attr-defined]
        "issuer": ISSUER,
        "subject": WORKER,
        "topic": REGION,
        "data": DATA,
        "validUntil": now + DAY,
        "version": 1,
        "uri": "https://issuer.example/evidence",
    }
    assert valid(book)
    assert book.call("attestation", ISSUER, WORKER, REGION) == (DATA, now, now + DAY, False, 1)
    book.evm.set_time(now + DAY - 1)
    assert valid(book)
    book.evm.set_time(now + DAY)
    assert not valid(book)
    with refused("Attestations_Expired"):
        attest(book, now + DAY)
    attest(book, now + DAY + 1)
    assert valid(book)


def test_each_issuer_subject_and_topic_is_a_word_of_its_own(book: Contract) -> None:
    attest(book, book.evm.now + DAY)
    assert not valid(book, OTHER)
    assert not valid(book, topic=SOC2)
    assert not book.call("isValid", ISSUER, OTHER, REGION)
    attest(book, book.evm.now + DAY, OTHER, data=Hash32(b"\x0e" * 32))
    book.send(OTHER, "revoke", WORKER, REGION)
    assert valid(book)
    assert not valid(book, OTHER)


def test_only_the_issuer_takes_back_what_it_said_and_once(book: Contract) -> None:
    with refused("Attestations_Unknown"):
        book.send(ISSUER, "revoke", WORKER, REGION)
    attest(book, book.evm.now + DAY)
    for stranger in (MALLORY, WORKER):
        with refused("Attestations_Unknown"):
            book.send(stranger, "revoke", WORKER, REGION)
    assert valid(book)
    result = book.send(ISSUER, "revoke", WORKER, REGION)
    assert dict(result.events)["AttestationRevoked"]["version"] == 1
    assert not valid(book)
    with refused("Attestations_Revoked"):
        book.send(ISSUER, "revoke", WORKER, REGION)


def test_a_new_word_replaces_the_old_one_also_after_a_revocation(book: Contract) -> None:
    attest(book, book.evm.now + DAY)
    book.send(ISSUER, "revoke", WORKER, REGION)
    attest(book, book.evm.now + 2 * DAY, data=Hash32(b"\x0e" * 32))
    assert valid(book)
    found = book.call("attestation", ISSUER, WORKER, REGION)
    assert found == (b"\x0e" * 32, book.evm.now, book.evm.now + 2 * DAY, False, 2)


def test_nobody_is_no_subject(book: Contract) -> None:
    with refused("Attestations_ZeroAddress"):
        book.send(ISSUER, "attest", ZERO_ADDRESS, REGION, DATA, book.evm.now + DAY, "")
