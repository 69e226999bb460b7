"""Where things lie when nobody says: the data dir, the fence, the user's file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def default_data_dir() -> Path:
    import platformdirs

    return platformdirs.user_data_path("gristmill").absolute()


def default_fence_dir() -> Path:
    """Never under the data dir, on no platform."""
    home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(home) if home.startswith("/") else Path("~/.local/state").expanduser()) / "gristmill" / "fence"


def default_kernels_dir() -> Path:
    """Compiled kernels depend on the machine, on no data dir and no model."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home.startswith("/") else Path("~/.cache").expanduser()) / "gristmill" / "kernels"


def user_file(data_dir: Path | None, environ: Mapping[str, str]) -> Path:
    """Where the user's settings are: in the data dir when one was named, else where XDG says."""
    if data_dir is not None:
        return data_dir / "config.toml"
    home = environ.get("XDG_CONFIG_HOME", "")
    return (Path(home) if home.startswith("/") else Path("~/.config").expanduser()) / "gristmill" / "config.toml"
