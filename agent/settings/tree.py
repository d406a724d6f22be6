"""The tree: every setting with its type, its default and what it means."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from agent.domain.resources import Resources
from agent.errors import ConfigurationError
from agent.settings import sources
from agent.settings.types import (
    Address,
    Bytes,
    Count,
    DatabaseAddress,
    Directory,
    File,
    HeaderToken,
    Hosts,
    HostsOrOrigins,
    Organizations,
    Origin,
    Password,
    Port,
    PublicKey,
    Seconds,
    Secret,
    SomeSeconds,
    Suffixes,
    Text,
    UserName,
    WebhookSecrets,
    Words,
    webhook_key,
)

_RUNNING_HERE, _RUNNING_IN_SLURM = 2, 500


def _pair(name: str, value: object, other_name: str, other: object) -> None:
    if (value is None) != (other is None):
        there, missing = (name, other_name) if other is None else (other_name, name)
        raise ValueError(f"{there} is set and {missing} is not: set both or neither")


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class OvationSettings(_Group):
    """`OVATION_*`: where Ovation is and how the agent signs in there."""

    api_url: Origin = Field("https://api.ovation.io", description="Ovation's API.")
    token: HeaderToken | None = Field(
        None, description="The agent's own API token. Or give client_id and client_secret."
    )
    client_id: Text | None = Field(None, description="A service account's id, to fetch tokens with.")
    client_secret: Secret | None = Field(None, description="The service account's secret.")
    auth_domain: Address = Field("https://ovation.auth0.com", description="Where service tokens are fetched.")
    audience: Text = Field("https://api.ovation.io/", description="What service tokens are asked for.")
    hosts: HostsOrOrigins = Field(
        ("*.ovation.io",),
        description="Origins that are Ovation's own besides the API's: the only ones that see its token. A host name,"
        " which means https; `*.` stands for any one or more labels; or scheme://host:port.",
    )
    organizations: Organizations = Field((0,), description="Organizations to watch; 0 is Personal Projects.")

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        _pair("OVATION_CLIENT_ID", self.client_id, "OVATION_CLIENT_SECRET", self.client_secret)
        return self


class JwtSettings(_Group):
    """`JWT_*`: how people's tokens are checked before Ovation is asked. With neither, Ovation alone decides."""

    secret: Secret | None = Field(None, description="Shared secret of HS256 tokens.")
    public_key: PublicKey | None = Field(None, description="Public key (PEM) of RS256 tokens.")


class AwsSettings(_Group):
    """`AWS_*`: the object store, as every AWS tool reads them."""

    endpoint_url_s3: Address | None = Field(None, description="An S3-compatible store instead of Amazon's.")
    default_region: Text = Field("us-east-1", description="The region that requests are signed for.")


class AgentSettings(_Group):
    """`AGENT_*`: the agent itself."""

    host: Text = Field("127.0.0.1", description="Address to listen on.")
    port: Port = Field(8080, description="Port to listen on; 0 takes any free one.")
    database_url: DatabaseAddress | None = Field(
        None, description="A PostgreSQL server. Unset: an embedded one under the data directory."
    )
    data_dir: Directory = Field(Path("data"), description="Work directories and the embedded database.")
    cache_dir: Directory | None = Field(
        None,
        description="Where fetched Revisions are kept for other runs. Unset: `cache` in the data directory. Several"
        " agents on one file system may share one.",
    )
    cache_max_bytes: Bytes = Field(
        50_000_000_000, description="How large the cache of Revisions may grow; 0 keeps nothing."
    )
    webhook_username: UserName | None = Field(
        None, description="User name that webhooks must carry (basic auth). Research webhooks send their key as both."
    )
    webhook_password: Password | None = Field(None, description="Password that webhooks must carry (basic auth).")
    webhook_secret: WebhookSecrets = Field(
        (),
        description="Secrets of Standard Webhooks (`whsec_` and base64), with one of which a webhook may be signed"
        " instead. Several while one replaces another.",
    )
    webhook_anonymous: bool = Field(False, description="Accept webhooks from anybody. For trials on one machine.")
    admin_token: HeaderToken | None = Field(
        None, description="Bearer token for /api. Unset: one is made and kept in the data directory, mode 0600."
    )
    executor: Literal["local", "slurm"] = Field(
        "local",
        description="Where containers run: here, or as batch jobs of a Slurm cluster whose nodes see the data directory"
        " under the same name.",
    )
    settle_seconds: Seconds = Field(10, description="Quiet time after a change before an Activity is judged.")
    settle_max_seconds: Seconds = Field(
        300, description="The longest wait for a quiet time: an Activity that never rests is judged all the same."
    )
    reconcile_seconds: SomeSeconds = Field(
        300, description="How often the watched organizations are walked for what no webhook told."
    )
    reconcile_looks: Count = Field(
        100, description="Activities that a walk has looked at although nothing says that they changed."
    )
    max_staging: Count = Field(4, description="Jobs that fetch their files at the same time.")
    max_running: Count | None = Field(
        None, description="Containers that run, or wait in Slurm, at the same time. Unset: 2, and 500 with Slurm."
    )
    cpus: Count | None = Field(None, description="CPUs of a run whose image and Activity wish for none.")
    memory_bytes: Bytes | None = Field(None, description="Memory of a run whose image and Activity wish for none.")
    gpus: Count | None = Field(None, description="GPUs of a run whose image and Activity wish for none.")
    max_cpus: Count | None = Field(None, description="CPUs at most, whatever is wished for. Unset: no limit.")
    max_memory_bytes: Bytes | None = Field(None, description="Memory at most, whatever is wished for. Unset: no limit.")
    max_gpus: Count | None = Field(None, description="GPUs at most, whatever is wished for. Unset: no limit.")
    max_time_limit_seconds: SomeSeconds | None = Field(
        None, description="Wall time at most, whatever is wished for. Unset: time_limit_seconds."
    )
    max_collecting: Count = Field(4, description="Jobs that deliver their outputs at the same time.")
    max_connections: Count = Field(32, description="Connections to the object store at the same time, for all jobs.")
    max_job_connections: Count = Field(8, description="Connections to the object store at the same time, for one job.")
    max_bytes_per_second: Count | None = Field(
        None, description="Bytes a second that downloads and uploads may take together. Unset: no limit."
    )
    time_limit_seconds: SomeSeconds = Field(
        86_400, description="Wall time of a container whose image and Activity wish for none."
    )
    max_log_bytes: Bytes = Field(
        1_000_000_000, description="Size of a container's stdout or stderr past which it is ended."
    )
    network: Literal["none", "host"] = Field("none", description="What containers may reach.")
    container_user: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,9}:[1-9][0-9]{0,9}$")] = Field(
        "65534:65534", description="Numeric uid:gid that containers run as when the agent is root. Never 0."
    )
    staging: Literal["host", "node"] = Field(
        "host",
        description="Where files are fetched and outputs delivered from, with Slurm: on this machine, to and from the"
        " data directory; or by each batch job on its compute node, on that one's own disk.",
    )
    node_dir: Directory = Field(
        Path("/tmp"),  # noqa: S108 a directory of the agent's own is made there
        description="A directory on the compute nodes' own disks, where `staging` is `node`.",
    )
    node_margin_seconds: SomeSeconds = Field(
        3600, description="Time that a batch job is given beside the run's, to fetch and deliver on the node."
    )
    slurm_partition: Text | None = Field(None, description="Slurm's partition. Unset: its default.")
    slurm_account: Text | None = Field(None, description="The account in Slurm. Unset: the user's default.")
    slurm_qos: Text | None = Field(None, description="The quality of service in Slurm. Unset: the default.")
    slurm_arguments: Words = Field((), description="Further arguments of sbatch, as a shell reads them.")
    slurm_preamble: File | None = Field(
        None, description="A file of shell lines that each batch job begins with, `module load` for instance."
    )
    slurm_python: Text | None = Field(
        None, description="Python 3.9 or newer on the nodes. Unset: the agent's own, under the same name."
    )
    slurm_apptainer: Text | None = Field(
        None, description="Apptainer on the nodes: a name to be found there, or a path. Unset: as on this machine."
    )
    slurm_silence_seconds: SomeSeconds = Field(
        60,
        description="How long a node must give no sign of a run, and Slurm say that it is over, before it counts as"
        " lost. Longer than the file system needs to show here what a node has written.",
    )
    image_suffixes: Suffixes = Field(
        (".sif", ".simg", ".img", ".sqsh"), description="Names of compute images end so, in either case."
    )
    remote_hosts: Hosts = Field(
        (), description="Private or loopback hosts that remote Revisions may be read from all the same."
    )
    remote_max_bytes: Bytes = Field(
        100_000_000_000, description="Size at most of a remote Revision, whose server may never stop sending."
    )
    annotate: bool = Field(
        True, description="Tell of each run on its Activity: a timeline event, properties, and a note when it failed."
    )
    keep_seconds: Seconds = Field(
        604_800, description="How long the logs of finished runs stay on this machine for the `logs` command."
    )
    keep_failed_seconds: Seconds = Field(
        86_400, description="How long the files of failed runs stay, unless the room is needed."
    )
    min_free_bytes: Bytes = Field(1_000_000_000, description="Disk space that staging leaves free.")
    node_retries: Annotated[int, Field(ge=0, le=10)] = Field(
        1, description="How often a run that its machine lost, by a restart for instance, is started again."
    )
    drain_seconds: Seconds = Field(
        30, description="How long, after SIGTERM, steps that are under way may go on. Containers go on in any case."
    )
    log_format: Literal["auto", "json", "console"] = Field("auto", description="`auto`: console on a terminal.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @property
    def most_running(self) -> int:
        """How many containers run, or wait in Slurm, at the same time."""
        if self.max_running is not None:
            return self.max_running
        return _RUNNING_IN_SLURM if self.executor == "slurm" else _RUNNING_HERE

    @property
    def given(self) -> Resources:
        """What a run is given where nobody wishes for anything."""
        return Resources(self.cpus, self.memory_bytes, self.gpus, self.time_limit_seconds)

    @property
    def most(self) -> Resources:
        """What a run is given at most."""
        time = self.max_time_limit_seconds or self.time_limit_seconds
        return Resources(self.max_cpus, self.max_memory_bytes, self.max_gpus, time)

    @model_validator(mode="after")
    def _nodes_are_reached(self) -> Self:
        if self.staging == "node" and self.executor != "slurm":
            raise ValueError("AGENT_STAGING is node, and only Slurm has nodes: set AGENT_EXECUTOR=slurm as well")
        if self.staging == "node" and self.database_url is None:
            raise ValueError(
                "AGENT_STAGING is node, and compute nodes cannot reach the embedded database: set AGENT_DATABASE_URL"
            )
        return self

    @model_validator(mode="after")
    def _credentials_are_whole(self) -> Self:
        _pair("AGENT_WEBHOOK_USERNAME", self.webhook_username, "AGENT_WEBHOOK_PASSWORD", self.webhook_password)
        return self

    @property
    def webhooks_are_guarded(self) -> bool:
        """Whether `serve` may start: webhooks carry credentials, or anonymous ones were asked for."""
        return self.webhook_anonymous or self.webhook_username is not None or bool(self.webhook_secret)

    @property
    def webhook_keys(self) -> tuple[bytes, ...]:
        """The keys that a webhook may be signed with."""
        keys = (webhook_key(secret.get_secret_value()) for secret in self.webhook_secret)
        return tuple(key for key in keys if key is not None)

    @property
    def admin_token_file(self) -> Path:
        """Where the agent keeps the bearer token for `/api` that it made."""
        return self.data_dir / "admin-token"

    @property
    def cache_directory(self) -> Path:
        """Where fetched Revisions are kept."""
        return (self.cache_dir or self.data_dir / "cache").absolute()

    @property
    def address_file(self) -> Path:
        """Where a running agent says at which address it listens, and its pid."""
        return self.data_dir / "agent.json"


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
        del dotenv_settings, file_secret_settings, env_settings
        return sources.Environment(settings_cls, variables()), init_settings

    @classmethod
    def load(cls, file: Path | None = None) -> Settings:
        """Read the environment and the TOML file. A variable that is set to nothing counts as unset.

        Raises:
            ConfigurationError: which key, where it stands, what is wrong with it and what to do, all at once.
        """
        known = variables()
        found = sources.find(file)
        content = {} if found is None else sources.read(found, known)
        sources.refuse_unknown_variables(known)
        try:
            return cls(**content)
        except ValidationError as error:
            raise ConfigurationError(sources.explain(error, None if found is None else found.path)) from None

    def document(self, left_out: Container[str] = ()) -> dict[str, dict[str, Any]]:
        """Return what differs from the defaults, secrets in plain text; `of` reads it.

        Args:
            left_out: the settings that are for nobody else, by the environment's names.
        """
        return {
            group: {
                name: _plain(value)
                for name, inner in model.model_fields.items()
                if f"{group}_{name}".upper() not in left_out
                and (value := getattr(getattr(self, group), name)) != inner.default
            }
            for group, model in groups().items()
        }

    @classmethod
    def of(cls, document: dict[str, dict[str, Any]]) -> Settings:
        """Return the settings that a document carries, whatever the environment says.

        Raises:
            ValidationError: it was not made by `document`.
        """
        read: dict[str, Any] = {group: model(**document.get(group, {})) for group, model in groups().items()}
        return cls.model_construct(**read)

    def secrets(self) -> Iterator[str]:
        """Return every secret of the tree, for the log to leave out."""
        for group in (self.ovation, self.jwt, self.aws, self.agent):
            for name in type(group).model_fields:
                value = getattr(group, name)
                for each in value if isinstance(value, tuple) else (value,):
                    if isinstance(each, SecretStr):
                        yield each.get_secret_value()


def _plain(value: object) -> Any:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


class Variable(NamedTuple):
    """A setting as the environment names it."""

    description: str
    default: Any


def variables() -> dict[str, Variable]:
    """Return every environment variable with its description and default, in the order of the tree."""
    return {
        f"{group}_{name}".upper(): Variable(inner.description or "", inner.default)
        for group, model in groups().items()
        for name, inner in model.model_fields.items()
    }


def groups() -> dict[str, type[BaseModel]]:
    """Return the tables of the file with what is in them, in the order of the tree."""
    return {
        name: field.annotation
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
