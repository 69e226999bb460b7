"""The chain side of the node: JSON-RPC, transactions, logs, our contracts. Nothing is imported until it is used."""
