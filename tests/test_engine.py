"""Scheduler through Ray Tune on real workers: who runs where, and what survives. One cluster for the file."""

import gc
import itertools
import math
import os
import signal
import threading
from collections import Counter

import psutil
import pytest
from ray.tune.experiment import Trial as TuneTrial

from tests.compared import measured, table
from tests.configs import make_options
from tests.conftest import ray_logs
from tests.studies import digits_study
from tunefleet.journal import Journal, records
from tunefleet.search import engine
from tunefleet.search.asha import PRUNERS
from tunefleet.search.engine import run_jobs
from tunefleet.search.resources import Resources
from tunefleet.search.suggest import SEARCHERS
from tunefleet.study import read_study

pytestmark = pytest.mark.ray

SLOTS = 2


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    from tunefleet.search.connection import connect

    os.environ.pop("RAY_ADDRESS", None)
    connect()
    yield
    ray.shutdown()


@pytest.fixture
def study(tmp_path, data_dir):
    """Makes and runs softmax studies of digits; trials take milliseconds, workers seconds to start."""

    def run(name="study", on_step=lambda: None, slots=SLOTS, **options):
        options = make_options("softmax", data="digits", image_size=32, data_dir=str(data_dir), **options)
        with digits_study(tmp_path / name, options, Resources(slots, 1.0, 0.0)) as (jobs, context):
            run_jobs(jobs, context, resources=Resources(slots, 1.0, 0.0), on_step=on_step)
        return tmp_path / name, jobs

    return run


def reports_of(folder):
    return [event for event in Journal(folder / "reports.jsonl").read() if "pid" in event]


@pytest.mark.parametrize(("pruner", "searcher"), zip(PRUNERS, SEARCHERS, strict=True))
def test_sixty_four_short_trials_run_on_exactly_two_workers(study, pruner, searcher):
    folder, jobs = study(pruner=pruner, searcher=searcher, trials=64, epochs=3, final_seeds=2)
    pids = [report["pid"] for report in reports_of(folder) if not report["trial_id"].startswith("final")]
    assert len(set(pids)) == SLOTS
    both = Counter(pids[max(pids.index(pid) for pid in pids) :])  # since the second one is up
    assert min(both.values()) * 4 >= max(both.values()), both
    finals = {report["pid"] for report in reports_of(folder) if report["trial_id"].startswith("final")}
    assert finals == set(pids)  # no worker ended while it had nothing to do
    assert len(jobs.searched) == 64
    assert jobs.finished
    assert not jobs.running
    assert set(read_study(folder)["statuses"]) <= {"done", "pruned", "diverged"}
    if pruner == "promote":
        assert jobs.asha.promotable(settled=math.inf) is None
    for trial in records(Journal(folder / "reports.jsonl").read()).values():
        assert sorted(trial.reports) == list(range(1, trial.epoch + 1))


def test_same_seed_at_concurrency_one_gives_the_same_trials_csv(study):
    tables = []
    for name in ("one", "two"):
        folder, _ = study(name, slots=1, trials=14, epochs=9, final_seeds=1)
        tables.append((table(folder), measured(folder), read_study(folder)["final"]))
    assert tables[0] == tables[1]


def test_killed_worker_is_restarted_from_its_checkpoint(study, tmp_path):
    killed = []

    def kill_once():
        reports = reports_of(tmp_path / "study") if (tmp_path / "study" / "reports.jsonl").exists() else []
        if not killed and len(reports) > 20:
            killed.append(reports[-1])
            os.kill(reports[-1]["pid"], signal.SIGKILL)

    folder, jobs = study(on_step=kill_once, pruner="none", trials=3, epochs=40, final_seeds=0)
    assert killed
    assert {trial.status for trial in jobs.searched} <= {"done", "diverged"}
    victim = killed[0]["trial_id"]
    epochs = [r["epoch"] for r in reports_of(folder) if r["trial_id"] == victim]
    assert max(epochs) == 40
    assert sorted(set(epochs)) == list(range(1, 41))
    assert len(epochs) <= 41  # at most one report was said twice
    assert len({r["pid"] for r in reports_of(folder) if r["trial_id"] == victim}) == 2
    losses = [event for event in Journal(folder / "reports.jsonl").read() if "lost" in event]
    assert [(loss["trial_id"], loss["lost"]) for loss in losses] == [(victim, "worker")]


def test_rounds_keep_what_tune_remembers_small_and_change_no_result(study, monkeypatch):
    steps, kept, tables = itertools.count(), [], []

    def count():
        if next(steps) % 20 == 0:
            gc.collect()
            kept.append(sum(type(what) is TuneTrial for what in gc.get_objects()))

    for name, jobs in (("one", 1000), ("several", 3)):
        monkeypatch.setattr(engine, "ROUND", jobs)
        kept.clear()
        folder, _ = study(name, count, slots=1, trials=6, epochs=3, pruner="none", final_seeds=1)
        tables.append((table(folder), measured(folder), read_study(folder)["final"]))
        pids = {report["pid"] for report in reports_of(folder)}
    assert tables[0] == tables[1]
    assert len(pids) == 4  # 7 jobs; the last of a round continues in the next
    assert max(kept) <= 2 * 3, kept


def test_a_bug_in_a_trial_is_recorded_and_the_study_goes_on(study, tmp_path):
    """A checkpoint folder that cannot be written is an example of any exception in a worker."""
    broken = []

    def break_folder():
        folder = tmp_path / "study" / "checkpoints"
        if not broken and folder.exists():
            broken.append(folder)
            folder.rmdir()
            folder.write_text("in the way")
        elif broken and folder.is_file() and len(reports_of(tmp_path / "study")) >= 1:
            folder.unlink()
            folder.mkdir()

    folder, jobs = study(on_step=break_folder, trials=6, epochs=2, final_seeds=1)
    statuses = Counter(trial.status for trial in jobs.searched)
    assert statuses["error"] >= 1
    assert "Error" in next(trial.error for trial in jobs.searched if trial.status == "error")
    assert len(jobs.searched) == 6
    assert read_study(folder)["final"] is not None


@pytest.mark.slow
def test_workers_and_memory_stay_flat_over_sixty_four_trials(study):
    workers, sizes = set(), {}

    def look():
        for process in psutil.Process().children(recursive=True):
            try:
                if "ResourceTrainable" in " ".join(process.cmdline()) or "Trial" in process.name():
                    workers.add(process.pid)
                    if rss := process.memory_info().rss:  # 0 of a process that is ending
                        sizes.setdefault(process.pid, []).append(rss)
            except psutil.Error:
                continue

    stop = threading.Event()

    def watch():
        while not stop.wait(0.2):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    folder, _ = study(trials=64, epochs=9, pruner="none", searcher="random", final_seeds=0)
    stop.set()
    watcher.join()
    pids = {report["pid"] for report in reports_of(folder)}
    assert len(pids) == SLOTS
    assert pids <= workers
    for pid in pids:
        settled = sizes[pid][len(sizes[pid]) // 2 :]
        assert max(settled) - min(settled) < 0.1 * max(settled), (min(settled), max(settled))
    assert read_study(folder)["busy_fraction"] > 0


def test_a_stores_credentials_are_in_no_log_of_ray_and_its_pages_not_on_the_terminal(
    study, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-nobody-may-read")
    killed = []

    def kill_once():
        assert len(os.environ["AWS_SECRET_ACCESS_KEY"]) > 20
        file = tmp_path / "study" / "reports.jsonl"
        if not killed and file.exists() and (reports := reports_of(tmp_path / "study")):
            killed.append(reports[-1]["pid"])
            os.kill(killed[0], signal.SIGKILL)

    study(on_step=kill_once, trials=2, epochs=9, pruner="none", final_seeds=0)
    print("ours")
    assert killed
    assert capfd.readouterr().out == "ours\n"
    logs = [file.read_bytes() for file in ray_logs(psutil.Process()).rglob("*") if file.is_file()]
    assert logs
    assert not [log for log in logs if b"a-secret-that-nobody-may-read" in log]
