"""What does each fault cost a study? Inject it, count what is lost, and print a table.

    python -m tests.faults                 all faults, some 20 minutes on two cores (RELIABILITY.md)
    python -m tests.faults driver worker   these faults only
    python -m tests.faults --short         each fault once or twice, as the tests do

A fault hits a study that runs as a user's does, in a process of its own. Afterwards the study must equal
one that was left alone: the same trials with the same values, no report lost or said twice, the same winner
and the same finals, no process left behind, and the exit code and message that README.md promises.
"""

import argparse
import contextlib
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")  # or Ray refuses tests.three_nodes

import tunefleet.search  # noqa: F401  before anything imports Ray
from tests.cluster.lab import Lab, why_not
from tests.compared import measured, result, table
from tests.three_nodes import three_nodes
from tunefleet.journal import Journal, records

ROOT = Path(__file__).parents[1]
SECONDS = 300  # the longest that a study may take, or one of its steps
GONE_WITHIN = 10  # seconds after a study's end
# Ray's agents (2.60) try for a minute to tell the dead server of a killed driver that their raylet died
AGENTS, AGENTS_GONE_WITHIN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent"), 90
STUDY = ("--space", "softmax", "--data", "digits", "--wandb", "off", "--concurrency", "1")
TRIALS = (*STUDY, "--trials", "12", "--epochs", "27", "--final-seeds", "1")
PLACE_AND_TIME = ("seconds", "node")  # columns of trials.csv
SLOW_TRIALS = (*TRIALS, "--fix", "batch_size=2")  # 0.1 s an epoch: long enough to be hit in mid-trial
AMID = {*range(4, 7), *range(10, 24)}  # epochs of a trial that has several to go: no rung is near
TOKEN = secrets.token_hex(32)  # of the Ray of every study, which no file of a study may have
FULL_BYTES = 4 * 2**20  # of the small disk


class Run:
    """A study at work, by ``search/run.py`` in a process of its own.

    Args:
        folder: Where it works; its study is the folder ``study`` in it.
        environment: Variables beside those of this process.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.work_in(folder / "study")
        self.environment = os.environ | {"COLUMNS": "80", "WANDB_MODE": "disabled"}
        self.environment |= environment or {}
        if "RAY_ADDRESS" not in self.environment:  # a cluster has a token of its own
            self.environment["RAY_AUTH_TOKEN"] = TOKEN
        self.started: set[tuple[int, float]] = set()  # processes: pid, and when each was created
        self.process: subprocess.Popen[str] | None = None

    def work_in(self, study: Path) -> None:
        """Says where the study's folder is, or will be."""
        self.study, self.journal = study, Journal(study / "reports.jsonl")

    def find_in(self, storage: Path) -> None:
        """Waits until the study has its folder in its storage."""
        (folder,) = self.wait_for(lambda: [file.parent for file in storage.glob("*/study.json")])
        self.work_in(folder)

    def start(self, *arguments: object) -> "Run":
        """Starts a new study, or continues one with ``--resume``."""
        if not {"--resume", "--storage"} & {*arguments}:
            arguments = (*arguments, "--study-dir", self.study)
        command = [sys.executable, ROOT / "search" / "run.py", *arguments]
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        return self

    def resume(self) -> "Run":
        """Continues the study."""
        return self.start("--resume", self.study, "--data-dir", self.folder / "data")

    def look(self) -> list[psutil.Process]:
        """Returns the study's processes, and remembers them."""
        assert self.process is not None
        found = []
        with contextlib.suppress(psutil.Error):
            driver = psutil.Process(self.process.pid)
            for process in (driver, *driver.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    self.started.add((process.pid, process.create_time()))
                    found.append(process)
        return found

    def reports(self) -> list[dict]:
        """Returns the reports so far, of epochs only."""
        return [event for event in self.journal.read() if event.get("epoch")]

    def lost(self) -> list[str]:
        """Returns the cause of each worker's loss so far."""
        return [event["lost"] for event in self.journal.read() if "lost" in event]

    def amid_trial(self, seen: int) -> dict | None:
        """Returns the last report, if it came after the first ``seen`` and its trial has epochs to go."""
        fresh = self.reports()[seen:]
        return fresh[-1] if fresh and fresh[-1]["epoch"] in AMID else None

    def wait_for(self, what: Callable[[], object]) -> object:
        """Returns what() once it is true; the study must not end before."""
        assert self.process is not None
        end = time.monotonic() + SECONDS
        while not (value := what()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, f"no such moment within {SECONDS} s"
            time.sleep(0.01)
        self.look()
        return value

    def kill(self) -> None:
        """Kills the driver, and waits until all that it started is gone."""
        assert self.process is not None
        self.look()
        self.process.kill()
        self.process.communicate()
        left = self.left_behind()
        assert not left, left

    def finish(self) -> tuple[int, str, str]:
        """Waits for the end; returns exit code, stdout and stderr."""
        assert self.process is not None
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err

    def left_behind(self, seconds: float = GONE_WITHIN, but: tuple[str, ...] = AGENTS) -> list[str]:
        """Returns the study's processes that still run some seconds after its end."""
        end = time.monotonic() + seconds
        while left := [name for mark in self.started if (name := _alive(*mark)) and name not in but]:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return left


def _alive(pid: int, created: float) -> str:
    """Returns the name of a process that runs; empty: it has ended."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
            return process.name()
    return ""


@dataclass
class Outcome:
    """What came of a study under a fault."""

    times: int
    code: int
    said: str  # the line that a user reads
    wrong: list[str] = field(default_factory=list)  # what differs from what must be
    run: Run | None = None


def outcome(
    times: int, run: Run, ended: tuple[int, str, str], *, code: int = 0, like: Path | None = None
) -> Outcome:
    """Returns how a study ended, compared with one that was left alone.

    Args:
        times: How often the fault was injected.
        run: The study.
        ended: Exit code, stdout and stderr.
        code: What the exit code must be.
        like: The folder of the study that was left alone; None: nothing to compare with.
    """
    was, out, err = ended
    wrong = [] if was == code else [f"exit code {was}, not {code}: {err[-300:]}"]
    if err:  # the journal and the result hold all there is to report
        wrong.append(f"on stderr: {err[:300]}")
    reported = Counter((report["trial_id"], report["epoch"]) for report in run.reports())
    if twice := [key for key, count in reported.items() if count > 1]:
        wrong.append(f"reported twice: {twice}")
    for trial in records(run.journal.read()).values():
        if sorted(trial.reports) != list(range(1, trial.epoch + 1)):
            wrong.append(f"reports lost of {trial.trial_id}")
    if like is not None and table(run.study, PLACE_AND_TIME) != table(like, PLACE_AND_TIME):
        wrong.append("other trials than undisturbed")
    if like is not None and measured(run.study) != measured(like):
        wrong.append("other epochs than undisturbed")
    if like is not None and result(run.study) != result(like):
        wrong.append("another winner or other finals than undisturbed")
    token = TOKEN.encode()
    if files := [file for file in run.study.rglob("*") if file.is_file() and token in file.read_bytes()]:
        wrong.append(f"Ray's token is in {files}")
    if left := run.left_behind():
        wrong.append(f"left behind: {left}")
    lines = (err or out).strip().splitlines()
    return Outcome(times, was, lines[-1] if lines else "", wrong, run)


class Undisturbed:
    """Studies without a fault, each run once, when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple, Path] = {}

    def __call__(self, *arguments: str) -> Path:
        if arguments not in self.made:
            folder = self.folder / f"undisturbed-{len(self.made)}"
            folder.mkdir()
            run = Run(folder).start(*arguments, "--data-dir", folder / "data")
            code, _, err = run.finish()
            assert code == 0, err
            self.made[arguments] = run.study
        return self.made[arguments]


def kill_worker(folder: Path, times: int, undisturbed: Undisturbed) -> Outcome:
    """SIGKILL of a trial's worker, at random reports of the study."""
    draw, killed = random.Random(0), set()
    arguments = (*TRIALS, "--max-failures", str(times))
    run = Run(folder).start(*arguments, "--data-dir", folder / "data")
    for _ in range(times):

        def fresh() -> list[dict]:
            return [report for report in run.reports() if report["pid"] not in killed]

        more = draw.randrange(1, 4)
        last = run.wait_for(lambda more=more: fresh()[more - 1 :])[-1]
        os.kill(last["pid"], signal.SIGKILL)
        killed.add(last["pid"])
    ended = run.finish()
    done = outcome(times, run, ended, like=undisturbed(*TRIALS))
    if run.lost() != ["worker"] * times:
        done.wrong.append(f"the journal tells of {run.lost()}")
    return done


def kill_group_worker(folder: Path, times: int, undisturbed: Undisturbed) -> Outcome:
    """SIGKILL of one of two workers that train a trial together (DDP)."""
    group = ("--workers-per-trial", "2", "--cpus-per-trial", "1", "--max-failures", str(times))
    arguments = (*STUDY, *group, "--trials", "1", "--epochs", "40", "--final-seeds", "0")
    run, killed = Run(folder).start(*arguments, "--data-dir", folder / "data"), set()
    for k in range(times):

        def workers() -> list[int]:
            found = [process for process in run.look() if "RayTrainWorker" in _title(process)]
            return sorted(p.pid for p in found if p.pid not in killed)

        def both_train() -> bool:
            pids = {report["pid"] for report in run.reports()} - killed
            return len(workers()) == 2 and bool(pids & set(workers()))

        run.wait_for(both_train)
        victims = workers()
        killed.update(victims)  # the other one ends by it
        os.kill(victims[k % 2], signal.SIGKILL)
    return outcome(times, run, run.finish(), like=undisturbed(*arguments))


def _title(process: psutil.Process) -> str:
    """Returns how a process calls itself; empty: it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join([process.name(), *process.cmdline()])
    return ""


def kill_driver(folder: Path, times: int, undisturbed: Undisturbed) -> Outcome:
    """SIGKILL of the driver at random lines of the journal, then --resume."""
    alone = undisturbed(*TRIALS)
    lines = len(Journal(alone / "reports.jsonl").read())
    moments = sorted(random.Random(times).sample(range(2, lines - 2), times))
    run = Run(folder).start(*TRIALS, "--data-dir", folder / "data")
    for moment in moments:
        run.wait_for(lambda moment=moment: len(run.journal.read()) >= moment)
        run.kill()
        run.resume()
    return outcome(times, run, run.finish(), like=alone)


def damage_checkpoints(folder: Path, times: int, undisturbed: Undisturbed) -> Outcome:
    """SIGKILL of the driver, each checkpoint cut off or with a bit changed, then --resume."""
    alone = undisturbed(*TRIALS)
    lines = len(Journal(alone / "reports.jsonl").read())
    run = Run(folder).start(*TRIALS, "--data-dir", folder / "data")
    for k in range(times):
        moment = lines // 3 * (k + 1) // times + 4
        run.wait_for(lambda moment=moment: len(run.journal.read()) >= moment)
        run.kill()
        checkpoints = list((run.study / "checkpoints").glob("*.pt"))
        assert checkpoints
        for number, file in enumerate(sorted(checkpoints)):
            content = bytearray(file.read_bytes())
            if (number + k) % 2:
                content[len(content) // 2] ^= 8
            else:
                del content[len(content) // 2 :]
            file.write_bytes(content)
        run.resume()
    return outcome(times, run, run.finish(), like=alone)


def fill_disk(folder: Path, times: int, undisturbed: Undisturbed) -> Outcome:
    """The study's disk is full, twice: the study stops; there is room again: --resume."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES}", "tmpfs", disk], check=True)
    try:
        run = Run(folder)
        run.work_in(disk / "study")
        run.start(*TRIALS, "--data-dir", folder / "data")
        wrong, said = [], ""
        for k in range(times):
            run.wait_for(lambda k=k: len(run.reports()) >= 20 * (k + 1))
            with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(1024))
            code, _, err = run.finish()
            said = err.strip()
            if code != 3 or "no room" not in err or "tunefleet resume" not in err or "\n" in said:
                wrong.append(f"exit code {code}: {err[-500:]}")
            (disk / "ballast").unlink()
            run.resume()
        done = outcome(times, run, run.finish(), like=undisturbed(*TRIALS))
        return Outcome(times, 3, said, wrong + done.wrong, run)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def diverge(folder: Path, times: int, undisturbed: Undisturbed) -> Outcome:
    """A loss that is not finite: the trials end as diverged, and the study says that none is left."""
    run = Run(folder).start(
        *(*STUDY, "--trials", "4", "--epochs", "3", "--final-seeds", "1", "--searcher", "random"),
        *("--fix", "lr=1e38", "--data-dir", folder / "data"),
    )
    done = outcome(times, run, run.finish(), code=1)
    statuses = {trial.status for trial in records(run.journal.read()).values()}
    if statuses != {"diverged"}:
        done.wrong.append(f"statuses {statuses}")
    return done


def exhaust_memory(folder: Path, times: int, undisturbed: Undisturbed) -> Outcome:
    """A trial that takes more memory than its node has: tried once more, then out_of_memory."""
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + 3 * 2**30) / memory.total  # 3 GiB more than now
    watchful = {"RAY_memory_usage_threshold": f"{limit:.3f}", "RAY_memory_monitor_refresh_ms": "50"}
    run = Run(folder, watchful).start(
        *("--space", "twolayernn", "--data", "digits", "--wandb", "off", "--concurrency", "1"),
        *("--trials", str(times), "--epochs", "1", "--final-seeds", "0"),
        *("--fix", "hidden=125000", "--data-dir", folder / "data"),  # 1.5 GB of weights, and Adam's
    )
    done = outcome(times, run, run.finish(), code=1)
    trials = records(run.journal.read())
    statuses = [trial.status for trial in trials.values()]
    if statuses != ["out_of_memory"] * times:
        done.wrong.append(f"statuses {statuses}")
    lost = Counter(event["trial_id"] for event in run.journal.read() if event.get("lost") == "memory")
    if set(lost.values()) != {2}:
        done.wrong.append(f"tried {lost} times")
    return done


def kill_raylet(folder: Path, times: int, undisturbed: Undisturbed) -> Outcome:
    """SIGKILL of the raylet of the node that a trial is on; another node joins."""
    alone = undisturbed(*SLOW_TRIALS)
    with three_nodes() as cluster:
        run = Run(folder, {"RAY_ADDRESS": cluster.address})
        storage = folder / "storage"
        storage.mkdir()
        run.start(*SLOW_TRIALS, "--data-dir", folder / "data", "--storage", storage)
        run.find_in(storage)

        seen = 0
        for k in range(times):
            report = run.wait_for(lambda seen=seen: run.amid_trial(seen))
            raylet = psutil.Process(report["pid"]).parent()
            assert "raylet" in raylet.name()
            raylet.kill()
            cluster.add_node(num_cpus=1)
            run.wait_for(lambda k=k: len(run.lost()) > k)
            seen = len(run.reports())
        done = outcome(times, run, run.finish(), like=alone)
        if run.lost() != ["node"] * times:
            done.wrong.append(f"the journal tells of {run.lost()}")
        if groups := _placement_groups(cluster.address):
            done.wrong.append(f"placement groups left behind: {groups}")
        return done


def _placement_groups(address: str) -> list[str]:
    """Returns the placement groups that a cluster still holds resources for."""
    import ray
    from ray.util import placement_group_table

    ray.init(address=address, log_to_driver=False)
    try:
        held = [name for name, row in placement_group_table().items() if row["state"] != "REMOVED"]
    finally:
        ray.shutdown()
    return held


HEAD, WORKERS = "10.79.0.10", ("10.79.0.11", "10.79.0.12")
HEALTH = {"period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 4}  # a dead link is noticed in 10 s
NOTICE = " ".join(f"RAY_health_check_{name}={value}" for name, value in HEALTH.items())


def cut_link(folder: Path, times: int, undisturbed: Undisturbed) -> Outcome:
    """The cable of the machine that a trial is on is pulled; plugged in again after the node was given up."""
    alone = undisturbed(*SLOW_TRIALS)
    with Lab("10.79.0.1/16") as lab:
        export = f"export PATH=~/venv/bin:$PATH PYTHONPATH=~/tunefleet/src RAY_AUTH_MODE=token {NOTICE}; "

        def on(address: str, command: str) -> None:
            lab.ssh(address, export + command, timeout=120)

        def join(address: str) -> None:
            on(address, f"ray start --address {HEAD}:6379 --num-cpus 1 --node-ip-address {address}")

        for address in (HEAD, *WORKERS):
            lab.boot(address)
            home = lab.home(address)
            (home / "tunefleet").symlink_to(lab.checkout)
            (token := home / ".ray/auth_token").parent.mkdir()
            token.write_text("0" * 64)
            token.chmod(0o600)
        on(HEAD, f"ray start --head --num-cpus 0 --node-ip-address {HEAD} --port 6379")
        for address in WORKERS:
            join(address)
        run = Run(folder)
        words = f"{' '.join(SLOW_TRIALS)} --data-dir /run/data --storage {lab.shared}"
        driver = f"{export} cd ~/tunefleet; RAY_ADDRESS={HEAD}:6379 python search/run.py {words}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        run.process = lab.start(*lab.by_ssh(HEAD, driver), **pipes)
        run.find_in(lab.shared)

        seen = 0
        for k in range(times):
            report = run.wait_for(lambda seen=seen: run.amid_trial(seen))
            address = report["node"].removeprefix("node-").replace("-", ".")
            lab.link(address, "down")
            run.wait_for(lambda k=k: len(run.lost()) > k)
            seen = len(run.reports())
            lab.link(address, "up")
            on(address, "ray stop --force")
            join(address)
        done = outcome(times, run, run.finish(), like=alone)
        if run.lost() != ["node"] * times:
            done.wrong.append(f"the journal tells of {run.lost()}")
        return done


@dataclass(frozen=True)
class Fault:
    """One row of the matrix."""

    inject: Callable[[Path, int, Undisturbed], Outcome]
    times: int
    short: int
    text: str
    why_not: Callable[[], str | None] = lambda: None  # what this host lacks


def _no_root() -> str | None:
    return "needs root, to mount a small disk" if os.geteuid() else None


FAULTS = {
    "worker": Fault(kill_worker, 20, 2, "a trial's worker is killed (SIGKILL)"),
    "group": Fault(kill_group_worker, 5, 1, "one of two DDP workers is killed (SIGKILL)"),
    "raylet": Fault(kill_raylet, 3, 1, "a node dies (SIGKILL of its raylet); another one joins"),
    "driver": Fault(kill_driver, 5, 2, "the driver is killed (SIGKILL), `--resume`"),
    "link": Fault(cut_link, 2, 1, "the link of a trial's node is cut", why_not),
    "disk": Fault(fill_disk, 2, 1, "the study's disk is full; room is made, `--resume`", _no_root),
    "checkpoints": Fault(
        damage_checkpoints,
        2,
        1,
        "the driver is killed, all checkpoints are cut off or have a bit changed, `--resume`",
    ),
    "nan": Fault(diverge, 1, 1, "the loss is not finite, in every trial"),
    "memory": Fault(exhaust_memory, 2, 1, "a trial takes more memory than there is"),
}
HEADER = ("fault", "times", "exit code", "as undisturbed", "seconds", "what the user reads last")


def inject(name: str, folder: Path, undisturbed: Undisturbed, short: bool) -> tuple[Outcome, float]:
    """Injects one fault in a folder of its own; returns what came of it, and the seconds it took."""
    fault = FAULTS[name]
    (location := folder / name).mkdir()
    began = time.monotonic()
    done = fault.inject(location, fault.short if short else fault.times, undisturbed)
    return done, time.monotonic() - began


def main() -> int:
    """Prints the matrix as a table of Markdown; returns 1 where anything is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--short", action="store_true", help="each fault once or twice")
    options = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}")
    failed = False
    with tempfile.TemporaryDirectory(prefix="faults-", dir="/var/tmp") as location:
        folder = Path(location)
        undisturbed = Undisturbed(folder)
        for name in options.faults or FAULTS:
            fault = FAULTS[name]
            if reason := fault.why_not():
                print(f"| {fault.text} | not run: {reason} |", flush=True)
                continue
            done, seconds = inject(name, folder, undisturbed, options.short)
            assert done.run is not None
            if left := done.run.left_behind(AGENTS_GONE_WITHIN, but=()):
                done.wrong.append(f"left behind for long: {left}")
            failed |= bool(done.wrong)
            said = re.sub(r"\S*/faults-\w+/\w+/", "", done.said)
            verdict = "; ".join(done.wrong) if done.wrong else "yes"
            cells = (fault.text, done.times, done.code, verdict, f"{seconds:.0f}", said)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
