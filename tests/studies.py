"""A study at work in the test's own process, on the Ray that the test has connected to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunefleet.search.execution import OpenStudy, Ready, context_of, create, run_facts, scheduler_of
from tunefleet.search.options import StudyOptions
from tunefleet.search.preflight import prepare as preflight
from tunefleet.search.resources import Machine, Resources, settle
from tunefleet.search.scheduler import Scheduler
from tunefleet.search.wandb_options import WandbOptions
from tunefleet.trainables.device import DeviceSettings, choose
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.trial import TrialContext


@contextmanager
def digits_study(
    folder: Path, options: StudyOptions, resources: Resources, settings: DeviceSettings | None = None
) -> Iterator[tuple[Scheduler, TrialContext]]:
    """Creates a study of digits, or opens it again, and ends it however the body ends."""
    settings, data = settings or choose("cpu", "fp32"), prepare("digits", Path(options.data_dir))
    options = settle(options, settings, Machine(resources.slots, resources.gpus_per_trial))
    ready = Ready(options, folder, data, settings, resources)
    if not (folder / "study.json").exists():
        create(ready, preflight(options, data, settings))
    with OpenStudy(folder) as study:
        study.begin(run_facts(ready, WandbOptions(mode="off"), {}, study.study))
        yield scheduler_of(ready, study.study), context_of(ready)
