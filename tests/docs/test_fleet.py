"""The fleet's files are what Kubernetes takes and what docs/operators/fleet.md promises, and the container is not root's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from node.cli.commands import COMMANDS
from node.config import KEYS

yaml = pytest.importorskip("yaml")

FLEET = Path(__file__).resolve().parents[2] / "docs" / "operators" / "fleet"
KUBERNETES = "1.34"
NAMES = ("namespace", "settings", "worker", "service", "disruption", "network")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FLEET / f"{name}.yaml").read_text())  # type: ignore[no-any-return]


def findings(document: dict[str, Any]) -> list[str]:
    """What the official schema of this version has against a manifest; unknown fields count."""
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    try:
        validate.validate(document, KUBERNETES, strict=True)
    except (validate.ValidationError, validate.SchemaNotFoundError) as error:
        return [f"{type(error).__name__} {error}"]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_kubernetes_takes_it(name: str) -> None:
    assert findings(load(name)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicas"), "many"),
        (("spec", "template", "spec", "containers", 0, "readinesProbe"), {}),
        (("spec", "selector"), "all"),
        (("apiVersion",), "apps/v2"),
    ],
)
def test_a_mistake_would_be_found(path: tuple[Any, ...], value: Any) -> None:
    document = load("worker")
    at: Any = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    assert findings(document) != []


def test_the_list_is_complete() -> None:
    listed = load("kustomization")["resources"]
    assert sorted(listed) == sorted(f"{name}.yaml" for name in NAMES)
    assert {path.name for path in FLEET.iterdir()} == {*listed, "kustomization.yaml", "Containerfile"}


def test_settings_are_ours_and_nothing_secret_is_in_them() -> None:
    variables = {key.variable for key in KEYS.values()}
    data = load("settings")["data"]
    assert set(data) <= variables
    assert all(isinstance(value, str) for value in data.values())
    assert not [name for name in data if re.search(r"PASSWORD|SECRET|TOKEN$|API_KEY", name)]


def test_the_parts_name_each_other_and_the_pod_has_its_bounds() -> None:
    worker, labels = load("worker"), load("worker")["spec"]["selector"]["matchLabels"]
    pod = worker["spec"]["template"]
    assert pod["metadata"]["labels"] == labels
    assert load("service")["spec"]["selector"] == labels
    assert load("disruption")["spec"]["selector"]["matchLabels"] == labels
    assert load("network")["spec"]["podSelector"]["matchLabels"] == labels
    assert worker["spec"]["serviceName"] == load("service")["metadata"]["name"]
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["automountServiceAccountToken"] is False
    main = spec["containers"][0]
    assert main["resources"]["limits"]["nvidia.com/gpu"] == "1" and "memory" in main["resources"]["limits"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(main)
    drain = int(re.search(r"--drain (\d+)", main["args"][0])[1])  # type: ignore[index]
    assert spec["terminationGracePeriodSeconds"] >= drain + 30
    mounted = {mount["name"] for mount in main["volumeMounts"]}
    claims = {claim["metadata"]["name"] for claim in worker["spec"]["volumeClaimTemplates"]}
    assert mounted == claims | {volume["name"] for volume in spec["volumes"]}
    for container in (main, *spec["initContainers"]):
        locked = container["securityContext"]
        assert locked["readOnlyRootFilesystem"] and not locked["allowPrivilegeEscalation"]
        assert locked["capabilities"] == {"drop": ["ALL"]}
        assert "password" not in str(container.get("env", "")).lower()
        for words in re.findall(r"python -m node (\w+)", " ".join(container["args"])):
            assert words in COMMANDS
    assert main["startupProbe"]["exec"]["command"][:3] == ["python", "-m", "node"]


def test_the_container_is_not_roots_and_copies_what_there_is() -> None:
    parse = pytest.importorskip("dockerfile_parse", reason="dockerfile-parse is not installed")
    parser = parse.DockerfileParser(fileobj=(FLEET / "Containerfile").open("rb"))
    steps = [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]
    last = max(n for n, (what, _) in enumerate(steps) if what == "FROM")
    final = steps[last:]
    (user,) = [value for what, value in final if what == "USER"]
    assert user.split(":")[0] not in ("0", "root")
    assert not [value for what, value in final[[what for what, _ in final].index("USER") :] if what == "RUN"]
    base = next(value for what, value in steps if what == "ARG" and value.startswith("BASE="))
    assert re.fullmatch(r"BASE=docker\.io/library/python:3\.11\.\d+-slim-\w+", base)
    assert [what for what, _ in steps if what == "ADD"] == []
    root = FLEET.parents[2]
    for what, value in steps:
        if what == "COPY" and not value.startswith("--from"):
            assert [source for source in shlex.split(value)[:-1] if not (root / source).exists()] == []
    pips = [line for what, value in steps if what == "RUN" for line in value.split("&&") if "pip install" in line]
    assert pips and all("--require-hashes" in line and "--no-deps" in line for line in pips)
    variables = {key.variable for key in KEYS.values()}
    environment = next(value for what, value in final if what == "ENV")
    assert set(re.findall(r"GRISTMILL_\w+", environment)) <= variables
