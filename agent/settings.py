"""Every setting of the agent, from the environment and from a TOML file, as one frozen tree.

`AGENT_PORT=8081` in the environment and `port = 8081` under `[agent]` in the file are the same setting; the
environment wins. The file is `agent.toml` in the working directory, or what `AGENT_CONFIG` or `--config` names.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from yarl import URL

from agent.errors import ConfigurationError

DEFAULT_FILE = "agent.toml"


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _web_address(value: str) -> str:
    url = URL(value)
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("must be an address such as https://api.ovation.io")
    if url.user or url.password:
        raise ValueError("must not carry a user name or password")
    return value.rstrip("/")


def _postgres_address(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
        raise ValueError("must start with postgresql://, for instance postgresql://agent@db.example.org/agent")
    return value


Address = Annotated[str, AfterValidator(_web_address)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Organizations = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_split)]


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class OvationSettings(_Group):
    """`OVATION_*`: where Ovation is and how the agent signs in there."""

    api_url: Address = Field("https://api.ovation.io", description="Ovation's API.")
    token: SecretStr | None = Field(None, description="The agent's own API token. Or give client_id and client_secret.")
    client_id: str | None = Field(None, description="A service account's id, to fetch tokens with.")
    client_secret: SecretStr | None = Field(None, description="The service account's secret.")
    auth_domain: Address = Field("https://ovation.auth0.com", description="Where service tokens are fetched.")
    audience: str = Field("https://api.ovation.io/", description="What service tokens are asked for.")
    hosts: Words = Field(
        ("*.ovation.io",),
        description="Origins that are Ovation's own besides the API's: the only ones that see its token. A host name,"
        " which means https; `*.` stands for any one or more labels; or scheme://host:port.",
    )
    organizations: Organizations = Field((0,), description="Organizations to watch; 0 is Personal Projects.")

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.client_id is None) != (self.client_secret is None):
            raise ValueError("client_id and client_secret go together: set both, or set token")
        return self


class JwtSettings(_Group):
    """`JWT_*`: how people's tokens are checked before Ovation is asked. With neither, Ovation alone decides."""

    secret: SecretStr | None = Field(None, description="Shared secret of HS256 tokens.")
    public_key: str | None = Field(None, description="Public key (PEM) of RS256 tokens.")


class AwsSettings(_Group):
    """`AWS_*`: the object store, as every AWS tool reads them."""

    endpoint_url_s3: Address | None = Field(None, description="An S3-compatible store instead of Amazon's.")
    default_region: str = Field("us-east-1", description="The region that requests are signed for.")


class AgentSettings(_Group):
    """`AGENT_*`: the agent itself."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    database_url: Annotated[SecretStr, AfterValidator(_postgres_address)] | None = Field(
        None, description="A PostgreSQL server. Unset: an embedded one under the data directory."
    )
    data_dir: Path = Field(Path("data"), description="Work directories and the embedded database.")
    webhook_username: str | None = Field(None, description="User name that webhooks must carry (basic auth).")
    webhook_password: SecretStr | None = Field(None, description="Password that webhooks must carry (basic auth).")
    webhook_anonymous: bool = Field(False, description="Accept webhooks from anybody. For trials on one machine.")
    admin_token: SecretStr | None = Field(
        None, description="Bearer token for /api. Unset: one is made and kept in the data directory, mode 0600."
    )
    executor: Literal["local"] = Field("local", description="Where containers run.")
    settle_seconds: float = Field(10, ge=0, description="Quiet time after a change before an Activity is judged.")
    max_staging: int = Field(4, ge=1, description="Jobs that fetch their files at the same time.")
    max_running: int = Field(2, ge=1, description="Containers that run at the same time.")
    max_collecting: int = Field(4, ge=1, description="Jobs that deliver their outputs at the same time.")
    time_limit_seconds: float = Field(86_400, gt=0, description="Wall time of a container.")
    network: Literal["none", "host"] = Field("none", description="What containers may reach.")
    container_user: Annotated[str, Field(pattern=r"^[1-9][0-9]*:[1-9][0-9]*$")] = Field(
        "65534:65534", description="Numeric uid:gid that containers run as when the agent is root. Never 0."
    )
    image_suffixes: Words = Field((".sif", ".simg", ".img", ".sqsh"), description="Names of compute images end so.")
    remote_hosts: Words = Field(
        (), description="Private or loopback hosts that remote Revisions may be read from all the same."
    )
    keep_seconds: float = Field(
        604_800, ge=0, description="How long the logs of finished runs stay on this machine for the `logs` command."
    )
    log_format: Literal["auto", "json", "console"] = Field("auto", description="`auto`: console on a terminal.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @model_validator(mode="after")
    def _credentials_are_whole(self) -> Self:
        if (self.webhook_username is None) != (self.webhook_password is None):
            raise ValueError("webhook_username and webhook_password go together: set both")
        return self

    @property
    def webhooks_are_guarded(self) -> bool:
        """Whether `serve` may start: webhooks carry credentials, or anonymous ones were asked for."""
        return self.webhook_anonymous or self.webhook_username is not None


class Settings(BaseSettings):
    """The tree. `Settings.load()` is the way to get one."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        env_nested_delimiter="_",
        env_nested_max_split=1,
        nested_model_default_partial_update=True,
        hide_input_in_errors=True,
    )

    ovation: OvationSettings = OvationSettings()
    jwt: JwtSettings = JwtSettings()
    aws: AwsSettings = AwsSettings()
    agent: AgentSettings = AgentSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over what `load` read from the file."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings

    @classmethod
    def load(cls, file: Path | None = None) -> Settings:
        """Read the environment and the TOML file.

        Raises:
            ConfigurationError: which key, where it stands, what is wrong with it and what to do, all at once.
        """
        path = _find(file)
        from_file = {} if path is None else _read(path)
        _refuse_unknown_variables()
        try:
            return cls(**from_file)
        except ValidationError as error:
            raise ConfigurationError(_explain(error, path)) from None
        except SettingsError as error:
            raise ConfigurationError(f"the environment cannot be read: {error}") from None


def variables() -> dict[str, tuple[str, Any]]:
    """Return every environment variable with its description and default, in the order of the tree."""
    found: dict[str, tuple[str, Any]] = {}
    for group, field in Settings.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for name, inner in annotation.model_fields.items():
                found[f"{group}_{name}".upper()] = (inner.description or "", inner.default)
    return found


def _find(file: Path | None) -> Path | None:
    if file is None and (named := os.environ.get("AGENT_CONFIG")):
        file = Path(named)
    if file is not None:
        return file
    return Path(DEFAULT_FILE) if Path(DEFAULT_FILE).exists() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: is not text in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: is not TOML: {error}") from None
    known = _keys()
    problems = [
        f"{path}: [{group}] {key}: no such setting{_nearest(key, known.get(group, ()))}"
        for group, table in content.items()
        for key in (table if isinstance(table, dict) and group in known else ("",))
        if group not in known or key not in known[group]
    ]
    if problems:
        raise ConfigurationError("\n".join(problems))
    return content


def _keys() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for variable in variables():
        group, _, key = variable.lower().partition("_")
        found[group] = (*found.get(group, ()), key)
    return found


def _refuse_unknown_variables() -> None:
    """A misspelt `AGENT_*` variable would otherwise be a setting that silently does nothing."""
    known = {*variables(), "AGENT_CONFIG"}
    problems = [
        f"environment: {name}: no such setting{_nearest(name, known)}"
        for name in sorted(os.environ)
        if name.startswith("AGENT_") and name not in known
    ]
    if problems:
        raise ConfigurationError("\n".join(problems))


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _explain(error: ValidationError, path: Path | None) -> str:
    lines = []
    for detail in error.errors(include_url=False, include_context=False):
        variable = "_".join(str(part) for part in detail["loc"][:2]).upper()
        place = "environment" if variable in os.environ or path is None else str(path)
        key = ".".join(str(part) for part in detail["loc"][:2]) if place == str(path) else variable
        lines.append(f"{place}: {key}: {detail['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)
