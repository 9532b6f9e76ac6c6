"""What a study prints, 80 columns wide: phases before its trials, a live table or lines, and its results."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.table import Table
from rich.text import Text

from tunefleet.cli import clock, counted, printable, rounded, shown
from tunefleet.journal import FAILED, TrialRecord, winner
from tunefleet.models.space import Space
from tunefleet.models.spaces import SPACES
from tunefleet.search.asha import expected_epochs
from tunefleet.search.options import StudyOptions
from tunefleet.search.scheduler import Scheduler
from tunefleet.study import Study, seeds_of, tested, tested_before

STATES = ("starting", "running", "paused", "pruned", "done", "diverged", "out_of_memory", "error")
TERMINAL_SECONDS = 0.5  # between refreshes
PLAIN_SECONDS = 5.0  # between lines in a log file


def print_result(folder: Path, console: Console) -> int:
    """Print the results of a finished study; return the exit code."""
    opened = Study(folder)
    study, metric = opened.facts, opened.metric.name
    best, final = study["best"], study["final"]
    failed = {status: n for status, n in study["statuses"].items() if status in FAILED}

    def print_line(text: str, head: str = "") -> None:
        print_text(console, text, head)

    print_line("")
    if best is None:
        by_chance = study["data"]["classes"] and set(study["statuses"]) <= {"diverged", "pruned"}
        what = "beat chance" if by_chance else "succeeded"
        print_line(f" {what} ({_counts(study['statuses'])})", "no trial")
        return 1
    print_line(f" {rounded(best[metric])}, trial {best['trial_id']}:", f"best {metric}")
    options = study["options"]
    chosen = study.get("ranges") or (options.get("points") or [{}])[0]
    for name in [name for name in {**chosen, **(options.get("fix") or {})} if name in best["config"]]:
        value = best["config"][name]
        print_line(f"  {name} {rounded(value, 'g') if isinstance(value, float) else value}")
    for name, figures in tested(final).items():
        spread, plus_minus = "", "\u00b1" if _shows("\u00b1", console) else "+-"
        if figures["sd"] is not None:
            low, high = figures["interval95"]
            spread = f" {plus_minus} {rounded(figures['sd'])} sd"
            spread += f", 95 % interval of the mean {rounded(low)} to {rounded(high)}"
        print_line(f" {rounded(figures['mean'])}{spread}, {seeds_of(figures, final)}", name)
    if before := tested_before(study):
        print_line(before)
    if final and final["failed"]:
        failed["of the fresh seeds"] = len(final["failed"])
    extent = f"{counted(study['trials'], 'trial')}, {counted(study['epochs_spent'], 'epoch')}"
    print_line(
        f"{extent} of {study['epochs_unpruned']} unpruned, {clock(study['seconds'])}, "
        f"busy {study['busy_fraction'] or 0:.2f} -> {shown(folder)}"
    )
    if lost := study["lost_workers"]:
        print_line(f"lost workers, whose trials continued on others: {_counts(lost)}")
    if failed:
        print_line(f"failed: {failed}; the errors are in {shown(folder / 'reports.jsonl')}")
    return 1 if failed else 0


def print_text(console: Console, text: str, head: str = "", style: str = "bold") -> None:
    """Print a line with a head that stands out; a user's text in it is no markup and breaks no line."""
    console.print(Text.assemble((head, style), printable(text)), soft_wrap=True)


def say(line: str, console: Console) -> None:
    """Print a line, if there is one."""
    if line:
        print_text(console, line)


def _counts(of: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in of.items())


def list_spaces(console: Console) -> int:
    """Print each space: what it is and what it samples."""
    for name, space in SPACES.items():
        budget = f"{counted(space.trials, 'trial')} of up to {counted(space.epochs, 'epoch')}"
        if space.takes_weights:
            sizes = f"{space.image_size} pixels a side on GPUs, {space.cpu_image_size} on CPUs"
            budget += f"; with trained weights {sizes}"
        console.print(f"[bold]{name}[/]: {space.summary}; {budget}", highlight=False)
        console.print(f"    samples {', '.join(space.ranges)}", highlight=False, soft_wrap=True)
        first = ", ".join(f"{key} {value}" for key, value in space.start.items())
        console.print(
            f"    published {100 * (space.published or 0):.2f} % with {first}",
            highlight=False,
            soft_wrap=True,
        )
    return 0


def list_space(space: Space, console: Console) -> int:
    """Print what a space searches: ranges, scales, the first point, fixed values and why."""
    print_text(console, f": {space.summary}" if space.summary else "", space.name)
    for name, found in space.described().items():
        if "values" in found:
            text = ", ".join(map(str, found["values"]))
        else:
            step = f", steps of {found['step']:g}" if "step" in found else ""
            text = f"{found['low']:g} to {found['high']:g}, {'log' if found['log'] else 'linear'}{step}"
        print_text(console, f"  {name}: {text}; first {space.start[name]}")
    for name, value in space.fixed.items():
        print_text(console, f"  {name}: always {value}")
    if space.why:
        print_text(console, f"  {space.why}")
    return 0


@contextlib.contextmanager
def phase(console: Console, text: str) -> Iterator[Callable[[str, int, int], None]]:
    """Context manager: show a phase before the trials, in place in a terminal, as lines elsewhere.

    Gives ``progress(step, done, total)``, which shows a part of the phase and its count of images; 0 of 0 for
    a part without one.
    """
    began = last = time.monotonic()
    text = printable(text)
    live = console.is_terminal and not console.is_dumb_terminal
    kind = "dots" if _shows("\u280b", console) else "line"
    spinner = console.status(Text(text), spinner=kind) if live else None
    if not spinner:
        print_text(console, text)

    step_began = began
    current = ""

    def progress(step: str, done: int, total: int) -> None:
        nonlocal last, step_began, current
        now = time.monotonic()
        if step != current:
            current, step_began = step, now
        begins = total and not done
        if not begins and now - last < (TERMINAL_SECONDS if spinner else PLAIN_SECONDS):
            return
        last = now
        left = f", about {clock((now - step_began) * (total - done) / done)} left" if done else ""
        line = f"{text}: {step}" + (f" {done:,} of {total:,} images{left}" if total else "")
        if spinner:
            spinner.update(Text(printable(line)))
        else:
            print_text(console, line)

    with spinner or contextlib.nullcontext():
        yield progress


def _shows(character: str, console: Console) -> bool:
    """Return whether a terminal's or a pipe's encoding has a character."""
    try:
        character.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class NotebookOutput:
    """An output of a notebook's cell that is replaced in place; rich's own (15) needs ipywidgets."""

    def start(self) -> None:
        """Add the output to the cell."""
        from IPython.display import display

        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def update(self, shown: Group | str, *, refresh: bool = True) -> None:
        """Show something else there."""
        page = io.StringIO()
        Console(file=page, width=80, force_jupyter=False).print(shown)
        self.handle.update({"text/plain": page.getvalue()}, raw=True)

    def stop(self) -> None:
        """Leave nothing there."""
        self.update("")


class Progress:
    """Shows one study; ``update`` may be called as often as one likes.

    A terminal and a notebook get the table, in place, anything else plain lines. ``trouble`` returns what the
    study waits for, in a few words; nothing where it does not.
    """

    def __init__(
        self,
        jobs: Scheduler,
        options: StudyOptions,
        console: Console,
        trouble: Callable[[], str] = lambda: "",
    ) -> None:
        self.jobs, self.options, self.console = jobs, options, console
        self.trouble = trouble
        self.names = list(options.points[0] if options.points else options.searched.ranges)
        live = console.is_terminal and not console.is_dumb_terminal
        self.live: Live | NotebookOutput | None = None
        if console.is_jupyter:
            self.live = NotebookOutput()
        elif live:
            self.live = Live(console=console, auto_refresh=False, transient=True)
        self.began = time.monotonic()
        self.shown_at = -float("inf")
        self.closed = False
        self.drawn: list[int] = []  # lengths of the lines in the terminal
        self.epochs_before = epochs_of(jobs)  # of an earlier run of a resumed study
        self.testing_since: dict[str, float] = {}  # by trial: seeds on the test images
        self.test_seconds: list[float] = []  # that testing a seed took

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Show nothing any more."""
        self.closed = True
        if self.live:
            self._erase_wrapped()
            self.live.stop()

    def update(self) -> None:
        """Show the study's state, unless it was shown just now."""
        if self.closed:
            return
        self._erase_wrapped()
        while self.jobs.notes:
            self.console.print(
                printable(self.jobs.notes.popleft()), markup=False, highlight=False, soft_wrap=True
            )
        now = time.monotonic()
        if now - self.shown_at < (TERMINAL_SECONDS if self.live else PLAIN_SECONDS):
            return
        self.shown_at = now
        title = f"{self.options.space.name} {'final' if self.jobs.search_is_over else 'search'}"
        rows = self.rows(now)
        if self.live:
            shown = table(title, rows)
            self.live.update(shown, refresh=True)
            lines = self.console.render_lines(shown, pad=False)
            self.drawn = [Segment.get_line_length(drawn) for drawn in lines]
        else:
            line = "; ".join(f"{label} {text}".strip() for label, text in rows)
            print_text(self.console, line, f"{title}: ")

    def _erase_wrapped(self) -> None:
        """Erase the rows that the table has gained where its terminal has become narrower.

        Terminals wrap the lines that no longer fit; rich (15) erases as many rows as it drew.
        """
        width = self.console.width
        gained = sum(max(0, length - 1) // width for length in self.drawn)
        if gained:
            up = ((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2))
            first = (ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
            self.console.control(Control(*first, *up * gained))
            self.drawn = []

    def rows(self, now: float) -> list[tuple[str, str]]:
        """Return what is shown, each line with its label."""
        jobs, options = self.jobs, self.options
        assert options.epochs is not None
        elapsed, done, numbers = now - self.began, epochs_of(jobs), counts(jobs.searched, jobs)
        expected = expected_epochs(jobs.max_trials, options.rungs, options.eta, options.epochs, jobs.pruner)
        searched = sum(trial.epoch for trial in jobs.searched)
        if jobs.search_is_over:
            expected = searched
        else:  # some of those that are promoted train their epochs again, unseen
            lost = sum(jobs.trials[trial_id].epoch for trial_id in jobs.without_checkpoint)
            expected += lost // options.eta
        _, earlier = self._seeds()
        total = max(expected, searched) + options.final_seeds * options.epochs + earlier
        rate = (done - self.epochs_before) / elapsed if elapsed > 0 else 0.0
        self._note_tests(now)
        left = self._left(total - done, rate, now)
        states = ", ".join(f"{numbers[state]} {state}" for state in STATES if numbers[state])
        rows = [
            ("trials", f"{len(jobs.searched)} of {jobs.max_trials} started"),
            ("", states + ("" if rate else "; no epoch done yet")),
            ("final", self._finals() if jobs.search_is_over else ""),
            ("rungs", "  ".join(f"epoch {rung}: {len(found)}" for rung, found in jobs.asha.values.items())),
            ("epochs", f"{done} of about {total}, {rate:.2g} a second"),
            ("time", f"{clock(elapsed)}, left: {'unknown yet' if left is None else clock(left)}"),
            ("best", self._best()),
            ("waiting", self.trouble()),
        ]
        return [(label, printable(text)) for label, text in rows if text]

    def _finals(self) -> str:
        """Return how far the winner's seeds are."""
        seeds = counts(self._seeds()[0], self.jobs)
        testing = len(self.testing_since)
        tested = f", {testing} on the test images" if testing else ""
        training = seeds["starting"] + seeds["running"] - testing
        of = counted(self.options.final_seeds, "seed")
        return f"{seeds['done']} of {of} done, {training} training{tested}"

    def _best(self) -> str:
        """Return the best value yet in words."""
        if self.jobs.best_yet is None:
            return "none yet"
        value, epoch, trial = self.jobs.best_yet
        found = {name: trial.config[name] for name in self.names if name in trial.config}
        values = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in found.items()
        )
        after = f"after {counted(epoch, 'epoch')} (trial {trial.trial_id}{values and ': ' + values})"
        return f"{self.jobs.metric.name} {rounded(value)} {after}"

    def _seeds(self) -> tuple[list[TrialRecord], int]:
        """Return the winner's seeds, and the epochs of those of earlier winners of a continued study."""
        finals = [trial for trial in self.jobs.trials.values() if trial.is_final]
        best = winner(self.jobs.trials, self.jobs.metric) if finals else None
        seeds = [trial for trial in finals if best and trial.is_seed_of(best)]
        return seeds, sum(trial.epoch for trial in finals) - sum(trial.epoch for trial in seeds)

    def _note_tests(self, now: float) -> None:
        """Note since when each seed is tested, and how long each test took."""
        jobs = self.jobs
        testing = {trial_id for trial_id in jobs.running if jobs.phases.get(trial_id) == "testing"}
        for trial_id in self.testing_since.keys() - testing:
            self.test_seconds.append(now - self.testing_since.pop(trial_id))
        for trial_id in testing:
            self.testing_since.setdefault(trial_id, now)

    def _left(self, epochs: int, rate: float, now: float) -> float | None:
        """Return the seconds that are left; None: not known, such as how long a first test takes."""
        if not rate or (self.testing_since and not self.test_seconds):
            return None
        untested = self.options.final_seeds - sum(trial.status is not None for trial in self._seeds()[0])
        each = sum(self.test_seconds) / max(1, len(self.test_seconds))
        at_once = max(1, len(self.testing_since))
        elapsed = max((now - since for since in self.testing_since.values()), default=0.0)
        return max(0, epochs) / rate + max(0.0, math.ceil(untested / at_once) * each - elapsed)


def counts(trials: list[TrialRecord], jobs: Scheduler) -> Counter[str]:
    """Return how many trials are starting, running, paused (once the search is over: pruned), done, …."""
    left = "pruned" if jobs.search_is_over or jobs.pruner == "stop" else "paused"

    def state_of(trial: TrialRecord) -> str:
        if trial.status or trial.trial_id not in jobs.running:
            return trial.status or left
        return "starting" if trial.trial_id in jobs.starting else "running"

    return Counter(map(state_of, trials))


def epochs_of(jobs: Scheduler) -> int:
    """Return the epochs reported so far, the final seeds' included."""
    return sum(trial.epoch for trial in jobs.trials.values())


def table(title: str, rows: list[tuple[str, str]]) -> Group:
    """Return rows as a table that fits 80 columns."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    for label, text in rows:
        grid.add_row(label, Text(text, style="yellow" if label == "waiting" else ""))
    return Group(Text(title, style="bold cyan"), grid)
