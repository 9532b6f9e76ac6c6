"""Import a person's module under a package name of this process, with its folder first.

Only import statements are redirected: ``importlib.import_module("helper")`` looks in ``sys.path``.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PREFIX = "tunefleet_space_"
_importing: list[str] = []  # packages of modules that are being imported
_folders: dict[str, str] = {}  # of sources in this process, by the name of their package


def is_importing() -> bool:
    """Return whether a person's module is being imported: nothing that it calls may start a study."""
    return bool(_importing)


def import_module(folder: Path, module: str, package: str) -> ModuleType:
    """Import a module of a folder under a package name of its own."""
    _importing.append(package)
    try:
        return _imported(folder, module, package)
    finally:
        _importing.pop()


def _imported(folder: Path, module: str, package: str) -> ModuleType:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _folders[package] = str(folder)
    importlib.invalidate_caches()
    return importlib.import_module(f"{package}.{module}")


class _Finder(importlib.abc.MetaPathFinder):
    """Find the modules of people's folders, which are packages of this process only."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return where a module is; None: it is none of theirs."""
        package, _, rest = fullname.partition(".")
        if package not in _folders:
            return None
        if not rest:
            spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [_folders[package]]
            return spec
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        if found and isinstance(found.loader, importlib.machinery.SourceFileLoader):
            found.loader = _Loader(fullname, str(found.origin))
        return found


class _Loader(importlib.machinery.SourceFileLoader):
    """Run a module whose imports find its neighbours first."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code."""
        package = module.__name__.partition(".")[0]

        def find_neighbours_first(
            name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
        ) -> Any:
            top = name.partition(".")[0]
            if level or not is_neighbour(package, top):
                return builtins.__import__(name, globals, locals, fromlist, level)
            found = builtins.__import__(f"{package}.{name}", globals, locals, fromlist, 0)
            return found if fromlist else getattr(found, top)

        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": find_neighbours_first}
        super().exec_module(module)

    def get_code(self, fullname: str) -> Any:
        """Compile the source; no cached bytecode, which knows a file by its time of change only."""
        return self.source_to_code(self.get_data(self.path), self.path)


def is_neighbour(package: str, name: str) -> bool:
    """Return whether a name is a module beside a person's file; none of this project and of Python is."""
    if name == "tunefleet" or name in sys.stdlib_module_names:
        return False
    spec = importlib.machinery.PathFinder.find_spec(name, [_folders[package]])
    if spec is None:
        return False
    if spec.origin is None:  # a folder without __init__.py: of Python sources, or of something else
        return any(Path(_folders[package], name).glob("*.py"))
    return True
