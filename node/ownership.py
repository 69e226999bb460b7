"""The import names `node` and `protocol` must be ours alone.

PyPI has a distribution `node` and a distribution `protocol`. Installed beside ours, pip says nothing and the folders merge: one
package's modules overwrite the other's. That is found here and refused, before anything of it runs.
"""

from __future__ import annotations

from importlib import metadata

from node.errors import ConfigError

PACKAGES = ("node", "protocol")


def owners() -> dict[str, tuple[str, ...]]:
    """Every distribution that installs files under our import names (a fifth of a second: it reads all of them)."""
    found = metadata.packages_distributions()
    return {name: tuple(sorted(set(found.get(name, ())))) for name in PACKAGES}


def strangers(*, thorough: bool = False) -> list[str]:
    """Distributions other than ours under our names. Quick: only those that are called as our packages are."""
    if thorough:
        return sorted({owner for group in owners().values() for owner in group if owner.lower() != "gristmill"})
    return [name for name in PACKAGES if any(True for _ in metadata.distributions(name=name))]


def check_owners(*, thorough: bool = False) -> None:
    """Raise ConfigError when another distribution shares our import names."""
    found = strangers(thorough=thorough)
    if found:
        names = " and ".join(found)
        raise ConfigError(
            f"the installed distribution {names} shares an import name with gristmill, and their files are mixed",
            hint=f"pip uninstall {' '.join(found)}; pip install --force-reinstall gristmill (best in an environment of its own)",
        )
