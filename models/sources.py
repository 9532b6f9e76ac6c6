"""Load a space from a person's file, and take its sources to where trials run.

A file's own imports (``import helper`` beside ``mine.py``) are resolved in its folder, as when Python runs
it. But its modules get names of their own in this process, ``tunefleet_space_….helper``: two files whose
neighbours have equal names share nothing, and a file that was edited is another one. They travel as text,
never pickled; a space that has no file, such as one of a notebook, is pickled by cloudpickle.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import itertools
import os
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from ray import cloudpickle

from tunefleet.cli import expanded, printable, shown
from tunefleet.models.checks import nearest
from tunefleet.models.imports import PREFIX, import_module, is_neighbour
from tunefleet.models.space import Space, builder_name

BUILT_IN = "tunefleet.models.spaces"  # the module of the thirteen, in its SPACES
INSTALLED = {"site-packages", "dist-packages"}  # folders
_numbers = itertools.count(1)
_spaces: dict[tuple[str | None, ...], Space] = {}  # that a worker has imported, by hash and variable


class NoSpaceError(ValueError):
    """A module has no space of that name."""


@dataclass(frozen=True)
class Source:
    """Where a space comes from, and what another process needs to have it.

    Attributes:
        reference: As ``--space`` takes it.
        name: The space's.
        module: Dotted, below the sources' folder where there are files.
        variable: In the module; a dict of spaces has it under ``key``.
        key: See ``variable``.
        files: Texts of the sources, by path below their folder; none of what is installed everywhere.
        versions: Of the installed package that has the space: ``{"package": "1.0, sha256 …"}``.
        pickled: The space itself, where no file has it.
    """

    reference: str
    name: str
    module: str = ""
    variable: str = ""
    key: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    pickled: bytes | None = field(default=None, repr=False)
    package: str = field(default="", compare=False)  # of the modules in this process
    folder: str = field(default="", compare=False)  # of the person's files; empty in another process
    data_dir: str = field(default="", compare=False)  # under which another node's processes write the files
    essence: tuple[Any, ...] | None = field(default=None, compare=False, repr=False)  # of the space

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what may be pickled by reference only."""
        return {**vars(self), "essence": None}

    def to_dict(self) -> dict[str, Any]:
        """Return what a study records of it: hashes of its files, whose copies lie beside it."""
        return {
            **{name: getattr(self, name) for name in ("reference", "name", "module", "variable", "folder")},
            "files": {name: _sha256(text) for name, text in sorted(self.files.items())},
            "versions": dict(self.versions),
            "pickled": self.pickled is not None,
        }

    @property
    def is_built_in(self) -> bool:
        """Return whether it is one of this project's."""
        return self.module == BUILT_IN

    @property
    def sha256(self) -> str:
        """Return a hash of the sources, empty for those of this project."""
        if not (self.files or self.versions or self.pickled):
            return ""
        digest = hashlib.sha256(self.pickled or b"")
        for name, text in [*sorted(self.files.items()), *sorted(self.versions.items())]:
            digest.update(f"{name}\0{text}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def space(self) -> Space:
        """Return the space; its files are written below the data folder first.

        Raises:
            ValueError: It cannot be imported.
        """
        sha256 = self.sha256
        key = (sha256 or self.reference, self.module, self.variable, self.key)
        if key not in _spaces:
            if self.pickled:
                found = Space(**cloudpickle.loads(self.pickled))
            elif self.files:
                folder = self._written(expanded("--data-dir", self.data_dir))
                found = self._in(import_module(folder, self.module, PREFIX + sha256[:16]))
            else:
                found = self._in(importlib.import_module(self.module))
            _spaces[key] = replace(found, name=self.name, source=replace(self, essence=None))
        return _spaces[key]

    def _in(self, module: ModuleType) -> Space:
        found = getattr(module, self.variable)
        space: Space = found if self.key is None else found[self.key]
        return space

    def _written(self, data_dir: Path) -> Path:
        folder = data_dir / "spaces" / self.sha256[:16]
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as name:
                new = Path(name) / "new"
                write(self.files, new)
                try:
                    new.rename(folder)
                except OSError:
                    if not folder.exists():  # else another worker was faster
                        raise
        return folder


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def restored(recorded: Mapping[str, Any], folder: Path, data_dir: str) -> tuple[Space, str]:
    """Return the space of a study, from the copy of its sources, and a line where the originals differ.

    Args:
        recorded: What ``Source.to_dict`` returned.
        folder: Of the copy.
        data_dir: Under which the sources are imported.

    Raises:
        ValueError: The copy is damaged, or the space has no sources.
    """
    if recorded["pickled"]:
        raise ValueError(
            f"the space {recorded['name']} is of a notebook; resume by tunefleet.resume(folder, space=space)"
        )
    files: dict[str, str] = {}
    for name, sha256 in recorded["files"].items():
        try:
            files |= _read(folder, [folder / name])
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read ({error.strerror}); restore it") from error
        if _sha256(files[name]) != sha256:
            raise ValueError(f"{folder / name} is not what the study began with; restore it from a copy")
    names = ("reference", "name", "module", "variable")
    source = Source(
        **{name: recorded[name] for name in names},
        files=files,
        versions=recorded["versions"],
        data_dir=data_dir,
    )
    changed = [name for name in files if _differs(Path(recorded["folder"], name), recorded["files"][name])]
    line = f"{', '.join(changed)} differs from the study's copy, which is used" if changed else ""
    try:
        if recorded["versions"] and _versions(recorded["module"].partition(".")[0]) != recorded["versions"]:
            line = f"the installed {recorded['module']} is not the one that the study began with; it is used"
        return source.space(), line
    except (Exception, SystemExit) as error:  # whatever a person's module raises
        raise ValueError(f"{shown(folder)} cannot be imported: {describe(error)}; fix it") from error


def _differs(file: Path, sha256: str) -> bool:
    try:
        return _sha256(file.read_text("utf-8", "surrogateescape")) != sha256
    except OSError:
        return False  # it is not here


def write(files: Mapping[str, str], folder: Path) -> None:
    """Write sources below a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def find(reference: str, built_in: Mapping[str, Space]) -> Space:
    """Return the space that ``--space`` names: one of the project's, or of a file or module.

    Args:
        reference: NAME, FILE.py, FILE.py:VARIABLE or package.module:VARIABLE.
        built_in: The project's own.

    Raises:
        ValueError: There is none, or its code fails.
    """
    if reference in built_in:
        return built_in[reference]
    location, _, variable = reference.rpartition(":") if ":" in reference else (reference, "", "")
    if ":" not in reference and not _is_file_name(location):
        beside = (
            f"; {reference}.py is here: give --space {reference}.py"
            if Path(f"{reference}.py").is_file()
            else ""
        )
        raise ValueError(f"--space={printable(reference)} is unknown{beside or nearest(reference, built_in)}")
    folder, module = _locate("--space", reference, location, f"give one, or: {_names(built_in)}")
    return load_space(reference, folder, module, variable)


def find_function(reference: str) -> tuple[Callable[..., Any], Path | None]:
    """Return the function that ``--data`` names, and the folder of its file; None: it is installed.

    Args:
        reference: FILE.py:FUNCTION or package.module:FUNCTION.

    Raises:
        ValueError: There is none, or importing it fails.
    """
    location, _, name = reference.rpartition(":")
    folder, module_name = _locate("--data", reference, location, "give FILE.py:FUNCTION, or images")
    module = _module("--data", reference, folder, module_name, f"{PREFIX}{next(_numbers)}")
    function = getattr(module, name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if isinstance(value, FunctionType)]
        raise ValueError(f"--data={printable(reference)}: {name} is no function{nearest(name, names)}")
    return function, folder


def is_installed(file: Path) -> bool:
    """Return whether a file is of an installed package."""
    return bool(INSTALLED & set(file.parts))


def _is_file_name(location: str) -> bool:
    return location.endswith(".py") or os.sep in location


def _locate(flag: str, reference: str, location: str, instead: str) -> tuple[Path | None, str]:
    """Return the folder of a person's module, None where it is installed, and the module's name in it.

    Raises:
        ValueError: There is none.
    """
    if _is_file_name(location):
        file = Path(os.path.abspath(os.path.expanduser(location)))  # noqa: PTH100, PTH111
        if not file.is_file():
            raise ValueError(f"{flag}={printable(reference)}: there is no such file; {instead}")
        return file.parent, file.stem
    top = location.partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top, [os.getcwd(), *sys.path])  # noqa: PTH109
    if spec is None:
        raise ValueError(
            f"{flag}={printable(reference)}: there is no module {top} here; install it, or give a file"
        )
    origin = Path(spec.origin or next(iter(spec.submodule_search_locations or [""])))
    if is_installed(origin):
        return None, location
    is_package = spec.submodule_search_locations is not None
    return origin.parents[1] if is_package and origin.is_file() else origin.parent, location


def _module(flag: str, reference: str, folder: Path | None, name: str, package: str) -> ModuleType:
    """Import a person's module, or an installed one.

    Raises:
        ValueError: Its code fails.
    """
    try:
        return import_module(folder, name, package) if folder else importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever a person's module raises
        why = describe(error, folder)
        raise ValueError(f"{flag}={printable(reference)} cannot be imported: {why}; fix it") from error


def _names(built_in: Mapping[str, Space]) -> str:
    return ", ".join(built_in)


def load_space(reference: str, folder: Path | None, module_name: str, variable: str) -> Space:
    """Import a person's module and return its space.

    Args:
        reference: As ``--space`` takes it.
        folder: In which the module is; None: it is installed.
        module_name: Dotted.
        variable: Empty: the only space.

    Raises:
        NoSpaceError: The variable is none.
        ValueError: The module's code fails.
    """
    if folder is None:
        return _installed(reference, module_name, variable)
    package = f"{PREFIX}{next(_numbers)}"
    module = _module("--space", reference, folder, module_name, package)
    variable = variable or _only_space(reference, module)
    space = getattr(module, variable, None)
    if not isinstance(space, Space):
        raise NoSpaceError(
            f"--space={printable(reference)}: {variable} is no Space{nearest(variable, _spaces_in(module))}"
        )
    name = space.name
    if name == builder_name(space):
        name = module_name.rpartition(".")[2] if variable == "space" else variable
    source = Source(reference, name, module_name, variable, package=package, folder=str(folder))
    return collected(replace(space, name=name, source=source))


def collected(space: Space) -> Space:
    """Return a person's space with all sources that its modules have imported, or name in an import.

    Raises:
        ValueError: One of them is no Python source.
    """
    source = space.source
    if source is None or not source.package:
        return space
    folder = Path(source.folder)
    files: dict[str, str] = {}
    found: list[Path] = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not name.startswith(f"{source.package}.") or file is None:
            continue
        if not file.endswith(".py"):
            raise ValueError(f"--space={source.reference} imports {file}, which is no Python source")
        found.append(Path(file))
    while found:
        new = {name: text for name, text in _read(folder, found).items() if name not in files}
        files |= new
        named = [top for text in new.values() for top in _imports(text) if is_neighbour(source.package, top)]
        tops = {*named, *(Path(name).parts[0] for name in new if "/" in name)}
        # of a package its lazily imported parts, too
        found = [f for top in tops for f in (folder / f"{top}.py", *(folder / top).rglob("*.py"))]
        found = [f for f in found if f.is_file() and f.relative_to(folder).as_posix() not in files]
    return replace(space, source=replace(source, files=files))


def _imports(text: str) -> set[str]:
    """Return the top names of all that a source imports, inside functions too; relative ones aside."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError):
        return set()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def _read(folder: Path, files: list[Path]) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file.read_text("utf-8", "surrogateescape") for file in files}


def _installed(reference: str, module_name: str, variable: str) -> Space:
    """Return the space of an installed package, which every node has to have in the same version."""
    module, top = _module("--space", reference, None, module_name, ""), module_name.partition(".")[0]
    space = getattr(module, variable or _only_space(reference, module), None)
    if not isinstance(space, Space):
        raise ValueError(f"--space={printable(reference)}: {variable} is no Space")
    source = Source(reference, space.name, module_name, variable, versions=_versions(top))
    return replace(space, source=source)


def _versions(top: str) -> dict[str, str]:
    """Return the version of an installed package or module, and a hash of its sources."""
    module, digest = importlib.import_module(top), hashlib.sha256()
    folders = list(getattr(module, "__path__", []))
    files = sorted(Path(folders[0]).rglob("*.py")) if folders else [Path(str(module.__file__))]
    for file in files:
        digest.update(file.read_bytes())
    names = importlib.metadata.packages_distributions().get(top, [])
    return {name: importlib.metadata.version(name) for name in names} | {top: digest.hexdigest()}


def _spaces_in(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, Space)]


def _only_space(reference: str, module: ModuleType) -> str:
    """Return the variable of a module's only space.

    Raises:
        ValueError: It has none, or several.
    """
    names = _spaces_in(module)
    if len(names) == 1:
        return names[0]
    where = printable(reference)
    if names:
        raise ValueError(f"--space={where} has {len(names)} spaces; give one: {where}:{names[0]}, …")
    raise ValueError(f"--space={where} has no Space; write for example: space = Space(build, ranges)")


def describe(error: BaseException, folder: Path | None = None) -> str:
    """Return an error of a person's code in a line: file and line number, class and text.

    Args:
        error: What was raised.
        folder: Of the person's files; None: all that is not installed is theirs.
    """
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not INSTALLED & set(Path(frame.filename).parts)
        and not Path(frame.filename).is_relative_to(sysconfig.get_path("stdlib"))
        and (folder is None or Path(frame.filename).is_relative_to(folder))
    ]
    where = f"{shown(Path(theirs[-1].filename))} line {theirs[-1].lineno}: " if theirs else ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{shown(Path(error.filename))} line {error.lineno}: "
    text = " ".join(str(getattr(error, "msg", None) or error).split())
    return printable(f"{where}{type(error).__name__}{': ' + text if text else ''}")
