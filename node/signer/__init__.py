"""The signer: keys behind a policy and a memory of what they signed, in a process of their own. See `process` and `core`."""
