"""Settings: which source wins, what is refused, and that a mistake is always told with its file and key."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node import config as module
from node.app import worker_settings
from node.chain.memory import MemoryChain, MemoryLedger
from node.chains import Chains
from node.cli.init import template
from node.client.connect import client_means
from node.config import FAMILIES, FAMILY_MAX, KEYS, Config, family_keys, find_key, find_variable, load
from node.config.consistency import CREDIT_TOKENS_MAX
from node.config.sources import MAX_FILE_BYTES
from node.errors import ConfigError
from node.settings import PARSERS, task_price_of
from node.worker.accepted import Accepted
from protocol.claiming import COIN, ClaimTerms
from protocol.ids import ZERO_ADDRESS, Address
from protocol.messages import decode_value, encode
from protocol.offers import OFFER_TTL_MAX_MS, Asset, ModelOffer, OfferDocument, Payment
from protocol.pricing import Price
from protocol.selection import PriceLimit
from protocol.tasks import Task

NAMES_OF_TOKENS = {"worker.accept", "client.pay_with"}
"""They must name what is there."""
SOURCES = ("flag", "environment", "project", "user")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """`load` in a world of its own: `world(flag={...}, environment={...}, project=TOML, user=TOML)`."""
    work, data = tmp_path / "work", tmp_path / "data"
    work.mkdir()
    data.mkdir()
    monkeypatch.chdir(work)

    def make(
        *,
        flag: dict[str, object] | None = None,
        environment: dict[str, str] | None = None,
        project: str | None = None,
        user: str | None = None,
    ) -> Config:
        for path, content in ((work / "gristmill.toml", project), (data / "config.toml", user)):
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_text(content)
        environ = {"GRISTMILL_DATA_DIR": str(data), "PATH": "/bin", **(environment or {})}
        return load(flag, environ=environ)

    return make


def reads(tree: ast.AST) -> set[str]:
    """Settings that code reads: `x.section.name`, or `given.name` after `given = x.section`; `config.name` at the top."""
    sections = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Attribute(attr=section)) if (
                section in module.SECTIONS
            ):
                sections[name] = section
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Call(func=ast.Attribute(attr="chain_named"))
            ):  # the chain of a name: `[chain]` or `[chains.NAME]`
                sections[name] = "chain"
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript(value=ast.Attribute(attr="tokens"))):
                sections[name] = "tokens.NAME"
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            match node.value:
                case ast.Attribute(attr=section) if section in module.SECTIONS:
                    found.add(f"{section}.{node.attr}")
                case ast.Name(id=name) if name in sections:
                    found.add(f"{sections[name]}.{node.attr}")
                case ast.Call(func=ast.Attribute(attr="chain_named")):
                    found.add(f"chain.{node.attr}")
                case ast.Name(id="config" | "self"):
                    found.add(node.attr)
                case ast.Attribute(attr="config"):
                    found.add(node.attr)
    return found


def test_every_setting_does_something() -> None:
    """A setting that nothing reads is a promise that nobody keeps. The properties of `Config` count as readers."""
    own = Path(module.__file__).parent
    found = set()
    for path in own.parent.rglob("*.py"):
        tree: ast.AST = ast.parse(path.read_text("utf-8"))
        if path.is_relative_to(own):
            if path != own / "config.py":
                continue
            (tree,) = [one for one in ast.walk(tree) if isinstance(one, ast.ClassDef) and one.name == "Config"]
        found |= reads(tree)
    assert sorted({*KEYS, *family_keys("tokens", "NAME")} - found) == []


def test_the_check_for_dead_settings_sees_one() -> None:
    source = (
        "def f(config):\n    given = config.client\n    return given.max_cost, config.worker.tick_ms, config.network\n"
    )
    assert reads(ast.parse(source)) & set(KEYS) == {"client.max_cost", "worker.tick_ms", "network"}


CHAINS = Chains({"default": MemoryChain(MemoryLedger(chain_id=1), Address(bytes(20)))})


def test_price_limits_reach_the_choice(world: Callable[..., Config]) -> None:
    (means,) = client_means(world(), CHAINS)
    assert means.max_price == PriceLimit() and means.max_cost == 0 and means.rate == 1
    made = world(user="[client]\nmax_price_request = 3\nmax_price_output = 7\nmax_cost = 9")
    (means,) = client_means(made, CHAINS)
    assert means.max_price == PriceLimit(request=3, output=7) and means.max_cost == 9


def test_the_amounts_of_each_token_reach_both_sides(world: Callable[..., Config]) -> None:
    """What is set for one token is used for that one and no other; an address that is not set is the deployment's."""
    native = Address(bytes(20))
    chains = Chains({"default": CHAINS.first, "two": MemoryChain(MemoryLedger(chain_id=2), native)})
    made = world(
        user=f"""
        [worker]
        accept = ["coin", "default", "theirs"]
        price_output = 5
        claim_min = 6
        claim_every_s = 60
        claim_gain_percent = 300
        claim_at_loss = true
        coin_value = 3000000000
        min_withdraw_delay_s = 901
        batch_min = 31
        batch_penalty = 32
        batch_streams = 3
        batch_jobs = 5
        batch_resolvers = ["committee", "0x0000000000000000000000000000000000000033"]
        global_credit = 7
        [client]
        pay_with = ["theirs", "coin"]
        [tokens.coin]
        address = "{native}"
        price_request = 1
        price_input = 2
        price_output = 3
        claim_min = 4
        global_credit = 8
        allocation = 9
        max_cost = 10
        max_price_input = 11
        rate = "1/1000000000000"
        [tokens.theirs]
        chain = "two"
        price_output = 12
        batch_min = 34
        batch_penalty = 35
        claim_min = 13
        coin_value = 17
        global_credit = 14
        allocation = 15
        [chains.two]
        poll_ms = 500
        """
    )
    settings = worker_settings(made, chains)
    one, two = chains.first.domain, chains.named("two").domain
    token = chains.named("two").token
    assert settings.accepts == (
        Accepted(one, native, Price(1, 2, 3), 4, 8, min_job=0),
        Accepted(one, chains.first.token, Price(0, 100_000, 5), 6, 7, 31, 32),
        Accepted(two, token, Price(0, 0, 12), 13, 14, 34, 35),
    )
    batch = settings.batch
    assert batch is not None and (batch.run.streams, batch.quotes.max_jobs) == (3, 5)
    assert batch.quotes.resolvers == {ZERO_ADDRESS, Address(bytes(19) + b"\x33")}  # this deployment has no committee
    assert settings.claims.own == {
        Asset.of(one, native): ClaimTerms(4, COIN, 300, True),  # the coin is worth itself
        Asset.of(one, chains.first.token): ClaimTerms(6, 3_000_000_000, 300, True),
        Asset.of(two, token): ClaimTerms(13, 17, 300, True),
    }
    assert settings.claims.least_delay == 901 and settings.claims.every_s == 60
    assert settings.polls_ms == {one: 200, two: 500}
    theirs, coin = client_means(made, chains)
    assert (theirs.domain, theirs.token, theirs.allocation, theirs.rate, theirs.name) == (
        two,
        token,
        15,
        None,
        "theirs",
    )
    assert (coin.domain, coin.token, coin.allocation, coin.max_cost) == (one, native, 9, 10)
    assert coin.rate == Fraction(1, 10**12) and coin.max_price == PriceLimit(input=11)


def test_an_offer_can_state_whatever_the_settings_allow(world: Callable[..., Config]) -> None:
    high = {name: key.setting.high or 0 for name, key in KEYS.items()}
    assert high["worker.offer_ttl_s"] * 1000 == OFFER_TTL_MAX_MS
    model = ModelOffer(model_id=bytes(32), name="m", prices=(Price(),), context_length=1, max_tokens=1, dtype="f")
    document = OfferDocument(
        peer_id="x",
        addresses=(),
        accepts=(Payment(1, bytes(20), bytes(20), high["worker.min_withdraw_delay_s"]),),
        models=(model,),
        issued=0,
        expires=1,
        tick_tokens=high["worker.tick_tokens"],
        tick_ms=high["worker.tick_ms"],
        credit_tokens=CREDIT_TOKENS_MAX,
        free_slots=high["worker.max_streams"],
    )
    assert decode_value(OfferDocument, encode(document)) == document
    with pytest.raises(ConfigError, match=r"worker\.credit_ticks \(flag\) times worker\.tick_tokens .* is 65550"):
        world(flag={"worker.credit_ticks": 2 * 437, "worker.tick_tokens": 75})


def other_value(name: str, salt: int) -> Any:
    """A valid value of a setting, different for each salt."""
    key = KEYS[name]
    special = {
        "network": f"net{salt}",
        "chain.rpc_urls": (f"http://127.0.0.1:{1000 + salt}",),
        "p2p.listen": (f"/ip4/127.0.0.1/tcp/{salt + 1}",),
        "p2p.bootstrap": (f"/ip4/127.0.0.1/tcp/{salt + 1}/p2p/x",),
        "worker.payout": f"0x{salt + 1:040x}",
        "worker.batch_resolvers": (f"0x{salt + 1:040x}", "committee"),
        "worker.task_prices": (f"embed={salt}/1/2", "transcribe=0/3/4"),
        "engine.device": f"cuda:{salt}",
        "engine.draft_models": (f"large{salt}=small",),
        "telemetry.metrics": f"127.0.0.1:{9000 + salt}",
        "engine.backend": ("torch", "openai", "transformers", "ray")[salt],
        "openai.url": f"http://127.0.0.1:{8000 + salt}",
        "openai.kind": ("vllm", "sglang", "llamacpp", "other")[salt],
        "ray.address": f"10.0.0.{salt}:6379",
        "engine.dtype": ("float32", "bfloat16", "float16", "float32")[salt],
        "engine.isolation": ("auto", "bwrap", "process", "thread")[salt],
        "keys.signer": ("process", "inline", "process", "inline")[salt],
        "keys.scrypt_n": 1 << (12 + salt),
    }
    if name in special:
        return special[name]
    if key.kind.startswith("Path"):
        return Path(f"/somewhere/{salt}")
    if key.kind == "bool":
        return bool(salt % 2)
    if key.kind == "int":
        return (key.setting.low or 0) + salt
    return (f"text{salt}",) if key.kind.startswith("tuple") else f"text{salt}"


@pytest.mark.parametrize(
    "bad",
    [
        "embed",
        "embed=1/2",
        "embed=1/2/3/4",
        "embed=-1/0/0",
        "embed=a/0/0",
        "paint=1/2/3",
        "chat=1/2/3",
        f"ocr=0/0/{2**63}",
    ],
)
def test_a_price_of_a_task_is_three_amounts(world: Callable[..., Config], bad: str) -> None:
    with pytest.raises(ConfigError, match=r"task_prices must be like transcribe="):
        world(flag={"worker.task_prices": [bad]})
    made = world(flag={"worker.task_prices": ["embed=1/2/3", f"ocr=0/0/{2**63 - 1}"]})
    prices = dict(map(task_price_of, made.worker.task_prices))
    assert prices == {Task.EMBED: Price(1, 2, 3), Task.OCR: Price(0, 0, 2**63 - 1)}


def as_toml(name: str, value: Any) -> str:
    section, _, last = name.rpartition(".")
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return (f"[{section}]\n" if section else "") + f"{last} = {json.dumps(plain)}\n"


def as_text(value: Any) -> str:
    return (
        ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )


@pytest.mark.parametrize("name", [name for name in KEYS if name not in {"data_dir", *NAMES_OF_TOKENS}])
@given(present=st.sets(st.sampled_from(SOURCES)))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_first_source_wins(world: Callable[..., Config], name: str, present: set[str]) -> None:
    """Precedence, for every setting and every set of sources that have it; the origin says who won."""
    values = {source: other_value(name, salt) for salt, source in enumerate(SOURCES)}
    made = world(
        flag={name: as_text(values["flag"])} if "flag" in present else None,
        environment={KEYS[name].variable: as_text(values["environment"])} if "environment" in present else None,
        project=as_toml(name, values["project"]) if "project" in present else None,
        user=as_toml(name, values["user"]) if "user" in present else None,
    )
    winner = next((source for source in SOURCES if source in present), None)
    assert made.get(name) == (KEYS[name].default if winner is None else values[winner])
    ends = {"flag": "flag", "environment": KEYS[name].variable, "project": "gristmill.toml", "user": "config.toml"}
    assert made.origins[name].endswith(ends[winner] if winner else "default")


@pytest.mark.parametrize("key", [*KEYS.values(), *family_keys("tokens", "NAME").values()], ids=lambda key: key.name)
def test_every_setting_is_described(key: module.Key) -> None:
    assert key.setting.doc.endswith(".") and key.kind in PARSERS
    if key.kind == "int":
        assert key.setting.low is not None and key.setting.high is not None
        assert key.setting.low <= key.default <= key.setting.high
        assert key.setting.unit or key.name == "keys.scrypt_n"


@pytest.mark.parametrize("key", [key for key in KEYS.values() if key.kind == "int"], ids=lambda key: key.name)
def test_bounds_hold_on_both_sides(world: Callable[..., Config], key: module.Key) -> None:
    low, high = key.setting.low, key.setting.high
    assert low is not None and high is not None
    for good in (low, high):
        assert world(flag={key.name: good}).get(key.name) == good
    for bad in (low - 1, high + 1, True, 1.5, "", "1e3", "0x10", "\u0661", "9" * 5000):
        with pytest.raises(ConfigError, match=key.name):
            world(flag={key.name: bad})


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("worker = 3", "worker is a section"),
        ("[worker]\ntick_tokns = 3", "unknown key 'worker.tick_tokns'"),
        ("[wroker]\ntick_tokens = 3", "unknown key 'wroker'"),
        ("tick_tokens = 3", "unknown key 'tick_tokens'"),
        ("[worker]\ntick_tokens = '64 tokens'", "worker.tick_tokens must be a whole number"),
        ("[worker]\ntick_tokens = 0", "worker.tick_tokens must be 1 to 65536, not 0"),
        ("[worker]\npayout = '0x1234'", "worker.payout not an address"),
        ("[chain]\nrpc_urls = 'ftp://x'", "must be an http:// or https:// address"),
        ("[chain]\nrpc_urls = ['http://x', 3]", "chain.rpc_urls must be text"),
        ("[p2p]\nlisten = ['localhost:4001']", "p2p.listen must be a multiaddr"),
        ("[p2p]\ngossip = 'perhaps'", "p2p.gossip must be true or false"),
        ("[engine]\ndevice = 'tpu'", "engine.device must be auto, cpu, mps, or cuda, rocm or xpu with or without :N"),
        ("[keys]\nscrypt_n = 5000", "keys.scrypt_n must be a power of two"),
        ("[worker", "is not valid TOML"),
        ("network = 'a'\nnetwork = 'b'", "is not valid TOML"),
        ("x = " + "[" * 100_000, "is not valid TOML"),
        ("chains = 3", "chains is a section"),
        ("[chains]\nrpc_urls = ['http://x']", "chains.rpc_urls is a section"),
        ("[chains.Base]\npoll_ms = 5", "chains.Base cannot be called that"),
        ("[chains.default]\npoll_ms = 5", "chains.default cannot be called that"),
        ("[chains.base]\npolls_ms = 5", "unknown key 'chains.base.polls_ms'"),
        ("[chains.base]\npoll_ms = 4", "chains.base.poll_ms must be 5 to 60000, not 4"),
        ("[tokens.usdc]\naddress = '0x12'", "tokens.usdc.address not an address"),
        ("[tokens.usdc]\nrate = '0'", "tokens.usdc.rate must be a decimal number or a fraction above 0"),
        ("[tokens.usdc]\nrate = '1/0'", "tokens.usdc.rate must be a decimal number or a fraction above 0"),
        ("[tokens.usdc]\nrate = '1e9'", "tokens.usdc.rate must be a decimal number or a fraction above 0"),
        ("[tokens.usdc]\nchain = 'base'", "tokens.usdc.chain: no chain is called 'base'"),
        ("[worker]\naccept = ['usdc']", "worker.accept: no token is called 'usdc'"),
        ("[client]\npay_with = ['default', 'default']", "client.pay_with names at least one token, and each one once"),
        ("[worker]\naccept = []", "worker.accept names at least one token"),
        ("network = 'a\u0000b'", "is not valid TOML"),
    ],
)
def test_a_mistake_in_a_file_names_file_and_key(world: Callable[..., Config], toml: str, says: str) -> None:
    for where, name in (("project", "gristmill.toml"), ("user", "config.toml")):
        with pytest.raises(ConfigError) as caught:
            world(**{where: toml})
        assert name in caught.value.message and says in caught.value.message
        assert len(caught.value.message) < 500


def test_a_near_miss_is_suggested(world: Callable[..., Config]) -> None:
    for attempt, near in (
        ({"project": "[worker]\ntick_tokns = 3"}, "worker.tick_tokens"),
        ({"project": "tick_tokens = 3"}, "worker.tick_tokens"),
        ({"project": "[wroker]\ntick_ms = 30"}, "worker"),
        ({"environment": {"GRISTMILL_WORKER_TICK_TOKENZ": "3"}}, "GRISTMILL_WORKER_TICK_TOKENS"),
        ({"flag": {"client.allocaton": 3}}, "client.allocation"),
    ):
        with pytest.raises(ConfigError) as caught:
            world(**attempt)  # type: ignore[arg-type]
        assert caught.value.hint == f"did you mean {near}?"
        assert caught.value.exit_status == 3


def test_a_family_of_tables(world: Callable[..., Config]) -> None:
    """Every key of the user's own tables is a setting like any other: sources, bounds, origin, variable."""
    made = world(
        user="[chains.base]\nrpc_urls = ['http://base']\npoll_ms = 7\n[tokens.usdc]\nchain = 'base'\nrate = '0.5'",
        project="[chains.base]\npoll_ms = 8\n[chains.arb]\nconfirmations = 3\ndeployment = 'arb.json'",
        environment={"GRISTMILL_CHAINS_BASE_CONFIRMATIONS": "2"},
        flag={"chains.base.tx_timeout_s": "9"},
    )
    base = made.chain_named("base")
    assert (base.rpc_urls, base.poll_ms, base.confirmations, base.tx_timeout_s) == (("http://base",), 8, 2, 9)
    assert made.chain_names == ("default", "arb", "base") and made.chain_named("default") is made.chain
    assert made.get("chains.arb.confirmations") == 3 and made.get("tokens.usdc.rate") == "0.5"
    assert made.chains["arb"].deployment is not None and made.chains["arb"].deployment.is_absolute()
    origins = {name: made.origins[f"chains.base.{name}"] for name in ("rpc_urls", "poll_ms", "confirmations")}
    assert origins["rpc_urls"].endswith("config.toml") and origins["poll_ms"].endswith("gristmill.toml")
    assert origins["confirmations"] == "environment GRISTMILL_CHAINS_BASE_CONFIRMATIONS"
    assert made.origins["chains.base.deployment"] == "default" and made.origins["tokens.usdc.address"] == "default"
    own = {key.name for key in made.keys_in_use()} - set(KEYS)
    assert own == {*family_keys("chains", "base"), *family_keys("chains", "arb"), *family_keys("tokens", "usdc")}
    assert {name for name in own if made.get(name) is not None} | {"chains.base.deployment"} == own
    with pytest.raises(ConfigError, match="no chain is called 'other'"):
        made.chain_named("other")
    with pytest.raises(TypeError):
        made.chains["new"] = base  # type: ignore[index]


def test_what_init_was_given_comes_back_out_of_its_file(world: Callable[..., Config]) -> None:
    given = {
        "chains.two.rpc_urls": "http://two,http://deux",
        "chains.two.poll_ms": "7",
        "chains.one1.confirmations": "3",
        "tokens.usd2.chain": "two",
        "tokens.usd2.rate": "1/3",
        "worker.tick_ms": "30",
    }
    made = world(flag=given)
    again = world(user=template(made))
    assert (again.chains, again.tokens, again.worker) == (made.chains, made.tokens, made.worker)
    assert (
        again.origins["tokens.usd2.rate"].endswith("config.toml") and again.origins["tokens.usd2.address"] == "default"
    )


def test_every_variable_of_a_family_has_one_meaning() -> None:
    for family in FAMILIES:
        for key in family_keys(family, "a1").values():
            assert find_variable(key.variable) == key == find_key(key.name)
    for stray in (
        "GRISTMILL_CHAINS_BASE",
        "GRISTMILL_CHAINS__POLL_MS",
        "GRISTMILL_CHAINS_BASE_polls",
        "GRISTMILL_CHAINSX",
    ):
        assert find_variable(stray) is None
    assert not {key.variable for key in KEYS.values()} & {key.variable for key in family_keys("chains", "x").values()}


def test_tables_of_a_family_are_bounded(world: Callable[..., Config]) -> None:
    def many(count: int) -> str:
        return "".join(f"[tokens.t{n}]\nallocation = 1\n" for n in range(count))

    assert len(world(user=many(FAMILY_MAX)).tokens) == FAMILY_MAX
    with pytest.raises(ConfigError, match=r"16 tables \[tokens.NAME\], at most 15"):
        world(user=many(FAMILY_MAX + 1))


def test_a_token_in_use_has_its_amounts(world: Callable[..., Config]) -> None:
    """No amount has a default in a token whose unit we do not know: a free worker or an open credit would be the price."""
    accepted = {"price_output": "5", "global_credit": "7", "claim_min": "3"}

    def toml(given: dict[str, str], user: str) -> str:
        return f"{user} = ['usdc']\n[tokens.usdc]\n" + "".join(f"{key} = {value}\n" for key, value in given.items())

    made = world(user=toml(accepted, "worker.accept"))
    assert made.worker.accept == ("usdc",) and made.tokens["usdc"].global_credit == 7
    for key in accepted:
        given = {name: value for name, value in accepted.items() if name != key}
        with pytest.raises(ConfigError, match=rf"tokens\.usdc\.{key} is not set, and worker\.accept names the token"):
            world(user=toml(given, "worker.accept"))
    with pytest.raises(ConfigError, match=r"tokens\.usdc\.allocation is not set, and client\.pay_with"):
        world(user=toml(accepted, "client.pay_with"))
    assert world(user=toml({"allocation": "1"}, "client.pay_with")).client.pay_with == ("usdc",)


def test_variables_that_are_no_settings_are_left_alone(world: Callable[..., Config]) -> None:
    assert world(environment={name: "1" for name in module.NOT_SETTINGS - {"GRISTMILL_CONFIG"}}).network == "devnet"
    assert world(environment={"GRISTMILL_SOMETHING_OF_YOURS": "1"}).network == "devnet"


def test_an_rpc_address_is_never_repeated(world: Callable[..., Config]) -> None:
    """It often carries an API key."""
    with pytest.raises(ConfigError) as caught:
        world(flag={"chain.rpc_urls": "htps://rpc.example/v2/SECRETKEY"})
    assert "SECRETKEY" not in str(caught.value) + caught.value.hint


def test_relative_paths_start_at_their_file(world: Callable[..., Config], tmp_path: Path) -> None:
    line = "[chain]\ndeployment = 'here/deployment.json'"
    assert world(project=line).chain.deployment == tmp_path / "work/here/deployment.json"
    assert world(user=line).chain.deployment == tmp_path / "data/here/deployment.json"
    assert world(flag={"chain.deployment": "here/d.json"}).chain.deployment == tmp_path / "work/here/d.json"


def test_the_data_dir_moves_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    home = {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    (tmp_path / "xdg/gristmill").mkdir(parents=True)
    (tmp_path / "xdg/gristmill/config.toml").write_text("network = 'fromxdg'")
    made = load(environ=home)
    assert made.network == "fromxdg" and made.data_dir == tmp_path / "share/gristmill"
    moved = load({"data_dir": "moved"}, environ=home)
    assert moved.network == "devnet"
    assert moved.user_file == tmp_path / "moved/config.toml"
    for path in (moved.keys_dir, moved.models_dir, moved.devnet_state, moved.journal("worker")):
        assert path.is_relative_to(tmp_path / "moved")


def test_the_fence_stays_behind_when_the_data_dir_moves(
    world: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert world().fence("client", "0xAB") == tmp_path / "state/gristmill/fence/client-0xab.json"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert world().fence("worker", "0xAb") == Path.home() / ".local/state/gristmill/fence/worker-0xab.json"
    for inside in (tmp_path / "data", tmp_path / "data/fence"):
        with pytest.raises(ConfigError, match="lies in the data dir"):
            world(user=f"fence_dir = '{inside}'")
    assert world(user=f"fence_dir = '{tmp_path}/fence'").fence("worker", "0x1").parent == tmp_path / "fence"


def test_a_running_devnet_fills_the_chain_and_nothing_else(world: Callable[..., Config], tmp_path: Path) -> None:
    state = tmp_path / "data/devnet/state.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"url": "http://127.0.0.1:8545", "deployment": "deployment.json", "pid": 1}))
    made = world()
    assert made.chain.rpc_urls == ("http://127.0.0.1:8545",)
    assert made.chain.deployment == state.parent / "deployment.json"
    assert made.origins["chain.rpc_urls"] == str(state)
    assert world(user="[chain]\nrpc_urls = ['http://mine']").chain.rpc_urls == ("http://mine",)
    assert world(flag={"network": "elsewhere"}).chain.rpc_urls == ()
    for damaged in ("", "[]", "{}", '{"url": 3, "deployment": ""}', "[" * 100_000):
        state.write_text(damaged)
        with pytest.raises(ConfigError, match=r"state\.json"):
            world()


def test_a_file_that_others_can_write_is_refused(world: Callable[..., Config], tmp_path: Path) -> None:
    world(project="network = 'mine'")
    (tmp_path / "work/gristmill.toml").chmod(0o666)
    with pytest.raises(ConfigError, match="another user"):
        load(environ={"GRISTMILL_DATA_DIR": str(tmp_path / "data")})


def test_a_named_file_must_exist_and_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"GRISTMILL_DATA_DIR": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"missing\.toml does not exist"):
        load(environ=environ, project=tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="not a file"):
        load(environ=environ, project=tmp_path)
    (tmp_path / "big.toml").write_text("#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="more than"):
        load(environ={**environ, "GRISTMILL_CONFIG": str(tmp_path / "big.toml")})
    (tmp_path / "latin.toml").write_bytes(b"network = 'caf\xe9'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(environ=environ, project=tmp_path / "latin.toml")


def test_an_empty_data_dir_is_refused(world: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="data_dir must be a path"):
        world(environment={"GRISTMILL_DATA_DIR": ""})


def test_a_config_cannot_be_changed(world: Callable[..., Config]) -> None:
    made = world()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.worker.tick_tokens = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        made.origins["network"] = "me"  # type: ignore[index]


@given(raw=st.text() | st.integers() | st.booleans() | st.none() | st.lists(st.text(max_size=5)) | st.floats())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_is_taken_or_refused_with_its_key(world: Callable[..., Config], raw: object) -> None:
    for name in ("worker.tick_tokens", "p2p.listen", "worker.payout", "p2p.gossip", "chain.deployment", "network"):
        try:
            world(flag={name: raw})
        except ConfigError as error:
            assert name in error.message and len(error.message) < 300
