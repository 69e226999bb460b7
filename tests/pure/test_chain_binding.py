"""What is signed for one chain is nothing on another (invariant S5): channels, records of the journal, asks and vouchers.

The conversation's half (receipts, refusals, vouchers in a stream) is among the cheats of test_job_walks.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import channel as channel_module
from protocol.admission import Load, Rejected, check_ask
from protocol.channel import ChannelOpened, ChannelState, Role, opened, placed
from protocol.errors import (
    InvalidValue,
    LocalProtocolError,
    ProtocolError,
    RefusalReason,
    RemoteProtocolError,
    WireCode,
)
from protocol.ids import Address, ChannelId, Hash32
from protocol.job import ask_struct
from protocol.keys import PrivateKey
from protocol.messages import AskMessage, ChatMessage, Params, amount_to_wire
from protocol.offers import Asset, ModelOffer, OfferDocument, Payment, open_offer, sign_offer
from protocol.pricing import Price
from protocol.records import decode_body, encode_body, fold, kind_of
from protocol.tasks import ChatRequest
from protocol.typed_data import (
    MARKET_DOMAIN,
    STRUCTS,
    ChannelConfig,
    Domain,
    Voucher,
)

NOW = 1_800_000_000_000
PAYER, SESSION, WORKER = (PrivateKey(bytes(31) + bytes([n])) for n in (1, 2, 3))
TOKEN = Address(b"t" * 20)
CONTRACT = Address(b"c" * 20)
ONE, TWO = Domain(1, CONTRACT), Domain(2, CONTRACT)
OTHER_CONTRACT = Domain(1, Address(b"d" * 20))
CONFIG = ChannelConfig(PAYER.address, SESSION.address, WORKER.address, WORKER.address, TOKEN, 3600, Hash32(bytes(32)))

OLD = bytes.fromhex(
    "85aa6368616e6e656c5f6964c4203ee4937c00d5264ca3b530f40fb1b94a0cbb4b76362cb5736ea91cf91bfe2acca6636f6e66696787a57061796572"
    "c4140101010101010101010101010101010101010101b070617965725f617574686f72697a6572c4140202020202020202020202020202020202020202"
    "a87265636569766572c4140303030303030303030303030303030303030303b372656365697665725f617574686f72697a6572c414030303030303030303"
    "0303030303030303030303a5746f6b656ec4140404040404040404040404040404040404040404ae77697468647261775f64656c6179c41000000000000000"
    "000000000000000e10a473616c74c4200505050505050505050505050505050505050505050505050505050505050505a9616c6c6f6361746564c41000000000"
    "0000000000000000000003e8ac76616c69645f6265666f7265c4100000000000000000000000ffffffffffa97369676e6174757265c4410707070707070707"
    "070707070707070707070707070707070707070707070707070707070707070707070707070707070707070707070707070707070707070707"
)
"""A `channel_opened` record as version 0.1.0 wrote it, when a journal had one chain and did not name it."""
OLD_HOME = Domain(31337, Address(bytes([6]) * 20))


def opening(domain: Domain | None, config: ChannelConfig = CONFIG, **changes: Any) -> ChannelOpened:
    values = {"allocated": 1000, "valid_before": 2**40 - 1, "signature": bytes(65), **changes}
    return ChannelOpened(config.channel_id(domain or ONE), config, domain=domain, **values)


# ----------------------------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("wrong", [TWO, OTHER_CONTRACT, MARKET_DOMAIN], ids=str)
def test_a_channel_is_opened_on_the_chain_that_its_id_names(role: Role, wrong: Domain) -> None:
    right = opening(ONE)
    assert opened(role, right).home == ONE
    with pytest.raises(ProtocolError) as caught:
        opened(role, msgspec.structs.replace(right, domain=wrong))
    assert isinstance(caught.value, LocalProtocolError if role is Role.CLIENT else RemoteProtocolError)
    if isinstance(caught.value, RemoteProtocolError):
        assert caught.value.code is WireCode.WRONG_DOMAIN


def test_without_the_check_a_channel_of_another_chain_would_open() -> None:
    """The planted bug that the test above catches."""
    source = channel_module.__loader__.get_source("protocol.channel")  # type: ignore[union-attr]
    check = "change.config.channel_id(change.domain) != change.channel_id"
    assert source is not None and source.count(check) == 1
    space: dict[str, Any] = {"__name__": "planted"}
    exec(compile(source.replace(check, "False"), "planted", "exec"), space)
    wrong = space["ChannelOpened"](CONFIG.channel_id(ONE), CONFIG, 1000, 1, bytes(65), TWO)
    assert space["opened"](space["Role"].WORKER, wrong).domain == TWO


def test_one_configuration_has_another_id_on_every_chain_and_contract() -> None:
    assert len({CONFIG.channel_id(domain) for domain in (ONE, TWO, OTHER_CONTRACT, MARKET_DOMAIN)}) == 4


def test_every_signed_thing_has_another_digest_on_every_chain() -> None:
    for struct in STRUCTS:
        values = {"address": Address(b"a" * 20), "bytes32": Hash32(b"h" * 32)}
        kinds = [part.split(" ")[0] for part in struct.TYPE.partition("(")[2].rstrip(")").split(",")]
        made = struct(*[values.get(kind, 1) for kind in kinds])
        assert len({made.digest(domain) for domain in (ONE, TWO, OTHER_CONTRACT, MARKET_DOMAIN)}) == 4


# ------------------------------------------------------------------------------------------------------------ journal


def test_a_record_from_before_is_on_the_chain_that_its_id_fits() -> None:
    change = decode_body("channel_opened", OLD)
    assert isinstance(change, ChannelOpened) and change.domain is None
    assert encode_body(change) == OLD, "it is what was written, also when it is written again"
    for domains in ([OLD_HOME], [ONE, TWO, OLD_HOME], [OLD_HOME, ONE]):
        assert placed(change, domains).domain == OLD_HOME
        assert fold(Role.CLIENT, {}, change, domains).home == OLD_HOME
    wrong = [replace(OLD_HOME, chain_id=1), replace(OLD_HOME, verifying_contract=CONTRACT), ONE]
    state = fold(Role.CLIENT, {}, change, wrong)
    assert state.domain is None and state.authorized == 1000
    with pytest.raises(LocalProtocolError, match="nothing is signed about it"):
        _ = state.home
    assert fold(Role.CLIENT, {}, change).domain is None, "without chains nothing is guessed"


@given(
    st.integers(1, 2**63 - 1),
    st.binary(min_size=20, max_size=20),
    st.integers(1, 2**128 - 1),
    st.binary(min_size=32, max_size=32),
)
def test_a_record_names_its_chain(chain_id: int, contract: bytes, allocated: int, salt: bytes) -> None:
    domain = Domain(chain_id, Address(contract))
    change = opening(domain, replace(CONFIG, salt=Hash32(salt)), allocated=allocated)
    body = encode_body(change)
    assert decode_body(kind_of(change), body) == change
    assert msgspec.msgpack.decode(body)["domain"] == {
        "chain_id": chain_id.to_bytes(16),
        "verifying_contract": contract,
    }
    # What the record says decides, whatever chains are configured.
    assert fold(Role.WORKER, {}, change, [ONE, TWO]).home == domain


@pytest.mark.parametrize(
    "domain",
    [
        None,
        {},
        {"chain_id": (1).to_bytes(16)},
        {"chain_id": 1, "verifying_contract": bytes(20)},
        {"chain_id": bytes(15), "verifying_contract": bytes(20)},
        {"chain_id": bytes(16), "verifying_contract": bytes(19)},
        {"chain_id": bytes(16), "verifying_contract": bytes(20), "more": b""},
        b"domain",
    ],
    ids=str,
)
def test_a_damaged_domain_is_unreadable_and_never_a_missing_one(domain: Any) -> None:
    body = {**msgspec.msgpack.decode(encode_body(opening(ONE))), "domain": domain}
    with pytest.raises(LocalProtocolError, match="unreadable"):
        decode_body("channel_opened", msgspec.msgpack.encode(body))


def test_a_chain_id_that_the_journal_cannot_hold_is_refused_before_it_is_written() -> None:
    with pytest.raises(InvalidValue):
        encode_body(opening(Domain(2**128, CONTRACT)))


# ---------------------------------------------------------------------------------------------------------- admission


def payment(domain: Domain, token: Address = TOKEN) -> Payment:
    return Payment(domain.chain_id, bytes(domain.verifying_contract), bytes(token))


def asked(
    channel: Domain | None,
    accepts: dict[Payment, Price],
    *,
    signed: Domain | None = None,
    vouched: Domain | None = None,
) -> Price:
    """The price at which a worker with these payments takes a sound ask on a channel of this domain, whose ask and voucher are
    signed in these. Raises `Rejected`."""
    model = ModelOffer(bytes(32), "m", tuple(accepts.values()), context_length=999, max_tokens=99, dtype="f")
    document = OfferDocument(str(WORKER.peer_id), (), tuple(accepts), (model,), NOW, NOW + 60_000)
    offer = open_offer(sign_offer(document, WORKER), now_ms=NOW)
    channel_id = CONFIG.channel_id(channel or ONE)
    state = ChannelState(
        Role.WORKER, channel_id, CONFIG, 10**6, 0, b"", domain=channel, allocated=10**6
    )  # as the journal has it
    draft = AskMessage(
        job_id=bytes(32),
        part=0,
        channel_id=bytes(channel_id),
        worker=bytes(WORKER.address),
        model_id=bytes(32),
        offer_hash=bytes(offer.hash),
        deadline=NOW + 1,
        request=ChatRequest((ChatMessage("user", "hello"),)),
        params=Params(max_tokens=4),
        signature=bytes(65),
        cumulative=amount_to_wire(50),
        voucher_signature=SESSION.sign(Voucher(ChannelId(channel_id), 50).digest(vouched or channel or ONE)),
    )
    ask = msgspec.structs.replace(draft, signature=SESSION.sign(ask_struct(draft).digest(signed or channel or ONE)))
    load = Load(1, False, 0, 0, 0, 60_000)
    checked = check_ask(ask, worker=WORKER.address, offers={offer.hash: offer}, channel=state, load=load, now_ms=NOW)
    assert checked.payment.asset == Asset.of(state.home, TOKEN)
    return checked.price


BOTH = {payment(ONE): Price(output=1), payment(TWO): Price(output=2), payment(TWO, Address(bytes(20))): Price(output=3)}


def test_a_channel_is_served_at_the_price_of_its_own_asset() -> None:
    assert asked(ONE, BOTH) == Price(output=1)
    assert asked(TWO, BOTH) == Price(output=2)


@pytest.mark.parametrize(
    ("channel", "accepts"),
    [
        (TWO, [payment(ONE)]),
        (OTHER_CONTRACT, [payment(ONE)]),
        (ONE, [payment(ONE, Address(bytes(20)))]),
        (None, [payment(ONE)]),
    ],
    ids=["another chain", "another contract", "another token", "a chain that nobody knows"],
)
def test_a_channel_in_what_the_offer_does_not_take_is_refused(channel: Domain | None, accepts: list[Payment]) -> None:
    with pytest.raises(Rejected) as caught:
        asked(channel, dict.fromkeys(accepts, Price(output=1)))
    assert caught.value.reason is RefusalReason.WRONG_DOMAIN


@pytest.mark.parametrize("other", [TWO, OTHER_CONTRACT, MARKET_DOMAIN], ids=str)
def test_an_ask_or_a_voucher_of_another_chain_is_nobodys(other: Domain) -> None:
    """Also of a chain that the worker is paid on: what counts is the channel's."""
    with pytest.raises(Rejected) as caught:
        asked(ONE, BOTH, signed=other)
    assert caught.value.reason is RefusalReason.SIGNER_MISMATCH
    with pytest.raises(Rejected) as caught:
        asked(ONE, BOTH, vouched=other)
    assert caught.value.reason is RefusalReason.VOUCHER_INVALID
