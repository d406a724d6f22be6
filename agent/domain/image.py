"""What the first bytes of an image file say about it."""

from __future__ import annotations

import struct

HEADER_BYTES = 128
"""How much of an image file `complaint` wants to see."""

_SIF_BYTES = 128
_SQUASHFS_BYTES = 96
_SIF_MACHINES = {
    "01": "i386", "02": "x86_64", "03": "arm", "04": "aarch64", "05": "ppc64", "06": "ppc64le",
    "07": "mips", "08": "mipsel", "09": "mips64", "10": "mips64el", "11": "s390x", "12": "riscv64",
}  # fmt: skip
_RUNS_ALSO = {"x86_64": {"i386"}, "aarch64": {"arm"}}


def complaint(header: bytes, size_bytes: int, machine: str) -> str | None:
    """Return what is wrong with an image file, judged by its first bytes and its size, or `None`.

    Apptainer reads a truncated image's metadata happily and fails only when it runs. Layouts: the SIF global header
    (github.com/apptainer/sif, `header` in pkg/sif/sif.go), the squashfs superblock (kernel, fs/squashfs).
    `machine` is the processor as uname names it.
    """
    if size_bytes == 0:
        return "The image is an empty file."
    if is_sif(header):
        return _sif_complaint(header, size_bytes, machine)
    if header[:4] == b"hsqs":
        if len(header) < _SQUASHFS_BYTES:
            return _truncated(size_bytes, None)
        (whole,) = struct.unpack_from("<Q", header, 40)
        return _truncated(size_bytes, whole) if size_bytes < whole else None
    if header[:1] == b"#" and b"run-singularity" in header[:32] and len(header) < _SIF_BYTES:
        return _truncated(size_bytes, None)
    return None  # an ext3 image, or none at all: Apptainer says which


def is_sif(header: bytes) -> bool:
    """Say whether an image file is a SIF, by its first bytes."""
    return header[32:41] == b"SIF_MAGIC"


def _sif_complaint(header: bytes, size_bytes: int, machine: str) -> str | None:
    if len(header) < _SIF_BYTES:
        return _truncated(size_bytes, None)
    data_offset, data_bytes = struct.unpack_from("<qq", header, 112)
    if size_bytes < data_offset + data_bytes:
        return _truncated(size_bytes, data_offset + data_bytes)
    built_for = _SIF_MACHINES.get(header[45:47].decode("ascii", "replace"))
    if built_for and built_for != machine and built_for not in _RUNS_ALSO.get(machine, set()):
        return f"The image was built for {built_for} processors; this machine's is {machine}."
    return None


def _truncated(size_bytes: int, whole_bytes: int | None) -> str:
    of = f" of {whole_bytes:,}" if whole_bytes else ""
    return f"The image is not complete: the file has {size_bytes:,}{of} bytes. Upload it again."
