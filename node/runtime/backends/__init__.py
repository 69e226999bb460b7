"""Model runtimes besides our own engine, each behind `node.ports.Backend` and imported only when it is chosen."""
