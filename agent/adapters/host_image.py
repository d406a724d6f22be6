"""An image directory that borrows this machine's own programs, so that a check of it needs nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from agent.adapters.executor import RunRequest

TIME_LIMIT_SECONDS = 60.0

_PROGRAMS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr")
RUN = "run"
_FOLDERS = ("dev", "proc", "sys", "tmp", "var/tmp", "etc", ".singularity.d")
_REMEDIES = (
    ("capability", "Set `root default capabilities = no` in apptainer.conf."),
    ("user namespace", "Allow user namespaces: sysctl -w user.max_user_namespaces=15000"),
    ("Operation not permitted", "Allow user namespaces: sysctl -w user.max_user_namespaces=15000"),
)


def request(place: Path) -> RunRequest:
    """Make such an image in `place` and return a run of it that only ends."""
    image = place / "image"
    for name in _FOLDERS:
        (image / name).mkdir(parents=True)
    for name in _PROGRAMS:
        host = Path("/", name)
        if host.is_symlink():
            (image / name).symlink_to(host.readlink())
        elif host.is_dir():
            (image / name).mkdir()
    (image / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (image / "etc/group").write_text("root:x:0:\n")
    (image / ".singularity.d/runscript").write_text("#!/bin/sh\nexit 0\n")
    for name in ("inputs", "related"):
        (place / name).mkdir()
    for path in (place, *place.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755)
    return RunRequest(
        name="check",
        directory=place / RUN,
        image=image,
        inputs=place / "inputs",
        related=place / "related",
        time_limit_seconds=TIME_LIMIT_SECONDS,
    )


def mounts() -> list[str]:
    """Return the options that show the machine's programs in the image."""
    folders = [name for name in _PROGRAMS if Path("/", name).is_dir() and not Path("/", name).is_symlink()]
    values = [f'type=bind,"source=/{name}",destination=/{name},ro' for name in folders]
    return [word for value in values for word in ("--mount", value)]


def complaint(program: Path, stderr: str) -> str:
    """Return why `program` could not run the image, and what to do where that is known."""
    said = stderr.strip().rpartition("\n")[2] or "It said nothing."
    remedies = [remedy for sign, remedy in _REMEDIES if sign in stderr]
    return " ".join([f"{program.name} cannot run a container here. {said}", *remedies[:1]])
