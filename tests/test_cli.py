"""What a user typed, in errors, names and commands: one line that a terminal shows and a shell reads back."""

import subprocess

import pytest

from tunefleet.cli import Parser, clock, counted, exit_code, printable, shell


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 猫 🐱 $x$ [bold] 100 %", "plain ünï 猫 🐱 $x$ [bold] 100 %"),
        ("a\nb\tc\x1b[31m\x00", r"a\nb\tc\x1b[31m\x00"),
        ("caf\udce9", r"caf\xe9"),  # Latin-1 bytes in a file name, as os.listdir returns them
        ("\ud800", r"\ud800"),
        ("evil\u202egnp.exe\u2028", r"evil\u202egnp.exe\u2028"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # a joiner is part of how Persian is written
        ("\x85\xad", r"\u0085\u00ad"),
    ],
)
def test_printable_text_has_one_line_and_is_utf8(text, shown):
    assert printable(text) == shown
    assert len(printable(text).encode().splitlines()) == 1


def test_printable_reaches_into_lists_and_dicts_and_leaves_other_values():
    assert printable({"a\n": ["b\n", {"c": "d\n"}], "e": 0.5, "f": None}) == {
        r"a\n": [r"b\n", {"c": r"d\n"}],
        "e": 0.5,
        "f": None,
    }


@pytest.mark.parametrize(
    "word",
    [
        *("studies/NAME", "a b", "it's", 'say "x"', "$HOME", "`id`", "100%", "~", "*", "", "ünï", "\\", "!x"),
        *(
            "line\nbreak",
            "it's\n$x",
            "tab\t\\n",
            "caf\udce9",
            "\udcff0",
            "\x1b[0m",
            "\u202e\U000e0001",
            "\x7fab",
        ),
    ],
)
def test_shell_commands_are_one_line_that_bash_reads_back(word):
    command = shell("printf", "%s", word)
    assert printable(command) == command
    said = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout
    assert said == word.encode(errors="surrogateescape")


def test_an_argument_that_is_refused_stays_on_one_line(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--trials", type=int)
    for given in ("--trials=--", "--trials=1\n2x", "--nosuch\n", "--trials=\udcff"):
        with pytest.raises(SystemExit):
            parser.parse_args([given])
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [ValueError("a\nb"), OSError(13, "no", "a\nb"), OSError(28, "No space left on device", "a\nb")],
    ids=["value", "path", "full"],
)
def test_an_error_stays_on_one_line(error, capsys):
    def command():
        raise error

    assert exit_code(command) in (2, 3)
    err = capsys.readouterr().err
    assert r"a\nb" in err
    assert err.count("\n") == 1


def test_fractions_are_plural():
    assert [counted(n, "GPU") for n in (0.5, 1.0, 2.0)] == ["0.5 GPUs", "1 GPU", "2 GPUs"]


def test_one_is_not_plural():
    assert [counted(n, "trial") for n in (0, 1, 2, 10_000)] == [
        "0 trials",
        "1 trial",
        "2 trials",
        "10,000 trials",
    ]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


def test_clock_carries_into_minutes():
    assert [clock(s) for s in (0.2, 59.4, 59.7, 75, 3600, 4e6)] == [
        *("0 s", "59 s", "1 min 00 s", "1 min 15 s", "1 h 00 min", "1,111 h 06 min")
    ]
