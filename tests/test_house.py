"""Who may import whom, and who may see the test images: read from the source, with ast."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "trainables", "search", "analysis", "benchmarks")
FILES = sorted(file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
ALLOWED = {  # of our packages, what each may import
    "models": {"models"},
    "trainables": {"trainables", "models"},
    "search": {"search", "trainables", "models"},
    "analysis": {"analysis"},
    "benchmarks": set(PACKAGES),
}
FORBIDDEN = {  # of others'
    "models": {"ray", "wandb"},
    "trainables": {"wandb"},
    "analysis": {"ray", "torch", "torchvision"},
}
# What a replay compares is what runs: search's own decisions, and Ray's class. Nothing else in analysis/
# needs either, so a report is made where no Ray is installed.
REPLAY = Path("analysis/replay.py")
RAY_IN_TRAINABLES = {"trial.py", "ddp.py"}
# evaluate.py uses the test split; decoded.py describes it, once, before anything is trained.
NAMING_THE_TEST_SPLIT = {"trainables/evaluate.py", "trainables/decoded.py"}


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Yields (top package, name without tunefleet.) of every import, those inside functions too."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            names = [node.module or ""]
        else:
            continue
        for name in (name.removeprefix("tunefleet.") for name in names):
            yield name.partition(".")[0], name


def test_calls(source: str) -> list[int]:
    """Returns the lines that call load_split with anything but the constant "train"."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and "load_split" in ast.unparse(node.func):
            given = [*node.args[1:], *(keyword.value for keyword in node.keywords if keyword.arg == "split")]
            if not (len(given) == 1 and isinstance(given[0], ast.Constant) and given[0].value == "train"):
                lines.append(node.lineno)
    return lines


test_calls.__test__ = False


def names_test_arrays(source: str) -> bool:
    """Returns whether a string, docstrings aside, spells the files of the test split."""
    return any(
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and any(node.value.startswith(f"test_{kind}") for kind in ("images", "labels"))
        for node in ast.walk(ast.parse(source))
    )


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_one_way(file):
    package = file.parts[0]
    excepted = {"search", "ray"} if file == REPLAY else set()
    for top, name in imports(file):
        assert top not in PACKAGES or top in ALLOWED[package] | excepted, f"{file}: {name}"
        assert top not in FORBIDDEN.get(package, set()) - excepted, f"{file} imports {name}"
        if top == "ray" and package == "trainables":
            assert file.name in RAY_IN_TRAINABLES, f"{file} imports {name}"
        if top == "wandb" and package == "search":
            assert file.name == "wandb_sync.py", f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_only_evaluate_opens_the_test_split(file):
    source = (ROOT / file).read_text()
    lines = test_calls(source)
    if file.as_posix() == "trainables/evaluate.py":
        assert len(lines) == 1
    elif file.as_posix() == "trainables/decoded.py":
        assert len(lines) == 1  # cached, which looks whether both splits are whole
    else:
        assert not lines, f"{file}:{lines} may open the test split"
    assert file.as_posix() in NAMING_THE_TEST_SPLIT or not names_test_arrays(source)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('load_split(data, "train")', []),
        ('data.load_split(d, split="train")', []),
        ('load_split(data, "test")', [1]),
        ('x = load_split(data, split="test")', [1]),
        ("load_split(data, which)", [1]),
        ("load_split(*arguments)", [1]),
    ],
)
def test_a_call_for_the_test_split_is_found(source, found):
    assert test_calls(source) == found


def test_nothing_else_in_analysis_imports_the_replay():
    """A report that did would need Ray after all."""
    others = [file for file in FILES if file.parts[0] == "analysis" and file != REPLAY]
    assert "analysis.replay" not in {name for file in others for _, name in imports(file)}
