"""Where does a space of this process come from: a file that workers can import, or nowhere but here?"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ray import cloudpickle

from tunefleet.cli import shown
from tunefleet.models.sources import NoSpaceError, Source, is_installed, load_space
from tunefleet.models.space import Space


def with_source(space: Space) -> Space:
    """Return a space that other processes can have: of its file, else pickled."""
    return space if space.source else of_module(space) or pickled(space)


def of_module(space: Space) -> Space | None:
    """Return a space as the file has it of the script that Python runs, or of a module; None: no file does.

    The module is imported a second time, under a name of its own: workers have no ``__main__`` of this
    script, and other nodes no such module.
    """
    for module in [sys.modules["__main__"], *list(sys.modules.values())]:
        names = [name for name, value in list(vars(module).items()) if value is space]
        file = _file(module)
        if names and file:
            found = _imported_again(module.__name__, file, names[0])
            return found if found and _is_same(found, space) else None
    return None


def _file(module: ModuleType | None) -> Path | None:
    file = Path(getattr(module, "__file__", None) or "").absolute()
    return file if file.is_file() else None


def _imported_again(name: str, file: Path, variable: str) -> Space | None:
    """Import a module a second time; return its space, None where it then makes none."""
    is_package = file.stem == "__init__"
    dotted = file.stem if name == "__main__" else name
    folder = None if is_installed(file) else file.parents[dotted.count(".") + is_package]
    reference = f"{dotted}:{variable}" if "." in dotted or folder is None else shown(file)
    try:
        return load_space(reference, folder, dotted, variable)
    except NoSpaceError:  # it is made under `if __name__ == "__main__"`
        return None


def _is_same(found: Space, space: Space) -> bool:
    """Return whether two spaces of one text have the same values."""
    names = [f.name for f in dataclasses.fields(space) if f.name not in ("ranges", "name", "source")]
    plain = [name for name in names if not callable(getattr(space, name))]
    return found.described() == space.described() and all(
        getattr(found, name) == getattr(space, name) for name in plain
    )


def pickled(space: Space) -> Space:
    """Return a space that has no file with a source that holds all of it."""
    fields = {
        f.name: getattr(space, f.name) for f in dataclasses.fields(space) if f.init and f.name != "source"
    }
    with _by_value(space.run or space.build):
        return replace(space, source=Source(space.name, space.name, pickled=cloudpickle.dumps(fields)))


@contextlib.contextmanager
def _by_value(theirs: Any) -> Iterator[None]:
    """Context manager: pickle what is used of the modules of a person's folder, which no worker has."""
    module = sys.modules.get(getattr(theirs, "__module__", ""))
    file, modules = _file(module), []
    if file and not is_installed(file) and theirs.__module__ != "__main__":
        modules = [
            other
            for other in list(sys.modules.values())
            if (beside := _file(other)) and beside.is_relative_to(file.parent) and not is_installed(beside)
        ]
    for other in modules:
        cloudpickle.register_pickle_by_value(other)
    try:
        yield
    finally:
        for other in modules:
            cloudpickle.unregister_pickle_by_value(other)
