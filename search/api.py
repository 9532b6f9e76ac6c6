"""Run studies from Python: what the commands do, with their options as keywords.

``Space.search`` and ``tunefleet.resume`` are the public names; ``tunefleet`` looks them up here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from tunefleet.cli import expanded, kept_environment, shown
from tunefleet.models.checks import nearest
from tunefleet.models.imports import is_importing
from tunefleet.models.origin import pickled, with_source
from tunefleet.models.space import Space
from tunefleet.search import running
from tunefleet.search.options import HELP, StudyOptions, check_given
from tunefleet.search.scheduler import failed_alike
from tunefleet.search.session import Session
from tunefleet.search.wandb_options import NAMES, take_flags
from tunefleet.store import Store
from tunefleet.study import Study
from tunefleet.trainables.own_images import reference_of

NOT_OPTIONS = ("space", "points")
OF_THE_STUDY = ("study_dir", "storage", "dry_run")
OF_WANDB = ("wandb", "wandb_sweep", *(f"wandb_{name}" for name in NAMES))


@kept_environment()
def search(space: Space, **options: Any) -> Any:
    """Search a space, retrain the winner and test it; return the finished study.

    Args:
        space: What is searched.
        options: Those of ``tunefleet search``, by the names of its flags: ``data``, ``trials``, ….
            ``data`` may also be a function that returns images, or what it returned. With ``dry_run=True``
            nothing is written, and the forecast is returned.

    Raises:
        ValueError: An option is unknown or impossible, or the study cannot run.
        KeyboardInterrupt: It was stopped; its folder is printed, and it can be resumed.
        RuntimeError: It stopped for another reason; it can be resumed.
    """
    if is_importing():
        raise ValueError(
            f"{space.name}.search() is called when its file is imported, which workers do, too; put the call "
            "under: if __name__ == '__main__':"
        )
    known = [*(name for name in HELP if name not in NOT_OPTIONS), *OF_THE_STUDY, *OF_WANDB]
    for name in options:
        if name not in known:
            raise ValueError(f"{name} is no option{nearest(name, known)}")
    how: dict[str, Any] = {"wandb": _wandb(options)}
    given = {name: options.pop(name) for name in OF_THE_STUDY if name in options}
    space = with_source(space)
    check_given(space, options)
    how["images"] = _take_images(options)
    checked = StudyOptions(space, **{name: _plain(value) for name, value in options.items()})
    folder = Path(study_dir) if (study_dir := given.get("study_dir")) else None
    how |= {"dry_run": bool(given.get("dry_run")), "storage": _plain(given.get("storage"))}
    session = _run(lambda session: running.start(checked, folder, session, **how))
    return session.forecast if how["dry_run"] else _opened(session, space)


@kept_environment()
def resume(location: Path | str, *, space: Space | None = None, **options: Any) -> Study:
    """Continue a study; return it once it is finished.

    Args:
        location: Its folder or URL.
        space: The study's, where it was made in a notebook.
        options: Those of ``tunefleet resume``, by the names of its flags.

    Raises:
        ValueError: It cannot be resumed as asked.
        KeyboardInterrupt: It was stopped; it can be resumed again.
        RuntimeError: It stopped for another reason; it can be resumed again.
    """
    how: dict[str, Any] = {"wandb": _wandb(options), "images": _take_images(options)}
    changes = {name: _plain(value) for name, value in options.items()}
    if space is not None and space.source is None:
        space = pickled(space)
    if local := Store(str(location)).folder:
        location = expanded("study", local)
    session = _run(lambda session: running.resume(location, changes, session, space=space, **how))
    return _opened(session, space)


def _run(work: Callable[[Session], int]) -> Session:
    """Run or resume a study; afterwards Ray runs only if it did before."""
    ours, session = not ray.is_initialized(), Session(Console())
    try:
        code = session.stops.run(lambda: work(session))
    finally:
        if ours and ray.is_initialized():
            ray.shutdown()
    if code == 3:
        if session.stops.was_signalled:
            raise KeyboardInterrupt
        folder = session.studies[-1]
        if not (folder / "study.json").exists() or not failed_alike(Study(folder).searched):
            raise RuntimeError(f"the study has stopped; resume it: tunefleet.resume({shown(folder)!r})")
    return session


def _opened(session: Session, space: Space | None) -> Study:
    """Return the study that has run, with its space where that is of a notebook."""
    study = Study(session.studies[-1])
    study.space = space if space and space.source.pickled else None
    return study


def _take_images(options: dict[str, Any]) -> Any:
    """Return ``data`` where it is no name, and put one in its place."""
    images = options.get("data")
    if images is None or isinstance(images, str | os.PathLike):
        return None
    options["data"] = reference_of(images)
    return images


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _wandb(options: dict[str, Any]) -> dict[str, Any]:
    """Move W&B's options out of the others, and its key out of the environment; return both by field."""
    given = {name: options.pop(name) for name in OF_WANDB if name in options}
    return take_flags({"wandb_mode" if name == "wandb" else name: value for name, value in given.items()})
