"""The network: a libp2p host and an in-memory twin behind one port.

Nothing outside this package imports libp2p. `host.open_host` is the real network, `memory.MemoryHub` the one for tests and
simulations; both are `node.ports.Network`. What py-libp2p does is used as it is (dialing, Noise, identify, gossipsub); what
it does not bound is ours: the muxer (`yamux`), admission of connections (`guards`), stream negotiation (`streams`).
"""
