"""The settings: one file for each section of `gristmill.toml`, one frozen dataclass in each.

Rules
- A setting stands in one place only. Its type, default, unit, bounds and description are here; flag, variable, parsing and the
  reference page follow from them.
- Its description says what it does and what its extreme values mean; `scripts/gen-reference` puts it on the page.
- A section knows no other section. What binds two of them is in `node/config/consistency.py`.
"""
