"""The specification's pages say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from protocol.signing import SigningReason
from protocol.typed_data import NAME, STRUCTS, VERSION

ROOT = Path(__file__).resolve().parents[2]


def test_codes_and_reasons_are_generated() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gen-spec"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_page_of_signed_things_has_every_struct_as_it_is() -> None:
    page = (ROOT / "docs" / "spec" / "signing.md").read_text(encoding="utf-8")
    strings = re.findall(r"^(\w+\(\w+ \w+(?:,\w+ \w+)*\))$", page, re.M)
    assert strings == [struct.TYPE for struct in sorted(STRUCTS, key=lambda s: page.index(s.TYPE))]
    assert len(strings) == len(STRUCTS)
    for struct in STRUCTS:
        assert f"| `{struct.__name__}` |" in page, struct.__name__
    assert f'name: "{NAME}", version: "{VERSION}"' in page


def test_every_reason_of_a_signer_is_explained() -> None:
    page = (ROOT / "docs" / "spec" / "signing.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \| ", page.partition("## What a signer refuses")[2], re.MULTILINE))
    assert listed == {one.value for one in SigningReason}
