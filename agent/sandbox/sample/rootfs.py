"""The files of the sample image, gathered from the machine and the Python environment that run this.

```
/opt/python    the interpreter and its standard library, whatever prefix they have here
/opt/sample    numpy, matplotlib, what they need, and the analysis
/bin/sh        this machine's; shared libraries stand where the loader looks for them
```
"""

from __future__ import annotations

import compileall
import os
import py_compile
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

ANALYSIS = Path(__file__).with_name("analysis")
REQUIREMENTS = ("matplotlib", "numpy")
PYTHON = "opt/python"
SAMPLE = "opt/sample"
_LDD_SECONDS = 60

# Neither the analysis nor what it imports needs these; they are most of the bytes.
_STDLIB_LEFT_OUT = re.compile(
    r"__pycache__|test|tests|site-packages|dist-packages|config-.*|idlelib|lib2to3|ensurepip|tkinter|turtledemo"
    r"|turtle\.py|pydoc_data|_tkinter\..*|readline\..*|_curses.*|_dbm\..*|_gdbm\..*|_sqlite3\..*|_test.*|_xxtest.*"
)
_PACKAGES_LEFT_OUT = re.compile(
    r"__pycache__|tests?|sample_data|web_backend|f2py|_pyinstaller|pdfcorefonts|afm|_avif\..*|.*\.(pyi|pxd|h|a|c)"
)
_SYSTEM_LIBRARIES = re.compile(r"(/usr)?/lib(32|64|x32)?(/|$)")
_LDD_LINE = re.compile(r"^\s+(?P<name>\S+)(?: => (?P<path>/.*?|not found))?(?: \(0x[0-9a-f]+\))?$")
_RUNSCRIPT = """#!/bin/sh
export PYTHONHOME=/{python} PYTHONPATH=/{sample} PYTHONUTF8=1 PYTHONDONTWRITEBYTECODE=1
export LD_LIBRARY_PATH={libraries}
export MPLBACKEND=Agg MPLCONFIGDIR=/tmp/matplotlib OPENBLAS_NUM_THREADS=1
exec /{python}/bin/python3 -P -u -m analysis
"""
_HELP = """Body mass of penguins against the length of their flippers.

/inputs    parameters.json, and the CSV file that it names
/outputs   regression.csv, regression.png, summary.md
"""


class SampleError(Exception):
    """The sample image cannot be built here; the message says why and what to do."""


def distributions() -> tuple[metadata.Distribution, ...]:
    """Return what the analysis imports, and what that needs, as it is installed in this environment.

    Raises:
        SampleError: one of them is not installed, or its installer kept no list of its files.
    """
    found: dict[str, metadata.Distribution] = {}
    wanted = list(REQUIREMENTS)
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError as error:
            raise SampleError(
                f"the sample analysis needs {name}, which {sys.executable} does not have:"
                " install the agent with its extra `demo`, as in `pip install 'ovation-agent[demo]'`"
            ) from error
        if not distribution.files:
            raise SampleError(f"{name} was installed without a list of its files: install it with pip or uv")
        found[name] = distribution
        wanted.extend(_required(distribution))
    return tuple(found[name] for name in sorted(found))


def assemble(root: Path, say: Callable[[str], None]) -> None:
    """Fill the empty directory `root` with all that the image holds.

    Raises:
        SampleError: something that belongs in it is not on this machine.
    """
    _skeleton(root)
    say("copying the Python interpreter and its library")
    objects = list(_copy_python(root))
    say("copying numpy, matplotlib and the analysis")
    packages = dict(_package_files(distributions()))
    objects += _copy_packages(root, packages)
    shutil.copytree(ANALYSIS, root / SAMPLE / "analysis", ignore=shutil.ignore_patterns("__pycache__"))
    say("copying the shared libraries that they need")
    shell = Path("/bin/sh").resolve()
    _place(shell, root / "bin/sh")
    directories = _copy_libraries(root, [shell, *objects], packages)
    _write_runscript(root, directories)
    say("compiling")
    compileall.compile_dir(
        root / "opt",
        quiet=2,
        maxlevels=20,
        workers=os.cpu_count() or 1,
        stripdir=str(root),
        prependdir="/",
        # Apptainer may change the times of files, by which a compiled module is otherwise judged.
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def _required(distribution: metadata.Distribution) -> Iterator[str]:
    from packaging.requirements import Requirement

    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


def _skeleton(root: Path) -> None:
    for directory in (
        "dev",
        "proc",
        "sys",
        "tmp",
        "etc",
        "run",
        "var/tmp",
        "usr/bin",
        PYTHON,
        SAMPLE,
        ".singularity.d",
    ):
        (root / directory).mkdir(parents=True, exist_ok=True)
    # Where /bin and /lib are links on this machine they are links in the image: paths that ldd tells hold in both.
    for name in ("bin", "lib", "lib32", "lib64", "libx32"):
        host = Path("/", name)
        if host.is_symlink():
            target = root / host.readlink().as_posix().lstrip("/")
            target.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(target.relative_to(root))
        elif host.is_dir():
            (root / name).mkdir(exist_ok=True)
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n", encoding="ascii"
    )
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n", encoding="ascii")
    (root / ".singularity.d/runscript.help").write_text(_HELP, encoding="ascii")


def _copy_python(root: Path) -> Iterator[Path]:
    """Copy the interpreter and its standard library; yield the originals that are linked with shared libraries."""
    home = root / PYTHON
    version = f"python{sysconfig.get_python_version()}"
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    _place(executable, home / "bin" / "python3")
    yield executable
    for kind in ("stdlib", "platstdlib"):
        # In a virtual environment platstdlib is the environment's own: the base prefix has the modules.
        library = Path(sysconfig.get_path(kind, vars={"base": sys.base_prefix, "platbase": sys.base_exec_prefix}))
        for path in _walk(library, _STDLIB_LEFT_OUT):
            target = home / "lib" / version / path.relative_to(library)
            if not target.exists():
                _place(path, target)
                if _is_shared_object(path):
                    yield path


def _package_files(found: Iterable[metadata.Distribution]) -> Iterator[tuple[Path, Path]]:
    """Yield each file that belongs in the image, and its place below the directory of packages."""
    for distribution in found:
        for entry in distribution.files or ():
            if ".." in entry.parts or entry.is_absolute() or any(map(_PACKAGES_LEFT_OUT.fullmatch, entry.parts)):
                continue
            path = Path(str(distribution.locate_file(entry)))
            if path.is_file():
                yield path.resolve(), Path(*entry.parts)


def _copy_packages(root: Path, packages: dict[Path, Path]) -> Iterator[Path]:
    for path, place in packages.items():
        # Bundled libraries are copied when something turns out to need them.
        if place.parts[0].endswith(".libs"):
            continue
        _place(path, root / SAMPLE / place)
        if _is_shared_object(path):
            yield path


def _copy_libraries(root: Path, objects: list[Path], packages: dict[Path, Path]) -> list[str]:
    """Copy what `objects` are linked with; return the directories in which the loader must look."""
    directories = {f"/{PYTHON}/lib": None}
    for library in sorted(_linked(objects, packages)):
        origin = library.resolve()
        if origin in packages:
            _place(origin, root / SAMPLE / packages[origin])
        elif _SYSTEM_LIBRARIES.match(str(library)):
            _place(origin, root / str(library).lstrip("/"))
            directories[str(library.parent)] = None
        else:
            _place(origin, root / PYTHON / "lib" / library.name)
    return list(directories)


def _linked(objects: list[Path], packages: dict[Path, Path]) -> set[Path]:
    libraries: set[Path] = set()
    for file, needed in _ldd(objects).items():
        missing = sorted(name for name, path in needed.items() if path is None)
        if missing and file in packages:
            raise SampleError(f"{file.name} needs {', '.join(missing)}, which this machine does not have")
        # A module of the standard library whose library is gone does not work here either.
        if not missing:
            libraries.update(path for path in needed.values() if path is not None)
    return libraries


def _ldd(objects: list[Path]) -> dict[Path, dict[str, Path | None]]:
    """Return for each of at least two objects the libraries that it needs and where the loader found them."""
    result = subprocess.run(  # noqa: S603 a fixed program; the arguments are paths of this environment
        ["ldd", *map(str, objects)],  # noqa: S607 wherever the system keeps it
        capture_output=True,
        text=True,
        timeout=_LDD_SECONDS,
        check=False,  # static programs among them make it fail
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
    )
    found: dict[Path, dict[str, Path | None]] = {}
    needed: dict[str, Path | None] = {}
    for line in result.stdout.splitlines():
        if line.startswith("/") and line.endswith(":"):
            needed = found.setdefault(Path(line[:-1]), {})
        elif match := _LDD_LINE.match(line):
            path = match["path"] or match["name"]
            if path == "not found" or path.startswith("/"):
                needed[match["name"]] = None if path == "not found" else Path(path)
    return found


def _write_runscript(root: Path, libraries: list[str]) -> None:
    path = root / ".singularity.d/runscript"
    path.write_text(_RUNSCRIPT.format(python=PYTHON, sample=SAMPLE, libraries=":".join(libraries)), encoding="utf-8")
    path.chmod(0o755)


def _walk(directory: Path, left_out: re.Pattern[str]) -> Iterator[Path]:
    for entry in sorted(directory.iterdir()):
        if left_out.fullmatch(entry.name):
            continue
        if entry.is_dir():
            yield from _walk(entry, left_out)
        elif entry.is_file():
            yield entry


def _is_shared_object(path: Path) -> bool:
    return path.name.endswith(".so") or ".so." in path.name


def _place(source: Path, target: Path) -> None:
    """Link the file where the file system, its owner and its mode allow it, else copy it, readable to everybody."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = source.resolve()
    mode = origin.stat().st_mode
    readable = stat.S_IRGRP | stat.S_IROTH
    executable = stat.S_IXGRP | stat.S_IXOTH if mode & stat.S_IXUSR else 0
    if mode & (readable | executable) == readable | executable:
        try:
            target.hardlink_to(origin)
        except OSError:
            pass
        else:
            return
    shutil.copyfile(origin, target)
    target.chmod(0o755 if executable else 0o644)
