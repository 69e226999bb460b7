"""A torch engine for decoder models: KV cache, prefill, decode, normative sampling. Imports torch and nothing of ours.

`Engine` is the whole interface. One thread owns an engine and calls it; nothing here is thread-safe or asynchronous.
"""
