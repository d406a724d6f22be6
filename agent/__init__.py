"""The compute agent that runs an Ovation Activity's image on its inputs."""

__version__ = "0.1.0"
