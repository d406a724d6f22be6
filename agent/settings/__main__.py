"""`python -m agent.settings` prints config/agent.example.toml."""

import sys

from agent.settings.example import example

sys.stdout.write(example())
