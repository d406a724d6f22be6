"""Settings: one tree from a file and the environment, and a clear word on everything that is wrong with them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from agent.errors import ConfigurationError
from agent.settings import AgentSettings, Settings, variables
from agent.settings.example import example

EXAMPLE = Path(__file__).parents[2] / "config" / "agent.example.toml"
SECRETS = [name for name in variables() if name.endswith(("_TOKEN", "_SECRET", "_PASSWORD", "_USERNAME"))]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def write(text: str, path: Path = Path("agent.toml")) -> Path:
    path.write_text(text)
    return path


def problem(file: Path | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(file)
    assert caught.value.__cause__ is None
    return str(caught.value)


def public_key(key: Any = None) -> str:
    private = key or rsa.generate_private_key(65537, 2048)
    pem: bytes = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def test_the_example_is_what_the_tree_says() -> None:
    assert EXAMPLE.read_text() == example(), "run python -m agent.settings > config/agent.example.toml"


def test_the_example_sets_nothing_and_shows_every_default() -> None:
    text = example()
    assert {name: table for name, table in tomllib.loads(text).items() if table} == {}
    defaults = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())
    shown = tomllib.loads(defaults)
    for name, (_, default) in variables().items():
        group, _, key = name.lower().partition("_")
        if default is not None:
            value = shown[group][key]
            expected = str(default) if isinstance(default, Path) else default
            assert (tuple(value) if isinstance(value, list) else value) == expected


def test_every_setting_is_described() -> None:
    assert all(len(description) > 10 for description, _ in variables().values())


def test_nothing_set_means_the_defaults() -> None:
    settings = Settings.load()
    assert settings.agent.port == 8080
    assert settings.ovation.organizations == (0,)
    assert settings.ovation.hosts == ("*.ovation.io",)
    assert not settings.agent.webhooks_are_guarded


@pytest.mark.parametrize("how", ["working directory", "AGENT_CONFIG", "--config"])
def test_the_file_is_found(how: str, environment: Callable[..., None], here: Path) -> None:
    if how == "working directory":
        write("[agent]\nport = 1\n")
        assert Settings.load().agent.port == 1
        return
    elsewhere = write("[agent]\nport = 2\n", here / "elsewhere.toml")
    write("[agent]\nport = 1\n")
    if how == "AGENT_CONFIG":
        environment(AGENT_CONFIG=str(elsewhere))
        assert Settings.load().agent.port == 2
    else:
        environment(AGENT_CONFIG="missing.toml")
        assert Settings.load(elsewhere).agent.port == 2


def test_the_environment_wins_key_by_key(environment: Callable[..., None]) -> None:
    write('[agent]\nport = 1\nhost = "0.0.0.0"\n[ovation]\norganizations = [3, 4]\n')
    environment(AGENT_PORT="2", OVATION_ORGANIZATIONS=" 5, 6 ,")
    settings = Settings.load()
    assert (settings.agent.port, settings.agent.host) == (2, "0.0.0.0")  # noqa: S104 a value, not a socket
    assert settings.ovation.organizations == (5, 6)


@pytest.mark.parametrize("name", sorted(variables()))
def test_a_variable_that_is_set_to_nothing_counts_as_unset(name: str, environment: Callable[..., None]) -> None:
    environment(**{name: ""})
    assert Settings.load() == Settings()


@pytest.mark.parametrize("name", sorted(variables()))
def test_the_file_takes_no_empty_text(name: str) -> None:
    group, _, key = name.lower().partition("_")
    write(f'[{group}]\n{key} = ""\n')
    message = problem() if name not in {"OVATION_HOSTS", "AGENT_REMOTE_HOSTS", "AGENT_SLURM_ARGUMENTS"} else None
    assert message is None or f"agent.toml: [{group}] {key}: " in message


def test_lists_come_from_both(environment: Callable[..., None]) -> None:
    write('[ovation]\nhosts = ["a.example.org", "https://b.example.org:8443"]\n[agent]\nimage_suffixes = [".SIF"]\n')
    settings = Settings.load()
    assert settings.ovation.hosts == ("a.example.org", "https://b.example.org:8443")
    assert settings.agent.image_suffixes == (".sif",)
    environment(OVATION_HOSTS="*.example.org, http://127.0.0.1:9", AGENT_REMOTE_HOSTS="FILES.example.org,10.0.0.7")
    settings = Settings.load()
    assert settings.ovation.hosts == ("*.example.org", "http://127.0.0.1:9")
    assert settings.agent.remote_hosts == ("files.example.org", "10.0.0.7")


@pytest.mark.parametrize("name", ["AGENT", "OVATION", "JWT", "AWS", "AWS_PROFILE", "JWT_SECRET_KEY", "OVATION_HOME"])
@pytest.mark.parametrize("value", ["1", '{"port": 1, "secret": "x"}'])
def test_what_is_another_programs_does_nothing(name: str, value: str, environment: Callable[..., None]) -> None:
    environment(**{name: value})
    assert Settings.load() == Settings()


MISSING = "No such file or directory"
FILES = {
    "missing": ("missing.toml", None, f"missing.toml: cannot be read: {MISSING}; --config or AGENT_CONFIG names it"),
    "directory": (".", None, ".: cannot be read: Is a directory"),
    "not TOML": ("a.toml", b"[agent]\nport : 1\n", "a.toml: is not TOML: "),
    "where": ("a.toml", b"[agent]\nport : 1\n", "line 2"),
    "twice": ("a.toml", b"[agent]\nport = 1\nport = 2\n", "a.toml: is not TOML: Cannot overwrite a value"),
    "nested": ("a.toml", b"a = " + b"[" * 5000 + b"]" * 5000, "a.toml: is not TOML: "),
    "not UTF-8": ("a.toml", b'[agent]\nhost = "\xff"\n', "a.toml: is not text in UTF-8"),
    "key": ("a.toml", b"[agent]\nprot = 1\n", "a.toml: [agent] prot: no such setting; did you mean port?"),
    "strange key": ("a.toml", b"[agent]\nzzzzzz = 1\n", "a.toml: [agent] zzzzzz: no such setting"),
    "prefix": ("a.toml", b"[agent]\nagent_port = 1\n", "no such setting; in the file it is port"),
    "variable": ("a.toml", b"[agent]\nAGENT_PORT = 1\n", "no such setting; in the file it is port"),
    "elsewhere": ("a.toml", b"[agent]\napi_url = 'x'\n", "api_url: no such setting; it belongs below [ovation]"),
    "table": ("a.toml", b"[agnet]\nport = 1\n", "a.toml: [agnet]: no such table; did you mean agent?"),
    "outside": ("a.toml", b"port = 1\n", "port: stands outside of the tables: settings stand below [agent]"),
    "no table": ("a.toml", b"agent = 1\n", "a.toml: agent: must be a table: write [agent]"),
}


@pytest.mark.parametrize(("name", "content", "expected"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("named", ["argument", "variable"])
def test_a_bad_file_is_explained(
    name: str, content: bytes | None, expected: str, named: str, environment: Callable[..., None]
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    environment(**({"AGENT_CONFIG": name} if named == "variable" else {}))
    assert expected in problem(Path(name) if named == "argument" else None)


VARIABLES = {
    "AGENT_PROT": "environment: AGENT_PROT: no such setting; did you mean AGENT_PORT?",
    "agent_port": "environment: agent_port: no such setting; did you mean AGENT_PORT?",
    "AGENT_XYZZY_PLUGH": "environment: AGENT_XYZZY_PLUGH: no such setting",
    "OVATION_TOKNE": "environment: OVATION_TOKNE: no such setting; did you mean OVATION_TOKEN?",
    "OVATION_API_ULR": "did you mean OVATION_API_URL?",
    "AGENT_CONFIGS": "did you mean AGENT_CONFIG?",
}


@pytest.mark.parametrize(("name", "expected"), VARIABLES.items())
def test_a_misspelt_variable_is_refused(name: str, expected: str, environment: Callable[..., None]) -> None:
    environment(**{name: "x"})
    assert expected in problem()


VALUES = [
    ("AGENT_PORT", "http"),
    ("AGENT_PORT", "-1"),
    ("AGENT_PORT", "65536"),
    ("AGENT_SETTLE_SECONDS", "-1"),
    ("AGENT_SETTLE_SECONDS", "inf"),
    ("AGENT_SETTLE_SECONDS", "nan"),
    ("AGENT_SETTLE_SECONDS", "1e300"),
    ("AGENT_TIME_LIMIT_SECONDS", "0"),
    ("AGENT_MAX_RUNNING", "0"),
    ("AGENT_MAX_STAGING", "1.5"),
    ("AGENT_NETWORK", "bridge"),
    ("AGENT_EXECUTOR", "kubernetes"),
    ("AGENT_LOG_LEVEL", "INFO"),
    ("AGENT_WEBHOOK_ANONYMOUS", "perhaps"),
    ("AGENT_CONTAINER_USER", "0:0"),
    ("AGENT_CONTAINER_USER", "nobody"),
    ("AGENT_IMAGE_SUFFIXES", ","),
    ("AGENT_REMOTE_HOSTS", "https://files.example.org"),
    ("AGENT_ADMIN_TOKEN", "two words"),
    ("AGENT_ADMIN_TOKEN", "gr\u00fcn"),
    ("AGENT_WEBHOOK_PASSWORD", "line\n"),
    ("AGENT_WEBHOOK_USERNAME", "a:b"),
    ("AGENT_DATABASE_URL", "mysql://agent@db/agent"),
    ("AGENT_DATABASE_URL", "postgresql://agent:p/w@db/agent"),
    ("AGENT_DATABASE_URL", "postgresql://agent:p#w@db/agent"),
    ("AGENT_DATABASE_URL", "postgresql://agent:p?w@db/agent"),
    ("AGENT_DATABASE_URL", "postgresql://agent:p@w@db/agent"),
    ("AGENT_DATABASE_URL", "postgresql://agent:12/34@db/agent"),
    ("AGENT_DATABASE_URL", "postgresql://db:port/agent"),
    ("OVATION_TOKEN", "eyJ...\n"),
    ("OVATION_API_URL", "api.example.org"),
    ("OVATION_API_URL", "ftp://api.ovation.io"),
    ("OVATION_API_URL", "https://user:password@api.ovation.io"),
    ("OVATION_API_URL", "https://api.ovation.io/api/v1"),
    ("OVATION_API_URL", "https://api.ovation.io?x=1"),
    ("OVATION_API_URL", "https://host:port"),
    ("OVATION_API_URL", "https://[::1"),
    ("OVATION_AUTH_DOMAIN", "ovation.auth0.com"),
    ("OVATION_HOSTS", "*"),
    ("OVATION_HOSTS", "a b"),
    ("OVATION_HOSTS", "https://files.example.org/path"),
    ("OVATION_ORGANIZATIONS", "0,x"),
    ("OVATION_ORGANIZATIONS", "-1"),
    ("OVATION_ORGANIZATIONS", "2147483648"),
    ("OVATION_ORGANIZATIONS", ","),
    ("JWT_PUBLIC_KEY", "secret"),
    ("JWT_PUBLIC_KEY", public_key(ed25519.Ed25519PrivateKey.generate())),
    ("AWS_ENDPOINT_URL_S3", "s3.example.org"),
]


@pytest.mark.parametrize("place", ["environment", "file"])
@pytest.mark.parametrize(("name", "value"), VALUES)
def test_a_bad_value_is_named_and_not_repeated(
    name: str, value: str, place: str, environment: Callable[..., None]
) -> None:
    group, _, key = name.lower().partition("_")
    if place == "environment":
        environment(**{name: value})
        prefix = f"environment: {name}: "
    else:
        toml = str(value.split(",")) if name.endswith(("HOSTS", "ORGANIZATIONS", "SUFFIXES")) else repr(value)
        write(f"[{group}]\n{key} = {toml if toml.isascii() else repr(value)}\n".replace("'", '"'))
        prefix = f"agent.toml: [{group}] {key}: "
    lines = problem().splitlines()
    assert [line for line in lines if line.startswith(prefix)]
    if len(value) > 3:
        assert value not in "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "toml"),
    [("AGENT_PORT", "true"), ("AGENT_SETTLE_SECONDS", "true"), ("AGENT_HOST", "1"), ("AGENT_HOST", "[]"),
     ("OVATION_ORGANIZATIONS", "0"), ("OVATION_ORGANIZATIONS", "[true]"), ("OVATION_TOKEN", "5"),
     ("AGENT_PORT", "2026-01-01"), ("AGENT_DATA_DIR", "{a = 1}")],
)  # fmt: skip
def test_types_of_toml_are_taken_at_their_word(name: str, toml: str) -> None:
    group, _, key = name.lower().partition("_")
    write(f"[{group}]\n{key} = {toml}\n")
    assert problem().startswith(f"agent.toml: [{group}] {key}: ")


def test_all_problems_are_told_at_once(environment: Callable[..., None]) -> None:
    write('[agent]\nport = "x"\nnetwork = "y"\n')
    environment(OVATION_API_URL="z", AGENT_MAX_RUNNING="0")
    lines = problem().splitlines()
    assert len(lines) == 4
    assert {line.split(": ")[0] for line in lines} == {"environment", "agent.toml"}


PAIRS = [
    ("AGENT_WEBHOOK_USERNAME", "AGENT_WEBHOOK_PASSWORD"),
    ("AGENT_WEBHOOK_PASSWORD", "AGENT_WEBHOOK_USERNAME"),
    ("OVATION_CLIENT_ID", "OVATION_CLIENT_SECRET"),
    ("OVATION_CLIENT_SECRET", "OVATION_CLIENT_ID"),
]


@pytest.mark.parametrize(("there", "missing"), PAIRS)
@pytest.mark.parametrize("other", [None, ""])
def test_half_a_pair_is_refused(there: str, missing: str, other: str | None, environment: Callable[..., None]) -> None:
    environment(**{there: "opaque-value"} | ({missing: other} if other is not None else {}))
    message = problem()
    assert message == f"settings: {there} is set and {missing} is not: set both or neither"


def test_a_pair_may_come_from_two_places(environment: Callable[..., None]) -> None:
    write('[agent]\nwebhook_username = "ovation"\n')
    environment(AGENT_WEBHOOK_PASSWORD="a password")
    settings = Settings.load()
    assert settings.agent.webhooks_are_guarded
    assert settings.agent.webhook_password == SecretStr("a password")


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://agent@db.example.org/agent",
        "postgres://agent:p%40ss%2Fword@db.example.org:5432/agent?sslmode=require",
        "postgresql:///agent?host=/run/postgresql",
        "postgresql://postgres@/postgres?host=/tmp/socket",
        "postgresql://agent:password@[2001:db8::1]:5432/agent",
        "postgresql://agent:password@one:5432,two:5433/agent?target_session_attrs=primary",
        "postgresql://",
    ],
)
def test_addresses_of_databases(dsn: str, environment: Callable[..., None]) -> None:
    environment(AGENT_DATABASE_URL=dsn)
    settings = Settings.load()
    assert settings.agent.database_url is not None
    assert settings.agent.database_url.get_secret_value() == dsn
    assert "password" not in repr(settings).replace("webhook_password", "")


@pytest.mark.parametrize("one_line", [False, True])
def test_a_public_key_is_read(one_line: bool, environment: Callable[..., None]) -> None:
    pem = public_key()
    environment(JWT_PUBLIC_KEY=pem.replace("\n", "\\n") if one_line else pem)
    assert Settings.load().jwt.public_key == pem


@given(
    st.sampled_from(SECRETS),
    st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="'"), min_size=12, max_size=40),
    st.sampled_from(["environment", "file", "a table", "a list", "as the database", "as a port", "as an address"]),
)
def test_no_secret_is_ever_repeated(name: str, secret: str, how: str) -> None:
    group, _, key = name.lower().partition("_")
    patch = pytest.MonkeyPatch()
    with patch.context() as environment:
        if how == "environment":
            environment.setenv(name, secret)
        elif how.startswith("as"):
            target = {"as the database": "AGENT_DATABASE_URL", "as a port": "AGENT_PORT"}.get(how, "OVATION_API_URL")
            environment.setenv(target, f"https://u:{secret}@h:1" if how == "as an address" else secret)
        else:
            written = {"file": f"'{secret}'", "a table": f"{{a = '{secret}'}}", "a list": f"['{secret}']"}[how]
            write(f"[{group}]\n{key} = {written}\nport = '{secret}'\n")
        try:
            shown = repr(settings := Settings.load()) + str(settings)
        except ConfigurationError as error:
            shown = str(error)
        finally:
            Path("agent.toml").unlink(missing_ok=True)
    assert secret not in shown


def test_secrets_are_listed_for_the_log(environment: Callable[..., None]) -> None:
    one, other, dsn = "one" * 8, "two" * 8, "postgresql://u:p@h/d"
    secrets = {**dict.fromkeys(SECRETS, one), "AGENT_WEBHOOK_SECRET": f"{one}, whsec_{other}"}
    environment(**secrets, OVATION_CLIENT_ID="id", AGENT_DATABASE_URL=dsn)
    assert set(Settings.load().secrets()) == {one, f"whsec_{other}", dsn}


@pytest.mark.parametrize(
    "secret", ["whsec_", "a password", "whsec_tooshort", "whsec_" + "A" * 24 + "?", "A" * 24 + ",x"]
)
def test_a_webhook_secret_that_is_no_key(secret: str, environment: Callable[..., None]) -> None:
    environment(AGENT_WEBHOOK_SECRET=secret)
    assert "AGENT_WEBHOOK_SECRET: must be whsec_ and at least 16 bytes in base64" in problem()


def test_webhook_secrets_guard_webhooks(environment: Callable[..., None]) -> None:
    environment(AGENT_WEBHOOK_SECRET="QUFBQUFBQUFBQUFBQUFBQQ==, whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLw,")
    agent = Settings.load().agent
    assert agent.webhooks_are_guarded
    assert agent.webhook_keys == (b"A" * 16, bytes.fromhex("31f290f6bf06298aab4f08d43c3f082cf648a362da2f"))


def test_a_tree_is_written_down_and_read_again(environment: Callable[..., None], tmp_path: Path) -> None:
    given = {
        "OVATION_TOKEN": "a-token-of-the-agent",
        "OVATION_HOSTS": "*.ovation.io,https://ovation.example",
        "OVATION_ORGANIZATIONS": "3,5",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000",
        "AGENT_EXECUTOR": "slurm",
        "AGENT_STAGING": "node",
        "AGENT_DATABASE_URL": "postgresql://someone:password@db.example/agent",
        "AGENT_DATA_DIR": str(tmp_path),
        "AGENT_SLURM_ARGUMENTS": "--constraint 'a b' --exclusive",
        "AGENT_WEBHOOK_SECRET": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "AGENT_IMAGE_SUFFIXES": ".sif,.img",
        "AGENT_REMOTE_HOSTS": "files.lab",
        "AGENT_MAX_MEMORY_BYTES": "64000000000",
    }
    environment(**given)
    settings = Settings.load()
    document = json.loads(json.dumps(settings.document()))
    environment(**dict.fromkeys(given, ""), AGENT_PORT="1")  # of whoever reads it, which is nothing to it
    assert Settings.of(document) == settings
    left_out = settings.document({"AGENT_WEBHOOK_SECRET", "OVATION_TOKEN"})
    assert "whsec" not in str(left_out)
    assert "a-token" not in str(left_out)


def test_nodes_need_slurm_and_a_server(environment: Callable[..., None]) -> None:
    environment(AGENT_STAGING="node")
    with pytest.raises(ConfigurationError, match="set AGENT_EXECUTOR=slurm"):
        Settings.load()
    environment(AGENT_STAGING="node", AGENT_EXECUTOR="slurm")
    with pytest.raises(ConfigurationError, match="set AGENT_DATABASE_URL"):
        Settings.load()


def test_the_tree_is_frozen() -> None:
    settings = AgentSettings()
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc] # that it is refused is the point
