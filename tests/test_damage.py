"""What damage to a study's files does: one line that names it, and nothing accepted that was not written."""

import json
import random
import re
import shlex
import shutil

import pytest

from tests.configs import make_options
from tests.test_wandb_sync import STUDY_JSON
from tests.test_wandb_sync import write_study as write_trials
from tunefleet.analysis.load import load
from tunefleet.analysis.results import main as results
from tunefleet.collect import main as collect_command
from tunefleet.journal import Journal
from tunefleet.search import running
from tunefleet.search.run import main as run
from tunefleet.search.wandb_sync import runs_of
from tunefleet.study import Study, read_study, write_study, write_tables

TRIES = 120  # damages of each file in each state of a study


SPEC = STUDY_JSON | {"options": make_options("softmax", epochs=9, pruner="promote").to_dict()}


class AcceptedError(Exception):
    """Replaces a resume that would have continued."""


def lines_of(content):
    return content.splitlines(keepends=True)


def cut(content, draw):
    return content[: draw.randrange(len(content))]


def cut_after_a_line(content, draw):
    lines = lines_of(content)
    return b"".join(lines[: draw.randrange(len(lines))])


def flip(content, draw):
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def double(content, draw):
    lines = lines_of(content)
    lines.insert(draw.randrange(len(lines)), draw.choice(lines))
    return b"".join(lines)


def double_all(content, draw):
    return content + content


def swap(content, draw):
    lines = lines_of(content)
    a, b = draw.sample(range(len(lines)), 2)
    lines[a], lines[b] = lines[b], lines[a]
    return b"".join(lines)


def lose(content, draw):
    lines = lines_of(content)
    del lines[draw.randrange(len(lines))]
    return b"".join(lines)


def empty(content, draw):
    return b""


def zero(content, draw):
    at = draw.randrange(len(content))
    length = draw.choice((1, 16, len(content)))
    return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]


def zeros_after(content, draw):
    return content + bytes(512)


def cut_in_a_line(content, draw):
    lines = lines_of(content)
    k = draw.randrange(len(lines))
    lines[k] = lines[k][: draw.randrange(len(lines[k]))] + b"\n"
    return b"".join(lines)


def replace(content, draw):
    lines = lines_of(content)
    lines[draw.randrange(len(lines))] = draw.choice((b"null\n", b"{}\n", b"[]\n", b"7\n", b"\xff\xfe\n"))
    return b"".join(lines)


DAMAGES = (
    *(cut, cut_after_a_line, cut_in_a_line, flip, double, double_all),
    *(swap, lose, empty, zero, zeros_after, replace),
)


@pytest.fixture(scope="module", params=["done", "stopped", "running"])
def study(request, tmp_path_factory):
    """A study of four trials and a seed of the winner; killed while it ran it has no result yet."""
    folder = write_trials(tmp_path_factory.mktemp(request.param) / "study")
    write_study(folder, SPEC)
    if request.param == "running":
        (folder / "result.json").unlink()
    else:
        write_tables(folder, status=request.param, seconds=60.0)
    return folder


@pytest.fixture
def readers(monkeypatch, capsys):
    """Every command that reads a study, up to what it does with it; returns code and stderr of each."""

    def accepted(*arguments, **options):
        raise AcceptedError

    monkeypatch.setattr(running, "run", accepted)

    def call(name, folder):
        def plan_runs():
            try:
                runs_of(folder)
            except ValueError as error:
                return f"error: {error}\n"
            return ""

        def load_study():
            try:
                load(folder)
            except ValueError as error:
                return f"error: {error}\n"
            return ""

        capsys.readouterr()
        if name == "collect":
            code = collect_command([str(folder)])
        elif name == "resume":
            try:
                code = run(["--resume", str(folder)])
            except AcceptedError:
                code = 0
        elif name == "results":
            code = results([str(folder)])
        else:
            error = plan_runs() if name == "wandb_sync" else load_study()
            return 2 * bool(error), error
        return code, capsys.readouterr().err

    return call


def damaged(study, name, tmp_path):
    """Yields copies of a study whose file was damaged, with what was done."""
    draw = random.Random(f"{study.parent.name}{name}")
    for number in range(TRIES):
        damage = DAMAGES[number % len(DAMAGES)]
        folder = tmp_path / f"{number}"
        shutil.copytree(study, folder)
        content = (folder / name).read_bytes()
        changed = damage(content, draw)
        if changed != content:
            (folder / name).write_bytes(changed)
            yield damage.__name__, folder


def assert_one_line(code, err, what):
    assert code == 2, (what, code, err)
    assert err.startswith("error: "), (what, err)
    assert err.count("\n") == 1, (what, err)


def test_damaged_journal_is_refused_by_every_reader_in_one_line(study, readers, tmp_path):
    whole = Journal(study / "reports.jsonl").read()
    state = Study(study).status
    for damage, folder in damaged(study, "reports.jsonl", tmp_path):
        before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        try:
            read = Study(folder).events
        except ValueError:
            for reader in ("collect", "resume", "wandb_sync"):
                if (state, reader) != ("done", "resume"):  # there is nothing to resume
                    code, err = readers(reader, folder)
                    assert_one_line(code, err, (damage, reader))
                    assert re.search(r"line \d+", err), err
            after = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
            assert {name: after[name] for name in before} == before
        else:  # bytes after the last line end are torn; fewer lines are what an earlier kill would have left
            assert read == whole[: len(read)], damage
            assert state == "running" or len(read) == len(whole), damage
            assert readers("collect", folder) == (0, "")


def test_damaged_json_is_refused_by_every_reader_in_one_line(study, readers, tmp_path):
    for name in ("study.json", "result.json") if (study / "result.json").exists() else ("study.json",):
        whole = read_study(study)
        for damage, folder in damaged(study, name, tmp_path / name):
            try:
                read = read_study(folder)
            except ValueError:
                for reader in ("collect", "resume", "results", "report", "wandb_sync"):
                    code, err = readers(reader, folder)
                    assert_one_line(code, err, (damage, reader))
            else:  # the last line end, or a letter in the checksum's own name
                assert whole.items() <= read.items(), damage


@pytest.mark.parametrize("study", ["stopped", "running"], indirect=True)
def test_advice_about_a_damaged_journal_makes_a_study_that_can_be_resumed(study, readers, tmp_path):
    shutil.copytree(study, folder := tmp_path / "a study")
    lines = lines_of((folder / "reports.jsonl").read_bytes())
    lines[6] = lines[6].replace(b"0.1", b"0.2")
    (folder / "reports.jsonl").write_bytes(b"".join(lines))
    _, err = readers("resume", folder)
    command = shlex.split(err.strip().partition("tunefleet collect ")[2])
    assert command == ["--keep-lines", "6", str(folder)]
    assert collect_command(command) == 0
    assert (folder / "reports.jsonl.damaged").read_bytes() == b"".join(lines)
    assert len(Journal(folder / "reports.jsonl").read()) == 6
    assert readers("resume", folder) == (0, "")


@pytest.mark.parametrize("study", ["stopped"], indirect=True)
@pytest.mark.parametrize("count", ["-1", "1000", "9" * 30])
def test_no_more_lines_are_kept_than_there_are(study, count, capsys):
    before = {file.name: file.read_bytes() for file in study.iterdir() if file.name != ".lock"}
    assert collect_command(["--keep-lines", count, str(study)]) == 2
    err = capsys.readouterr().err
    assert f"--keep-lines={count}" in err
    assert err.count("\n") == 1
    assert {file.name: file.read_bytes() for file in study.iterdir() if file.name != ".lock"} == before


@pytest.mark.parametrize("study", ["stopped"], indirect=True)
def test_a_second_cut_keeps_the_copy_of_the_first(study, tmp_path):
    shutil.copytree(study, folder := tmp_path / "study")
    whole = (folder / "reports.jsonl").read_bytes()
    assert collect_command(["--keep-lines", "6", str(folder)]) == 0
    assert collect_command(["--keep-lines", "3", str(folder)]) == 0
    assert (folder / "reports.jsonl.damaged").read_bytes() == whole
    assert len((folder / "reports.jsonl.damaged-2").read_bytes().splitlines()) == 6


def test_finished_study_is_never_cut(tmp_path, readers, capsys):
    folder = write_trials(tmp_path / "study")
    before = (folder / "reports.jsonl").read_bytes()
    assert collect_command(["--keep-lines", "3", str(folder)]) == 2
    assert "is done" in capsys.readouterr().err
    assert (folder / "reports.jsonl").read_bytes() == before


def old_form(folder):
    """Writes a study's files as the first edition did."""
    study = Study(folder)
    (folder / "reports.jsonl").write_text("".join(json.dumps(event) + "\n" for event in study.events))
    content = {name: value for name, value in study.facts.items() if name != "events"}
    (folder / "study.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "result.json").unlink()
    return study.events


def test_old_study_is_read_as_it_is_and_continued_in_its_form(tmp_path):
    folder = write_trials(tmp_path / "study", status="stopped")
    before = Study(folder).facts
    events = old_form(folder)
    assert Study(folder).facts == before
    journal = Journal(folder / "reports.jsonl")
    assert Study(folder).events == events
    journal.append({"trial_id": "0001", "promoted_from": 1})
    Journal(journal.file).append({"trial_id": "0001", "status": "error", "error": "lost"})
    last = lines_of(journal.file.read_bytes())[-2:]
    assert last[0] == b'{"trial_id": "0001", "promoted_from": 1}\n'
    assert json.loads(last[1]) == {"trial_id": "0001", "status": "error", "error": "lost"}
    assert len(journal.read()) == len(events) + 2
    assert write_tables(folder, status="stopped", seconds=9.0).facts["statuses"]["error"] == 2


@pytest.mark.parametrize("state", ["done", "stopped"])
def test_damaged_old_journal_is_never_a_traceback_and_never_less(readers, tmp_path, state):
    folder = write_trials(tmp_path / state / "study", status=state)
    old_form(folder)
    before = read_study(folder)
    for damage, copy in damaged(folder, "reports.jsonl", tmp_path):
        for reader in ("collect", "resume", "wandb_sync"):
            code, err = readers(reader, copy)
            if code:
                assert_one_line(code, err, (damage, reader))
            elif state == "done":
                after = read_study(copy)
                assert all(after[key] >= before[key] for key in ("trials", "epochs_spent")), damage


@pytest.mark.parametrize("study", ["running"], indirect=True)
def test_torn_last_line_is_left_out_and_said(study, readers, tmp_path, capsys):
    shutil.copytree(study, folder := tmp_path / "study")
    whole = (folder / "reports.jsonl").read_bytes()
    (folder / "reports.jsonl").write_bytes(whole + b'{"trial_id": "00')
    assert collect_command([str(folder)]) == 0
    assert "a torn last line of 16 bytes left out" in capsys.readouterr().out
    assert readers("resume", folder) == (0, "")


@pytest.mark.parametrize("name", ["study.json", "result.json", "reports.jsonl"])
def test_json_nested_without_end_is_one_line(name, tmp_path):
    """Python's own answer is a RecursionError."""
    write_trials(folder := tmp_path / "study")
    (folder / name).write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(ValueError, match=name):
        Study(folder)
