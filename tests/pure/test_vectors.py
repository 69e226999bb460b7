"""What other implementations are held to, held by ours and by a second implementation of EIP-712 (eth_account)."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from array import array
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import _hash_eip191_message, encode_typed_data

from protocol.digest import InputDigest, OutputDigest
from protocol.errors import InvalidValue, RemoteProtocolError, WireCode
from protocol.frames import CONTROL_LIMIT
from protocol.ids import Address, Hash32, JobId
from protocol.keys import PrivateKey, recover, require_signer
from protocol.logprobs import check
from protocol.messages import CONVERSATIONS, Params, decode, decode_value, encode, params_hash, request_hash
from protocol.pricing import Price, cost
from protocol.tasks import Task, TaskRequest, task_of
from protocol.typed_data import STRUCTS, Domain, Voucher

ROOT = Path(__file__).resolve().parents[2]
TYPED = json.loads((ROOT / "tests" / "vectors" / "typed_data.json").read_text(encoding="utf-8"))
WIRE = json.loads((ROOT / "tests" / "vectors" / "wire.json").read_text(encoding="utf-8"))
CASES = [
    pytest.param(struct, case, id=f"{struct.__name__}-{case['domain']}-{n}")
    for struct in STRUCTS
    for n, case in enumerate(TYPED["structs"][struct.__name__]["cases"])
]
KEY = PrivateKey(bytes.fromhex(TYPED["privateKey"][2:]))


def domain(name: str) -> Domain:
    values = TYPED["domains"][name]
    return Domain(int(values["chainId"]), Address(values["verifyingContract"]))


def members(struct: Any) -> list[dict[str, str]]:
    """The struct's members from its Solidity string."""
    inside = struct.TYPE[struct.TYPE.index("(") + 1 : -1]
    return [dict(zip(("type", "name"), part.split(" "), strict=True)) for part in inside.split(",")]


def build(struct: Any, case: dict[str, Any]) -> Any:
    values = {}
    for field, member in zip(fields(struct), members(struct), strict=True):
        text = case["message"][member["name"]]
        kinds = {"address": Address, "bytes32": Hash32}
        values[field.name] = kinds.get(member["type"], int)(text)
    return struct(**values)


def test_the_committed_vectors_are_what_the_code_makes() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gen-vectors"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("struct", "case"), CASES)
def test_typed_data(struct: Any, case: dict[str, Any]) -> None:
    """S1: these structs are all that is signed under a domain."""
    made, where = build(struct, case), domain(case["domain"])
    assert "0x" + made.struct_hash().hex() == case["structHash"]
    assert "0x" + made.digest(where).hex() == case["digest"]
    signature = bytes.fromhex(case["signature"][2:])
    assert KEY.sign(made.digest(where)) == signature
    assert recover(made.digest(where), signature) == Address(TYPED["signer"])


@pytest.mark.parametrize(("struct", "case"), CASES)
def test_typed_data_against_eth_account(struct: Any, case: dict[str, Any]) -> None:
    """S2, by a second implementation."""
    values = TYPED["domains"][case["domain"]]
    message = encode_typed_data(
        full_message={
            "types": {
                "EIP712Domain": [
                    {"name": "name", "type": "string"},
                    {"name": "version", "type": "string"},
                    {"name": "chainId", "type": "uint256"},
                    {"name": "verifyingContract", "type": "address"},
                ],
                struct.__name__: members(struct),
            },
            "primaryType": struct.__name__,
            "domain": {
                "name": values["name"],
                "version": values["version"],
                "chainId": int(values["chainId"]),
                "verifyingContract": values["verifyingContract"],
            },
            "message": {
                m["name"]: int(case["message"][m["name"]])
                if m["type"].startswith("uint")
                else bytes.fromhex(case["message"][m["name"]][2:])
                if m["type"] == "bytes32"
                else case["message"][m["name"]]
                for m in members(struct)
            },
        }
    )
    assert "0x" + message.header.hex() == values["separator"]
    assert "0x" + message.body.hex() == case["structHash"]
    assert "0x" + _hash_eip191_message(message).hex() == case["digest"]
    assert "0x" + Account.sign_message(message, TYPED["privateKey"]).signature.hex() == case["signature"]
    assert Account.recover_message(message, signature=case["signature"]) == TYPED["signer"]


def test_every_field_and_the_whole_domain_are_inside_the_digest() -> None:
    for struct in STRUCTS:
        case = TYPED["structs"][struct.__name__]["cases"][2]
        made, where = build(struct, case), domain("devnet")
        seen = {made.digest(where)}
        for field in fields(struct):
            value = getattr(made, field.name)
            other = value ^ 1 if isinstance(value, int) else type(value)(bytes(value)[:-1] + bytes([value[-1] ^ 1]))
            seen.add(replace(made, **{field.name: other}).digest(where))
        seen.add(made.digest(replace(where, chain_id=1)))
        seen.add(made.digest(replace(where, verifying_contract=Address(bytes(20)))))
        assert len(seen) == len(fields(struct)) + 3


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda s: s.__name__)
def test_values_that_do_not_fit_are_refused(struct: Any) -> None:
    made = build(struct, TYPED["structs"][struct.__name__]["cases"][2])
    for field, member in zip(fields(struct), members(struct), strict=True):
        if member["type"].startswith("uint"):
            for value in (-1, 1 << int(member["type"][4:]), True):
                with pytest.raises(InvalidValue):
                    replace(made, **{field.name: value}).struct_hash()


# ------------------------------------------------------------------------------------------------------- signatures

VOUCHER = Voucher(Hash32(bytes(32)), 1).digest(domain("devnet"))
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def high_s(signature: bytes) -> bytes:
    s = ORDER - int.from_bytes(signature[32:64])
    return signature[:32] + s.to_bytes(32) + bytes([55 - signature[64]])


BAD_SIGNATURES = {
    "empty": lambda s: b"",
    "64 bytes": lambda s: s[:64],
    "66 bytes": lambda s: s + b"\0",
    "v of 0": lambda s: s[:64] + b"\0",
    "v of 29": lambda s: s[:64] + b"\x1d",
    "high s": high_s,
    "r of 0": lambda s: bytes(32) + s[32:],
    "r over the order": lambda s: b"\xff" * 32 + s[32:],
    "s of 0": lambda s: s[:32] + bytes(32) + s[64:],
    "zeros": lambda s: bytes(64) + b"\x1b",
    "other v": lambda s: s[:64] + bytes([55 - s[64]]),
    "one bit of r": lambda s: bytes([s[0] ^ 1]) + s[1:],
    "one bit of s": lambda s: s[:63] + bytes([s[63] ^ 1]) + s[64:],
}


@pytest.mark.parametrize("name", BAD_SIGNATURES)
def test_a_bad_signature_is_the_senders_fault(name: str) -> None:
    """S3."""
    with pytest.raises(RemoteProtocolError) as caught:
        require_signer(VOUCHER, BAD_SIGNATURES[name](KEY.sign(VOUCHER)), KEY.address, "voucher")
    assert caught.value.code is WireCode.BAD_SIGNATURE


def test_a_private_key_is_neither_printed_nor_pickled() -> None:
    import copy
    import pickle

    secret = KEY.secret_bytes().hex()
    assert secret not in repr(KEY) + str(KEY) + f"{KEY!r}"
    for dump in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            dump(KEY)
    for bad in (b"", bytes(32), ORDER.to_bytes(32), b"\xff" * 32, bytes(33)):
        with pytest.raises(InvalidValue):
            PrivateKey(bad)


# -------------------------------------------------------------------------------------------------------------- wire


@pytest.mark.parametrize("name", WIRE["messages"])
def test_wire_bytes(name: str) -> None:
    payload = bytes.fromhex(WIRE["messages"][name])
    homes = [p for p, union in CONVERSATIONS.items() if name in {kind.__name__ for kind in union.__args__}]
    assert homes, f"{name} belongs to no conversation"
    for protocol in homes:
        message = decode(protocol, payload)
        assert type(message).__name__ == name
        assert encode(message) == payload
        assert len(payload) < CONTROL_LIMIT
    for protocol in CONVERSATIONS.keys() - set(homes):
        with pytest.raises(RemoteProtocolError):
            decode(protocol, payload)


def test_output_digests_do_not_depend_on_the_cut() -> None:
    job = JobId(WIRE["outputDigests"]["jobId"])
    for case in WIRE["outputDigests"]["cases"]:
        whole, pieces = OutputDigest(job, case["part"]), OutputDigest(job, case["part"])
        whole.extend(case["tokenIds"], case["text"], bytes.fromhex(case["data"]))
        for token in case["tokenIds"]:
            pieces.extend((token,), "")
        for letter in case["text"]:
            pieces.extend((), letter)
        for byte in bytes.fromhex(case["data"]):
            pieces.extend((), "", bytes([byte]))
        assert str(whole.value) == str(pieces.value) == case["digest"]
        assert whole.count == pieces.count == len(case["tokenIds"])


def test_rows_of_log_probabilities() -> None:
    """Read here by the rule's own words."""
    for case in WIRE["logprobs"]["rows"]:
        row = bytes.fromhex(case["row"])
        ids, figures = array("I", row), array("f", row)  # little-endian machines only, as CI's are
        assert figures[0] == float(case["logprob"])
        pairs = [list(pair) for pair in zip(ids[1::2], figures[2::2], strict=True)]
        assert pairs == [[token, float(figure)] for token, figure in case["top"]]
        check((case["tokenId"],), row, case["count"])
        assert case["paramsHash"] == str(params_hash(Params(logprobs=case["count"])))
    for case in WIRE["logprobs"]["lies"]:
        with pytest.raises(InvalidValue, match=case["fault"]):
            check((case["tokenId"],), bytes.fromhex(case["row"]), case["count"])
    assert len({case["fault"] for case in WIRE["logprobs"]["lies"]}) == 7


def test_every_task_has_a_request_and_its_hash() -> None:
    assert {case["task"] for case in WIRE["requests"]} == set(Task)
    for case in WIRE["requests"]:
        request = decode_value(TaskRequest, bytes.fromhex(case["request"]))
        assert task_of(request) == case["task"]
        assert encode(request) == bytes.fromhex(case["request"])
        assert str(request_hash(request)) == case["hash"]
        by_hand = hashlib.sha256(b"gristmill/request/2" + b"\x92" + bytes.fromhex(case["request"]) + b"\x90")
        assert "0x" + by_hand.hexdigest() == case["hash"]


def test_what_a_receipt_binds_of_streamed_input_does_not_depend_on_the_cut() -> None:
    for case in WIRE["streamedInputs"]:
        data = bytes.fromhex(case["data"])
        digest = InputDigest(Hash32(case["asked"]))
        for start in range(0, len(data), 7):
            digest.extend(data[start : start + 7])
        by_hand = hashlib.sha256(
            b"gristmill/streamed/1"
            + bytes.fromhex(case["asked"][2:])
            + len(data).to_bytes(8)
            + hashlib.sha256(data).digest()
        )
        assert str(digest.value) == case["hash"] == "0x" + by_hand.hexdigest()


def test_costs() -> None:
    for case in WIRE["costs"]:
        assert cost(Price(*map(int, case["price"])), *case["tokens"]) == int(case["cost"])
