"""Admission of inbound connections, counted."""

from __future__ import annotations

import random

import pytest

from node.network.guards import Guards, NetworkLimits, Ticket, subnet_of

LIMITS = NetworkLimits(
    connections=8, reserved=3, connections_per_subnet=4, connections_per_peer=2, half_open=10, half_open_per_address=4
)


def admit(guards: Guards, address: str) -> Ticket:
    ticket = guards.admit(address, lambda: None)
    assert ticket is not None
    return ticket


def connect(guards: Guards, address: str, peer: str) -> Ticket | None:
    ticket = admit(guards, address)
    return ticket if guards.establish(ticket, peer) else None


@pytest.mark.parametrize(
    ("address", "subnet"),
    [
        ("192.0.2.7", "192.0.2.0/24"),
        ("::ffff:192.0.2.7", "192.0.2.0/24"),
        ("2001:db8:1:2ff::1", "2001:db8:1:200::/56"),
        ("fe80::1%eth0", "fe80::/56"),
        ("nonsense", "nonsense"),
    ],
)
def test_subnets(address: str, subnet: str) -> None:
    assert subnet_of(address) == subnet


def test_one_address_cannot_take_the_half_open_slots() -> None:
    guards = Guards(LIMITS)
    for _ in range(4):
        admit(guards, "192.0.2.1")
    assert guards.admit("192.0.2.1", lambda: None) is None
    assert guards.refused == {"half_open_per_address": 1}
    admit(guards, "192.0.2.2")


def test_the_oldest_half_open_socket_gives_way() -> None:
    guards = Guards(LIMITS)
    evicted: list[int] = []
    for i in range(10):
        guards.admit(f"198.51.100.{i}", lambda i=i: evicted.append(i))
    admit(guards, "192.0.2.1")
    assert evicted == [0]
    assert guards.half_open == 10


def test_one_subnet_cannot_take_the_connections() -> None:
    guards = Guards(LIMITS)
    taken = [connect(guards, f"192.0.2.{i}", f"peer{i}") for i in range(6)]
    assert [ticket is not None for ticket in taken] == [True] * 4 + [False] * 2
    assert connect(guards, "198.51.100.1", "other") is not None


def test_reserved_slots_are_for_known_peers() -> None:
    guards = Guards(LIMITS)
    guards.known.add("friend")
    strangers = [connect(guards, f"10.0.{i}.1", f"stranger{i}") for i in range(8)]
    assert sum(ticket is not None for ticket in strangers) == 5
    assert connect(guards, "10.0.0.1", "friend") is not None
    assert guards.refused["connections"] == 3


def test_known_peers_stop_at_the_total() -> None:
    guards = Guards(LIMITS)
    guards.known = {f"friend{i}" for i in range(20)}
    assert sum(connect(guards, f"10.0.{i}.1", f"friend{i}") is not None for i in range(20)) == 8


def test_one_peer_has_two_connections() -> None:
    guards = Guards(LIMITS)
    assert [connect(guards, f"10.0.{i}.1", "peer") is not None for i in range(3)] == [True, True, False]


def test_counts_after_a_random_walk_are_exact_and_nothing_is_left() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        guards = Guards(LIMITS)
        guards.known = {"peer0", "peer1"}
        open_: list[Ticket] = []
        for _ in range(300):
            if open_ and rng.random() < 0.5:
                ticket = rng.choice(open_)
                if ticket.peer is None and rng.random() < 0.7 and ticket in guards._half_open:
                    guards.establish(ticket, f"peer{rng.randrange(12)}")
                else:
                    guards.release(ticket)
                    open_.remove(ticket)
            else:
                new = guards.admit(f"10.0.{rng.randrange(3)}.{rng.randrange(4)}", lambda: None)
                if new is not None:
                    open_.append(new)
            assert guards.half_open <= LIMITS.half_open
            assert guards.established <= LIMITS.connections
            assert max(guards._half_open_by_address.values(), default=0) <= LIMITS.half_open_per_address
            assert max(guards._by_peer.values(), default=0) <= LIMITS.connections_per_peer
        for ticket in open_:
            guards.release(ticket)
            guards.release(ticket)
        assert guards.half_open == guards.established == 0
        assert not guards._half_open_by_address and not guards._by_subnet and not guards._by_peer
