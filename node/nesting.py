"""JSON from outside, without the depth that kills a parser.

Python's recursion limit is what stops `json` and `msgspec` on nested brackets, and any library may lift it for the whole process
(importing web3 or eth-account sets it to 100,000): the parser then runs off the C stack and the process dies. So depth is counted
before anything is parsed.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

MAX_DEPTH: Final = 100
_BRACKETS: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', re.DOTALL)


def check_depth(data: bytes, limit: int = MAX_DEPTH) -> None:
    """Raise `ValueError` when brackets nest deeper than `limit`. Linear in the size; free when there are few brackets."""
    if data.count(b"[") + data.count(b"{") <= limit:
        return
    depth = 0
    for found in _BRACKETS.finditer(data):
        first = data[found.start()]
        if first in b"[{":
            depth += 1
            if depth > limit:
                raise ValueError(f"nested more than {limit} deep")
        elif first in b"]}":
            depth -= 1


def loads(data: bytes | str) -> Any:
    """`json.loads` for what others wrote. Raises `ValueError` for everything that is no JSON of reasonable depth."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    check_depth(raw)
    return json.loads(raw)
