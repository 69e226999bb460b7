"""The table of commands. It imports nothing: the `node` guard reads it first, and `--help` needs no command loaded.

A command `why-no-jobs` lives in `node/cli/why_no_jobs.py` as the click command `command`. Each has a heading in
docs/reference/cli.md, which `scripts/gen-reference` writes.
"""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "demo": "Show the whole product at work: a paid chat on a local chain, with everything checked.",
    "init": "Make the data dir: configuration file and keys.",
    "wallet": "Make, import and list keys.",
    "start": "Run the worker.",
    "status": "What a running worker is doing.",
    "drain": "Let a running worker finish its jobs and stop.",
    "claim": "Claim what clients owe this worker.",
    "earnings": "What this worker has earned, day by day, and how much of it is claimed.",
    "payout": "Where a worker's earnings go: show it, set it with the owner's key.",
    "stake": "Put money behind this owner's workers, or show what is there.",
    "unstake": "Take a stake home, after its delay.",
    "chat": "Chat with a model: the answer on stdout, usage and cost on stderr.",
    "embed": "Vectors of texts.",
    "run": "Speech to text, text of pictures, ranking of documents.",
    "job": "Batch jobs in escrow: post a file of inputs, follow it, get the verified result.",
    "slash": "Penalties of workers: see them, move them when they are due, prove an equivocation.",
    "juror": "A seat in the committee that judges disputed batch jobs: tickets, votes, fees.",
    "offers": "What workers sell now, and why one would be chosen.",
    "deposit": "Put tokens into the vault.",
    "withdraw": "Take tokens out of the vault.",
    "channels": "This client's payment channels: list them, close them.",
    "audit": "Refold the journal and compare it with the chain.",
    "bench": "Measure this machine and sign the figures; check others'; advise prices.",
    "models": "The content-addressed model store.",
    "config": "Show the configuration.",
    "doctor": "Check this installation; each finding comes with the command that mends it.",
    "journal": "Read the journal; go on with an old one.",
    "deploy": "Put the contracts on a chain, and hand them over to their users.",
    "devnet": "A local chain with our contracts, for development.",
    "version": "Show the versions of Gristmill, Python and what matters below.",
    "completion": "Print a shell completion script.",
}
"""Name to one line of help, in the order of `--help`."""
