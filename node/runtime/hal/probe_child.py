"""The process that loads torch to see which devices there are, and ends. One line of JSON on stdout, last."""

from __future__ import annotations

import sys

import msgspec


def main() -> None:
    import torch

    from node.runtime.hal.by_torch import look

    sys.stdout.write("\n" + msgspec.json.encode(look(torch)).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
