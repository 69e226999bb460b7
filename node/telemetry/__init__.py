"""What a running node tells of itself: metrics in Prometheus' text format, and a trace of the engine's steps on demand.

Rules:
- Counting never waits: no lock, no system call, no allocation that grows with use. Every number has one writer; who reads may see
  two numbers of two moments.
- What an engine does not count is left out, never shown as 0.
- Names are promises: the engine's are vLLM's, the market's begin with `gristmill_`. Each has a row in docs/reference/metrics.md.
"""
