"""Invariants H3, H4 and S1: constructs that product code never contains, found in the syntax tree and not by grep."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = sorted(path for package in ("node", "protocol") for path in (ROOT / package).rglob("*.py"))
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {("torch", "load"), ("os", "system"), ("os", "popen"), ("numpy", "load"), ("np", "load"), ("torch", "hub")}
NESTED = {("jit", "load"), ("package", "PackageImporter"), ("ops", "load_library"), ("utils", "cpp_extension")}
"""Of torch: what loads code with a model."""
RAW = {"sign_der", "sign_recoverable"}
"""Signatures over bytes that the caller chose."""
SIGNS = {"node/signer/core.py": {"sign_der"}, "protocol/keys.py": {"sign", "sign_der", "sign_recoverable"}}
"""Where they may be made: by the key itself, and by the signer of what its policy has judged."""


def findings(source: str) -> list[str]:
    """What must not be in this source, by name."""
    found = []
    for one in ast.walk(ast.parse(source)):
        match one:
            case ast.Assert():
                found.append("assert")
            case ast.Import():
                found += [alias.name for alias in one.names if alias.name.split(".")[0] in MODULES]
            case ast.ImportFrom() if (one.module or "").split(".")[0] in MODULES:
                found.append(str(one.module))
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                found.append(name)
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in METHODS:
                found.append(f"{module}.{name}")
            case ast.Attribute(value=ast.Attribute(attr=module), attr=name) if (module, name) in NESTED:
                found.append(f"{module}.{name}")
            case ast.keyword(arg="shell" | "trust_remote_code", value=ast.Constant(value=True)):
                found.append(f"{one.arg}=True")
            case ast.keyword(arg="weights_only", value=ast.Constant(value=False)):
                found.append("weights_only=False")
    return found


def blind_signatures(source: str) -> list[str]:
    """Signatures over anything but the digest of a typed value (S1). A signer's own `sign(struct, domain)` has two arguments."""
    found = []
    for one in ast.walk(ast.parse(source)):
        match one:
            case ast.Call(func=ast.Attribute(attr=name)) if name in RAW:
                found.append(name)
            case ast.Call(func=ast.Attribute(attr="sign"), args=[what], keywords=_):
                match what:
                    case ast.Call(func=ast.Attribute(attr="digest")) | ast.Attribute(attr="digest"):
                        continue
                found.append("sign")
    return found


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_product_code_signs_only_digests_of_typed_values(path: Path) -> None:
    """S1."""
    name = str(path.relative_to(ROOT))
    if not name.startswith("node/testing/"):  # cheats sign what they like
        assert set(blind_signatures(path.read_text())) <= SIGNS.get(name, set())


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("key.sign(data)", ["sign"]),
        ("key.sign(keccak256(data))", ["sign"]),
        ("key.sign(question.hash)", ["sign"]),
        ("key.sign_der(data)", ["sign_der"]),
        ("secret.sign(data, hasher=None)", ["sign"]),
        ("key.sign(offer.digest(MARKET_DOMAIN))", []),
        ("key.sign(request.digest)", []),
        ("await signer.sign(receipt, domain)", []),
    ],
)
def test_each_blind_signature_would_be_found(planted: str, found: list[str]) -> None:
    assert blind_signatures(planted) == found


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_product_code_is_free_of_it(path: Path) -> None:
    assert findings(path.read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "assert x",
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "torch.load(path)",
        "run(x, shell=True)",
        "f(trust_remote_code=True)",
        "load(p, weights_only=False)",
        "os.system('x')",
        "torch.jit.load(folder / 'model.pt')",
        "torch.ops.load_library(path)",
        "torch.package.PackageImporter(path)",
    ],
)
def test_each_would_be_found(planted: str) -> None:
    assert findings(planted) != []
