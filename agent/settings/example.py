"""config/agent.example.toml, written from the tree: `python -m agent.settings > config/agent.example.toml`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr

from agent.settings.tree import groups

_HEAD = """\
# Settings of ovation-agent. Copy this to agent.toml in the directory that the agent starts in, or name your copy with
# --config or AGENT_CONFIG. What is commented out is the default, or an example where there is none. A variable in the
# environment wins over this file: `port` below [agent] is AGENT_PORT there. `ovation-agent doctor` checks the result.
"""
# What settings without a default may look like.
_EXAMPLES: dict[str, Any] = {
    "agent_max_running": 4,
    "ovation_token": "eyJ...",
    "ovation_client_id": "...",
    "ovation_client_secret": "...",
    "jwt_secret": "...",
    "jwt_public_key": "-----BEGIN PUBLIC KEY-----\n...\n-----END PUBLIC KEY-----\n",
    "aws_endpoint_url_s3": "https://s3.example.org",
    "agent_database_url": "postgresql://agent:password@db.example.org/agent",
    "agent_cache_dir": "/srv/ovation-cache",
    "agent_webhook_username": "...",
    "agent_webhook_password": "...",
    "agent_admin_token": "...",
    "agent_max_bytes_per_second": 100_000_000,
    "agent_cpus": 4,
    "agent_memory_bytes": 8 << 30,
    "agent_gpus": 1,
    "agent_max_cpus": 32,
    "agent_max_memory_bytes": 256 << 30,
    "agent_max_gpus": 4,
    "agent_max_time_limit_seconds": 7 * 86_400,
    "agent_slurm_partition": "long",
    "agent_slurm_account": "lab",
    "agent_slurm_qos": "normal",
    "agent_slurm_preamble": "/etc/ovation-agent/slurm-preamble.sh",
    "agent_slurm_python": "python3.11",
    "agent_slurm_apptainer": "apptainer",
}
_WIDTH = 116


def example() -> str:
    """Return the example file: every setting, commented out, with its default and its meaning."""
    return "\n".join([_HEAD.rstrip("\n"), *_tables(), ""])


def _tables() -> Iterator[str]:
    for group, model in groups().items():
        yield ""
        yield from _comment(" ".join((model.__doc__ or "").split()).partition(": ")[2])
        yield f"[{group}]"
        for key, field in model.model_fields.items():
            example_only = field.default is None
            value = _EXAMPLES[f"{group}_{key}"] if example_only else field.default
            yield ""
            yield from _comment(f"{field.description}{_choices(field.annotation)}")
            yield f"# {key} = {_toml(value)}"


def _choices(annotation: object) -> str:
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    return f" One of {', '.join(choices)}." if len(choices) > 1 else ""


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text[:1].upper() + text[1:], _WIDTH, break_on_hyphens=False)]


def _toml(value: object) -> str:
    """Write a value; a JSON string, number, boolean or list of them is TOML as well."""
    if isinstance(value, SecretStr):
        raise TypeError("a secret has no default")
    plain = str(value) if isinstance(value, Path) else value
    return json.dumps(list(plain) if isinstance(plain, tuple) else plain, ensure_ascii=False)
