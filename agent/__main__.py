"""`python -m agent`, the same as `ovation-agent`."""

from agent.cli import main

if __name__ == "__main__":
    main()
