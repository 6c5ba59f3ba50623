"""No password of a configuration is kept, sent or shown, whatever it looks like and wherever it stands."""

import json
import random
import re
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.cli import program
from aquilamoe.config import passwords
from aquilamoe.config.messages import UserError
from aquilamoe.config.passwords import MASK, encoded, masked, without_passwords
from aquilamoe.pipeline.fingerprint import fingerprint, recipe
from aquilamoe.pipeline.remote import Remote
from aquilamoe.tracking import connection
from aquilamoe.tracking.queries import comparison_url, ui_command
from aquilamoe.tracking.sync_state import SyncState

pytestmark = pytest.mark.process

Place = Callable[[str], dict[str, Any]]
# Where a password may stand, and which characters end it there.
PLACES: dict[str, tuple[Place, str]] = {
    "tracking.uri": (lambda p: {"tracking": {"uri": f"http://reader:{p}@mlflow.example:5000"}}, ""),
    "a database": (lambda p: {"tracking": {"uri": f"postgresql+psycopg2://reader:{p}@db.example/mlflow"}}, ""),
    "a user name alone": (lambda p: {"tracking": {"uri": f"https://{p}@mlflow.example"}}, ":/?#@"),
    "a user name without password": (lambda p: {"tracking": {"uri": f"https://{p}:@mlflow.example"}}, ":/?#@"),
    "a query": (lambda p: {"paths": {"remote": f"s3://bucket/a?scheme=http&secret_key={p}&region=x"}}, "&;"),
    "a query in capitals": (
        lambda p: {"data": {"sources": {"en": {"path": f"https://host/a?X-Auth-Token={p}"}}}},
        "&;",
    ),
    "a source": (lambda p: {"data": {"sources": {"en": {"path": f"s3://reader:{p}@bucket/en.jsonl"}}}}, ""),
    "a package": (lambda p: {"cluster": {"runtime_env": {"pip": [f"git+https://me:{p}@git.example/a"]}}}, ""),
    "env_vars": (lambda p: {"cluster": {"runtime_env": {"env_vars": {"WHATEVER": p}}}}, ""),
    "runtime_env": (lambda p: {"cluster": {"runtime_env": {"container": {"registry_password": p}}}}, ""),
    "a list": (lambda p: {"other": {"api_keys_and_secrets": ["x", {"deep": 1, "HF_TOKEN": p}]}}, ""),
}
DRAW = random.Random(5)
TEXTS = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FFF, categories=("L", "N", "P", "S")), min_size=6)


@pytest.fixture(autouse=True)
def _forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "_known", {})


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(password=TEXTS | st.text(string.printable.strip() + " ", min_size=6).map(str.strip))
def test_a_password_is_masked_in_a_configuration_and_in_every_message(place: str, password: str) -> None:
    build, ends = PLACES[place]
    password = re.sub(rf"[{re.escape(ends)}*]", "x", password) if ends else password.replace("*", "x")
    if len(password) < 6 or "://" in password or password in str(build("")) or re.fullmatch(r"[\d.]+|/.*", password):
        return
    passwords._known.clear()
    values = build(password)
    assert password not in leaves(masked(values)) and MASK in leaves(masked(values))
    assert fingerprint(recipe("corpus", 1, masked(values), {})) == fingerprint(
        recipe("corpus", 1, masked(build("another-one")), {})
    )
    passwords.learn(values)
    for written in (password, quote(password, safe=""), json.dumps(password)[1:-1], repr(password)[1:-1]):
        assert written not in without_passwords(f"HTTPConnectionPool(host={written!s}, {leaves(values)}): refused")
    assert password not in str(UserError(f"it is {password}; correct it"))


def leaves(values: Any) -> str:
    """All strings of a configuration, as they are."""
    if isinstance(values, dict):
        return " ".join(map(leaves, values.values()))
    return " ".join(map(leaves, values)) if isinstance(values, list) else str(values)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/me@work/a:b@c/mlflow.db",
        "postgresql://me@host/db",
        "ssh://git@host/x",
        "s3://bucket/data@v2/key=abc/en.jsonl?endpoint_override=host:9000&scheme=http",
        "https://huggingface.co/org/model@main",
        "/data/token=abc/en@v1?.jsonl",
        "package://data/embedded/en.parquet",
        "a secret=recipe and key=value; password",
        comparison_url("http://host:5000", "1"),  # its view is called viewStateShareKey
    ],
)
def test_what_is_no_password_stays(text: str) -> None:
    assert masked({"path": text}) == {"path": text}
    assert without_passwords(text) == text


def test_columns_of_a_corpus_are_no_passwords() -> None:
    one, other = ({"sources": {"en": {"filters": {"columns": {"token": [value]}}}}} for value in ("a", "b"))
    assert fingerprint(recipe("corpus", 1, one, {})) != fingerprint(recipe("corpus", 1, other, {}))


def test_a_login_reaches_libraries_whole_and_is_not_encoded_twice() -> None:
    from urllib.parse import unquote, urlsplit

    url = encoded("http://me:p/a'ss@[w%rd?#@host:5000/x")
    parts = urlsplit(url)
    assert (parts.username, unquote(parts.password or ""), parts.hostname) == ("me", "p/a'ss@[w%rd?#", "host")
    assert encoded(url) == url and encoded("http://host:5000/a") == "http://host:5000/a"


def test_no_line_about_tracking_has_the_password(tmp_path: Path) -> None:
    uri = connection.tracking_uri("http://me:pa/ss'wo@rd@server:5000/x", tmp_path)
    receipt = SyncState(tmp_path, "a", uri)
    receipt.update(x=1)
    texts = [connection.shown(uri), ui_command(uri, tmp_path), comparison_url(uri, "1"), receipt.path.read_text()]
    assert not [line for line in texts if "ss'wo" in line or "ss%27wo" in line]
    assert texts[:2] == ["server http://server:5000/x", "http://me:***@server:5000/x"]
    assert connection.is_reachable("http://me:x@[server") is False
    for address in ("s3://a:b@bucket", "s3://bucket?access_key=a&secret_key=b", "s3://bucket?password=b", "s3://[x@y"):
        with pytest.raises(UserError, match="holds a key; leave it out"):
            Remote(address)


@pytest.fixture
def run(tiny: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """The program in this process, as a user calls it, up to its first stage."""
    monkeypatch.chdir(tmp_path)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))

    def called(*words: str) -> object:
        monkeypatch.setattr(sys, "argv", ["efficientscale", *tiny, "until=corpus", *words])
        try:
            program.main()
        except SystemExit as ended:
            print(ended.code, file=sys.stderr)
            return ended.code
        return 0

    return called


def drawn(length: int = 12, also: str = "'!%^()+~.,-_=") -> str:
    """A password that no other text has by chance."""
    return "Z" + "".join(DRAW.choices(string.ascii_letters + string.digits + also, k=length)) + "Z"


def as_hydra_reads(text: str) -> str:
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", text) + "'"


def test_no_file_of_a_run_and_no_line_of_it_has_a_password(
    run: Callable[..., Any], tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The source is read under an address with a password, as the folder of a file may be called."""
    text = next(word for word in tiny if word.startswith("data.sources.en.path=")).partition("=")[2]
    fingerprints = set()
    for number in range(2):
        secrets = {name: drawn() for name in ("source", "uri", "variable", "token")}
        folder = tmp_path / "s3:" / f"me:{secrets['source']}@bucket"
        folder.mkdir(parents=True)
        (folder / "en.jsonl").write_bytes(Path(text).read_bytes())
        uri = f"http://reader:{secrets['uri']}/x@127.0.0.1:9" if number else "sqlite:///runs/mlflow.db"
        status = run(
            "data.sources.en.path=" + f"s3://me:{secrets['source']}@bucket/en.jsonl",
            f"tracking.uri={uri}",
            "cluster.address=127.0.0.1:9",
            f"+cluster.runtime_env.env_vars.WHATEVER={as_hydra_reads(secrets['variable'])}",
            f"+cluster.runtime_env.container.token={as_hydra_reads(secrets['token'])}",
            "paths.root=runs",
        )
        shown = "".join(capfd.readouterr())
        assert status == 0, shown
        kept = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
        assert len(kept) > 5
        for secret in secrets.values():
            for form in passwords._forms(secret):
                assert form not in shown
                assert [path for path, content in kept.items() if form.encode() in content] == []
        (record,) = [
            json.loads(content)
            for path, content in kept.items()
            if path.name == "record.json" and "corpus-" in str(path)
        ]
        fingerprints.add(record["fingerprint"])
        assert record["recipe"]["config"]["sources"]["en"]["path"] == f"s3://me:{MASK}@bucket/en.jsonl"
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["tracking.uri=ftp://me:{}@host"],
        ["tracking.enabled=http://me:{}@host"],
        ["+tracking.url=http://me:{}@host"],
        ["cluster.workers=http://me:{}@host"],
        ["+cluster.runtime_env.env_vars.A_TOKEN={}"],
        ["+cluster.runtime_env={{env_vars: {{A_TOKEN: {}}}}}"],
        ["paths.remote=s3://me:{}@bucket"],
        ["paths.remote=s3://bucket?secret_key={}"],
        ["data.sources.en.path=https://me:{}@host/en.jsonl"],
        ["data.sources.en.path=https://me:{}'x@host/en.jsonl"],
    ],
    ids=" ".join,
)
def test_no_refusal_has_a_password(
    run: Callable[..., Any], capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    secret = drawn(also="")
    status = run(*(word.format(secret) for word in words))
    shown = "".join(capfd.readouterr())
    assert status != 0 and "Traceback" not in shown
    assert secret not in shown
