"""Gristmill's protocol: values, bytes, signatures, tables and transitions. Pure: no I/O, no clock, no randomness."""
