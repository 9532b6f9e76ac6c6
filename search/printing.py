"""What does a study say when it is done? Text for people, 80 columns wide."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tunefleet.cli import counted, printable, shown
from tunefleet.models import ARCHITECTURES
from tunefleet.search.spaces import SPACES
from tunefleet.search.study_file import read_study

TERMINAL_SECONDS = 0.5  # between refreshes
PLAIN_SECONDS = 5.0  # between lines in a log file


def print_result(folder: Path, console: Console) -> int:
    """Prints what a finished study found; returns the exit code."""
    study = read_study(folder)
    best, final = study["best"], study["final"]
    failed = {status: n for status, n in study["statuses"].items() if status in ("error", "out_of_memory")}

    def print_line(text: str, head: str = "") -> None:
        print_text(console, text, head)

    print_line("")
    if best is None:
        print_line(f" left chance: {_counts(study['statuses'])}", "no trial")
        return 1
    print_line(f" {rounded(best['val_accuracy'])}, trial {best['trial_id']}:", "best val_accuracy")
    for name in {**SPACES[study["space"]].ranges, **(study["options"].get("fix") or {})}:
        value = best["config"][name]
        print_line(f"  {name} {rounded(value, 'g') if isinstance(value, float) else value}")
    if final and final["test_accuracy"]:
        test, seeds = final["test_accuracy"], counted(len(final["seeds"]), "fresh seed")
        spread, plus_minus = "", "\u00b1" if _shows("\u00b1", console) else "+-"
        if test["sd"] is not None:
            low, high = test["interval95"]
            spread = f" {plus_minus} {rounded(test['sd'])} sd"
            spread += f", 95 % interval of the mean {rounded(low)} to {rounded(high)}"
        diverged = f", {len(final['diverged'])} of them diverged" if final["diverged"] else ""
        print_line(f" {rounded(test['mean'])}{spread}, {seeds}{diverged}", "test_accuracy")
    if final and final["failed"]:
        failed["of the fresh seeds"] = len(final["failed"])
    extent = f"{counted(study['trials'], 'trial')}, {counted(study['epochs_spent'], 'epoch')}"
    print_line(
        f"{extent} of {study['epochs_unpruned']} unpruned, {clock(study['seconds'])}, "
        f"busy {study['busy_fraction'] or 0:.2f} -> {shown(folder)}"
    )
    if lost := study["lost_workers"]:
        print_line(f"lost workers, whose trials went on with others: {_counts(lost)}")
    if failed:
        print_line(f"failed: {failed}; the errors stand in {shown(folder / 'reports.jsonl')}")
    return 1 if failed else 0


def print_text(console: Console, text: str, head: str = "", style: str = "bold") -> None:
    """Prints a line with a head that stands out; a user's text in it is no markup and breaks no line."""
    console.print(Text.assemble((head, style), printable(text)), soft_wrap=True)


def _counts(of: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in of.items())


def list_spaces(console: Console) -> int:
    """Prints each space: what it is and what it samples."""
    for name, space in SPACES.items():
        budget = f"{counted(space.trials, 'trial')} of up to {counted(space.epochs, 'epoch')}"
        if ARCHITECTURES[name].cut:
            sizes = f"{space.image_size} pixels a side on GPUs, {space.cpu_image_size} on CPUs"
            budget += f"; with trained weights {sizes}"
        console.print(f"[bold]{name}[/]: {ARCHITECTURES[name].summary}; {budget}", highlight=False)
        console.print(f"    samples {', '.join(space.ranges)}", highlight=False, soft_wrap=True)
        published = ", ".join(f"{key} {value}" for key, value in space.published.items())
        console.print(
            f"    published {100 * space.published_accuracy:.2f} % with {published}",
            highlight=False,
            soft_wrap=True,
        )
    return 0


@contextlib.contextmanager
def phase(console: Console, text: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows what is going on before there are trials: in place in a terminal, as lines elsewhere.

    Args:
        console: Where to.
        text: What is going on.

    Gives ``progress(step, done, total)``, which shows a part of it and its count of images; 0 of 0 where
    there is none.
    """
    began = last = time.monotonic()
    text = printable(text)
    live = console.is_terminal and not console.is_dumb_terminal
    kind = "dots" if _shows("\u280b", console) else "line"
    spinner = console.status(Text(text), spinner=kind) if live else None

    step_began = began
    current = ""

    def progress(step: str, done: int, total: int) -> None:
        nonlocal last, step_began, current
        now = time.monotonic()
        if step != current:
            current, step_began = step, now
        if now - last < (TERMINAL_SECONDS if spinner else PLAIN_SECONDS):
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


def rounded(value: float, form: str = "f") -> str:
    """Return a number to four digits, and more where it would read 0 or 1 and is neither."""
    digits = 4
    while float(text := f"{value:.{digits}{form}}") in (0, 1) and float(text) != value and digits < 17:
        digits += 1
    return text


def clock(seconds: float) -> str:
    """Returns 75 as 1 min 15 s."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"
