"""The journal: one append-only, hash-chained SQLite file, and what is kept beside it. See `ledger`."""
