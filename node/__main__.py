"""``python -m node``: the command line without the guard, for systemd units, containers and scripts."""

from __future__ import annotations

import sys

from node.cli.main import main

sys.exit(main())
