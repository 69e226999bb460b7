"""The hardware: which devices torch can compute on, what their vendors' libraries say of them, and which one to use.

Rules:
- torch is the authority on what can compute; a vendor's library only adds to it. Each is optional, and its absence is an answer
  ("not available: ..."), never a failure.
- Nothing here is remembered between calls: a device is looked at when it is asked about.
"""
