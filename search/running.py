"""Run a study: check its options, prepare, train the trials, test the winner. One road for all studies.

``start`` and ``resume`` differ in where the options come from; what follows is the same for a search, a
learning-rate study and recorded curves, new or resumed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from tunefleet.cli import expanded, megabytes, shell
from tunefleet.host import hidden_by_environment
from tunefleet.lease import NAME as LEASE
from tunefleet.mirror import fetch_study
from tunefleet.models.sources import collected
from tunefleet.models.space import Space
from tunefleet.models.spaces import recorded_space
from tunefleet.search.connection import RayWatch, connect, is_local
from tunefleet.search.display import phase, print_text, say
from tunefleet.search.options import EXTENDING, RESUMABLE, StudyOptions, check_given, flag
from tunefleet.search.session import Session
from tunefleet.search.wandb_options import WandbOptions
from tunefleet.search.wandb_options import choose as choose_wandb
from tunefleet.store import BRIEF_SECONDS, Store, reason
from tunefleet.study import Study, lock_study
from tunefleet.trainables.data import BUILT_IN, ImageData, Progress, check_sha256
from tunefleet.trainables.own_images import OwnImages, is_function, load_images
from tunefleet.trainables.preparation import prepare

PROGRESS_SECONDS = 0.5  # between looks at how far another process is

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One study that is to run.

    Attributes:
        folder: The study's; new, or as it was left.
        wandb: What is uploaded to W&B.
        shared: The folder or URL that all nodes of a cluster must see; None: none was given.
        earlier: The study as it was left; None: it is new.
        changes: Options that were given when it was resumed.
        images: A function that returns images, or what it returned; None: ``options.data`` names them.
    """

    options: StudyOptions
    folder: Path
    wandb: WandbOptions
    shared: str | None
    dry_run: bool = False
    earlier: Study | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    images: Any = None


def start(
    options: StudyOptions,
    folder: Path | None,
    session: Session,
    *,
    dry_run: bool = False,
    wandb: Mapping[str, Any] | None = None,
    storage: str | None = None,
    images: Any = None,
) -> int:
    """Run a new study; return the exit code.

    Args:
        options: The study's.
        folder: The study's, new or empty; None: one under studies/.
        session: The command.
        dry_run: Forecast the study and write nothing.
        wandb: The fields of WandbOptions that were given.
        storage: Where studies are kept: a folder, or an object store's URL, in which case the study's
            folder here is a copy. None: under studies/, or in ``folder``.
        images: As Request has them.

    Raises:
        ValueError: The study cannot run as asked; nothing was written.
    """
    shared = storage or (str(folder.absolute().parent) if folder else None)
    if storage and Store(storage).folder is None:
        options = dataclasses.replace(options, storage=storage)
    elif storage and folder:
        raise ValueError(f"--storage={storage} is a folder, and so is --study-dir={folder}; give one of them")
    under = Path("studies") if options.storage or not storage else expanded("--storage", storage)
    data = options.data if options.space.trains_images else ""
    folder = expanded("--study-dir", folder) if folder else default_folder(options.space.name, data, under)
    check_free(folder)
    check_storage(options.storage, folder.name)
    request = Request(_absolute(options), folder, choose_wandb(wandb or {}), shared, dry_run, images=images)
    return run(request, session)


def resume(
    location: Path | str,
    changes: Mapping[str, Any],
    session: Session,
    *,
    wandb: Mapping[str, Any] | None = None,
    extend: bool = False,
    space: Space | None = None,
    images: Any = None,
) -> int:
    """Continue a study; return the exit code.

    Args:
        location: The study's folder, or its URL.
        changes: New values of options that change no result.
        session: The command.
        wandb: The fields of WandbOptions that were given; the others stay as they were.
        extend: The study is done, and the changes add to it.
        space: The study's, where it has no sources; None: as the study has it.
        images: As Request has them.

    Raises:
        ValueError: There is no study, it is done, or it cannot continue as asked.
    """
    folder = Path(os.path.realpath(fetch_study(str(location))))
    study = Study(folder)
    fixed = [flag(name) for name in changes if name not in (*RESUMABLE, *EXTENDING)]
    if fixed and not extend:
        allowed = ", ".join(flag(name) for name in (*RESUMABLE, *EXTENDING))
        raise ValueError(f"{', '.join(fixed)} cannot change when a study is resumed; what can: {allowed}")
    extends = extend or _grows(study, changes)
    if study.status == "done" and not extends:
        raise ValueError(
            f"{folder} is done; there is nothing to resume; for more, give a larger --trials or "
            "--final-seeds than it has"
        )
    lock_study(folder).release()  # before anything slow: another process may be running it
    if space is None:
        data_dir = changes.get("data_dir") or study.spec["options"].get("data_dir", "")
        space, line = recorded_space(study.spec, study.folder, data_dir)
        say(line, session.console)
    check_given(space, changes)
    values = study.spec["options"] | changes | {"space": space}
    options = _absolute(_from_file(StudyOptions, values, folder))
    shared = options.storage or str(folder.parent)
    uploads = choose_wandb(wandb or {}, study.spec.get("wandb"))
    return run(Request(options, folder, uploads, shared, False, study, changes, images), session)


def _grows(study: Study, changes: Mapping[str, Any]) -> bool:
    """Return whether changes ask for more trials, or more seeds of the winner, than a study has.

    Raises:
        ValueError: They ask for fewer, or for more of given points.
    """
    options = study.spec["options"]
    if "trials" in changes and options.get("points"):
        raise ValueError("--trials: this study runs given points; give a learning-rate study --extend")
    grows = False
    for name in EXTENDING:
        asked, has = changes.get(name), options.get(name) or 0
        if asked is not None and asked < has:
            raise ValueError(f"{flag(name)}={asked} is fewer than the study's {has}; give more")
        grows |= asked is not None and asked > has
    return grows


def run(request: Request, session: Session) -> int:
    """Run a study; return the exit code.

    Raises:
        ValueError: The study cannot run as asked; of a new one nothing was written.
    """
    session.stops.change(session.stops.nothing_yet)  # an earlier study of this command had another answer
    session.studies.append(request.folder)
    ours = not ray.is_initialized()
    try:
        if not is_local():
            _start_ray(session, 0, request.options.device)
        return _checked(request, session)
    except ValueError:
        if ours and ray.is_initialized():  # a user's mistake leaves no Ray behind
            session.stops.change(session.stops.nothing_yet)  # nobody watches a Ray that is to end
            ray.shutdown()
        raise


def _checked(request: Request, session: Session) -> int:
    """Look at the device, the data and the nodes, prepare the inputs, and run the study."""
    with phase(session.console, "importing torch"):
        from tunefleet.search import execution, preflight, resources
        from tunefleet.search.nodes import check_nodes

    say("" if request.earlier else request.options.moved, session.console)
    console, earlier, source = session.console, request.earlier, _source(request, session.console)
    with phase(console, "looking at the device"):
        options, settings, machine = _device(request, source, console)
    data = _read_images(request, options, source, console) if options.space.trains_images else None
    del source  # which may hold arrays for as long as the study runs
    options = dataclasses.replace(options, space=_examined(options, data, console))
    if earlier and data:
        version = earlier.spec["data"].get("format_version", 1)  # of how images are decoded
        check_sha256(data, options.data, earlier.spec["data_sha256"], version)
    share = resources.plan(options, settings, machine)
    say(resources.waiting(options, share), console)
    input_bytes = preflight.inputs_bytes(options, data, settings) if data else 0
    if earlier is None or "device" in request.changes:
        settings, line = resources.place_inputs(settings, share, input_bytes, machine.gpu_bytes)
        say(line, console)
    if machine.nodes and data:
        check_nodes(options, request.shared, data, settings, console)
    if machine.nodes or settings.device == "cuda" or not request.dry_run:
        _start_ray(session, share.slots if share.workers > 1 else 0, settings.device)
    prepared = None
    if data:
        title = f"preparing inputs, at most {megabytes(input_bytes)}"
        with phase(console, "timing a sample" if request.dry_run else title) as progress:
            threads = share.threads if request.dry_run else None
            arguments = (options, data, settings, threads)
            if machine.nodes or settings.device == "cuda":  # in a process whose end frees the GPU's memory
                prepared = _on_a_node(share.of_worker, preflight.prepare, progress)(*arguments)
            else:
                prepared = preflight.prepare(*arguments, progress)
        share, line = resources.fit_memory(share, prepared.peak_bytes, prepared.gpu_bytes)
        say(line, console)
        if not earlier and not options.storage:
            preflight.check_disk(request.folder, *preflight.disk_needed(options, share, prepared))
    if request.dry_run:
        session.forecast.update(preflight.forecast(options, share, prepared))
        return preflight.print_forecast(options, request.folder, share, data, settings, prepared, console)
    ready = execution.Ready(options, request.folder.resolve(), data, settings, share)
    if earlier is None:
        with session.stops.held(functools.partial(execution.tell_stopped, ready.folder, session)):
            check_free(request.folder)
            execution.create(ready, prepared)
    return execution.run(ready, session, request.wandb, request.changes)


def _source(request: Request, console: Console) -> str | OwnImages:
    """Return what images are read from; a function is called now, once, unless the study has its images."""
    reference = request.options.data
    if request.images is None and (request.earlier or reference in BUILT_IN or not is_function(reference)):
        return reference
    with phase(console, f"opening {reference}"):
        return load_images(reference, request.images)


def _device(request: Request, source: str | OwnImages, console: Console) -> tuple[StudyOptions, Any, Any]:
    """Return the options with what depends on the device, the device settings and the machine."""
    from tunefleet.search import preflight, resources
    from tunefleet.trainables.device import DeviceSettings

    options, earlier = request.options, request.earlier
    before = _from_file(DeviceSettings, earlier.spec["levers"], request.folder) if earlier else None
    if before and "device" not in request.changes:
        machine = resources.find_machine(before.device)
        resources.check_device(before, machine)
        return options, before, machine
    settings, machine = resources.look_at_device(options, resources.find_machine(options.device))
    if before:
        if settings != before:
            say(
                f"trained on {before.device} {before.precision} so far, continues on {settings.device} "
                f"{settings.precision}: numbers may differ from those of one device",
                console,
            )
        return options, settings, machine
    if settings.device == "cpu" and options.device == "auto" and hidden_by_environment():
        say("CUDA_VISIBLE_DEVICES hides every GPU: training on CPUs", console)
    if options.space.trains_images:
        options = preflight.settle_image_size(options, settings, machine, source)
    return resources.settle(options, settings, machine), settings, machine


def _examined(options: StudyOptions, data: ImageData | None, console: Console) -> Space:
    """Return the study's space with what one batch shows of its network, and all of its sources.

    Raises:
        ValueError: The network cannot be built or trained, or the weights do not fit.
    """
    from tunefleet.search.preflight import check_network, example
    from tunefleet.trainables.examine import examine

    space = options.space
    if data and space.source and space.source.is_built_in:
        check_network(options, data)
        return space
    if data:
        with phase(console, "looking at the network"):
            space = examine(example(options), data)
    space = collected(space)
    assert space.source is not None
    return dataclasses.replace(space, source=dataclasses.replace(space.source, data_dir=options.data_dir))


def _from_file(kind: Callable[..., T], values: Mapping[str, Any], folder: Path) -> T:
    """Return what a part of a study.json describes.

    Raises:
        ValueError: It has other entries, those of another version.
    """
    try:
        return kind(**values)
    except (TypeError, LookupError) as error:
        raise ValueError(f"{folder / 'study.json'} is of another version ({error}); use that one") from None


def _read_images(
    request: Request, options: StudyOptions, source: str | OwnImages, console: Console
) -> ImageData:
    """Return a study's images, decoded now unless they are already.

    Raises:
        ValueError: They cannot be read.
    """
    assert options.image_size is not None
    earlier = None
    if request.earlier and "data" not in request.changes and is_function(options.data):
        earlier = _from_file(ImageData.from_dict, {"fields": request.earlier.spec["data"]}, request.folder)
    with phase(console, f"reading {options.data}") as progress:
        data_dir = Path(options.data_dir)
        data = prepare(source, data_dir, options.image_size, progress, earlier=earlier)
    for note in data.notes:
        print_text(console, note)
    return data


def _start_ray(session: Session, trial_slots: int, device: str) -> None:
    """Start or join Ray, before a study's folder is written: a failure leaves nothing behind."""
    with phase(session.console, "starting Ray"):
        connect(trial_slots, device=device)
    session.stops.change(session.stops.nothing_yet, RayWatch())


def _on_a_node(
    share: Mapping[str, float], function: Callable[..., T], progress: Progress
) -> Callable[..., T]:
    """Return a function that runs where trials will: in a process of its own, on a node of the cluster.

    The driver's node may have no GPU, and few CPUs to compute features with. Ray ends the process of a task
    that had a GPU (2.60), which gives its memory back.

    Args:
        share: What the process gets.
        function: Takes a further argument, to be called with its progress.
        progress: Gets what it is called with.
    """
    task = ray.remote(function).options(num_cpus=share["CPU"], num_gpus=share.get("GPU", 0))

    def call(*arguments: Any) -> T:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        running = task.remote(*arguments, functools.partial(_put, queue))
        try:
            while not ray.wait([running], timeout=PROGRESS_SECONDS)[0]:
                for step in queue.get_nowait_batch(queue.qsize()):
                    progress(*step)
            return ray.get(running)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise ValueError(str(error.cause)) from error
            raise
        finally:
            queue.shutdown(force=True)

    return call


def _put(queue: Queue, *step: Any) -> None:
    queue.put_nowait(step)


def _absolute(options: StudyOptions) -> StudyOptions:
    """Return options whose paths are absolute: a node, or a resume, may have another working directory."""
    paths: dict[str, Any] = {"data_dir": str(expanded("--data-dir", options.data_dir).absolute())}
    names_function = options.data not in BUILT_IN and is_function(options.data)
    file, colon, function = options.data.rpartition(":") if names_function else (options.data, "", "")
    if file and file not in BUILT_IN and (data := expanded("--data", file)).exists():
        paths["data"] = f"{data.absolute()}{colon}{function}"
    if (weights := expanded("--weights", options.weights)).is_file():
        paths["weights"] = str(weights.absolute())
    return dataclasses.replace(options, **paths)


def check_free(folder: Path) -> None:
    """Raise ValueError where a new study's folder holds something already, or cannot be made."""
    try:
        if (folder / "study.json").exists():
            raise ValueError(
                f"--study-dir={folder} holds another study; give a new folder, or: "
                f"{shell('tunefleet', 'resume', folder)}"
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--study-dir={folder} is no empty folder; give a new one")
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be made ({error.strerror}); give another --study-dir or --storage"
        ) from error


def check_storage(url: str | None, name: str) -> None:
    """Raise ValueError where an object store cannot be written and read, or holds such a study."""
    if url is None:
        return
    store = Store(url).below(name).patient(BRIEF_SECONDS)
    try:
        if set(store.names()) - {LEASE}:
            raise ValueError(
                f"{store.location} holds another study; give another --study-dir name, or: "
                f"{shell('tunefleet', 'resume', store.location)}"
            )
        store.write(b"", "probe")
        store.remove("probe")
    except OSError as error:
        why = reason(error.__cause__ or error)
        raise ValueError(
            f"--storage={url} cannot be used ({why}); check bucket, credentials and AWS_ENDPOINT_URL"
        ) from error


def default_folder(space: str, data: str, under: Path = Path("studies")) -> Path:
    """Return a new folder's name: space, data, where there are images, and time."""
    of_data = Path(data).name.split(".")[0].strip("<>")
    name = "-".join(filter(None, (space, of_data, time.strftime("%Y%m%d-%H%M%S"))))
    folder, again = under / name, 2
    while folder.exists():
        folder, again = under / f"{name}-{again}", again + 1
    return folder
