"""Measure a device: arithmetic, memory, transfers, and a real model. What it says of itself is `protocol.benchmark`'s.

Rules:
- Rounds of all measurements take turns, so that every figure's spread is that of the whole run, not of one lucky second.
- What cannot be measured here is skipped with a reason; nothing is estimated.
- Quiet is measured, not assumed: other processes' share of the processors, other programs on the device, clocks held down.
"""
