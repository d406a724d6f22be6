"""Every setting of the agent, from the environment and from a TOML file, as one frozen tree.

`AGENT_PORT=8081` in the environment and `port = 8081` under `[agent]` in the file are the same setting; the
environment wins. The file is `agent.toml` in the working directory, or what `AGENT_CONFIG` or `--config` names.
"""

from agent.settings.tree import AgentSettings, AwsSettings, JwtSettings, OvationSettings, Settings, variables

__all__ = ["AgentSettings", "AwsSettings", "JwtSettings", "OvationSettings", "Settings", "variables"]
