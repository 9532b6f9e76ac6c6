"""Which packages may import which, and which may see the test images: read from the source, with ast."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "trainables", "search", "inference", "analysis", "benchmarks")
GROUND = {
    "cli",
    "collect",
    "files",
    "journal",
    "lease",
    "mirror",
    "store",
    "study",
}  # of src/tunefleet; anybody may import it
FILES = sorted(
    file.relative_to(ROOT)
    for folder in (*(ROOT / package for package in PACKAGES), ROOT / "src/tunefleet")
    for file in (folder.glob("*.py") if folder.name == "tunefleet" else folder.rglob("*.py"))
)
ALLOWED = {  # of our packages, what each may import
    "models": {"models"},
    "trainables": {"trainables", "models"},
    "search": {"search", "trainables", "models"},
    "inference": {"inference", "trainables", "models"},
    "analysis": {"analysis"},
    "benchmarks": set(PACKAGES),
    "src": set(),
}
FORBIDDEN = {  # of others'
    "models": {"wandb"},
    "trainables": {"wandb"},
    "inference": {"ray", "wandb"},
    "analysis": {"ray", "torch", "torchvision"},
    "src": {"ray", "torch", "torchvision", "wandb"},
}
RAY_IN_TRAINABLES = {"trial.py", "ddp.py"}
# evaluate.py uses the test split; data.py describes it, once, before anything is trained.
NAMING_THE_TEST_SPLIT = {"trainables/evaluate.py", "trainables/data.py"}


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
    if file.name in ("__init__.py", "__main__.py") and package == "src":
        return  # looks up lazily
    for top, name in imports(file):
        assert top not in PACKAGES or top in ALLOWED[package], f"{file}: {name}"
        assert top not in FORBIDDEN.get(package, set()), f"{file} imports {name}"
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
    elif file.as_posix() == "trainables/data.py":
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


# What other libraries document as settings that are assigned
SETTINGS = ("torch.backends.", "sys.argv", "logging.raiseExceptions", "PIL.PngImagePlugin.MAX_TEXT_")
# Files that still assign elsewhere; to become empty
KNOWN_ASSIGNMENTS = {
    "search/wandb_sync.py": {"os.environ"},
}
INTERNAL_RAY = ("ray.tune.execution", "ray.raylet")  # private by their place, not by their name
WRITERS = ("pop", "update", "setdefault", "clear")


def origins(tree: ast.AST) -> dict[str, str]:
    """Returns the full names of what is imported: {"tune": "ray.tune"}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node: ast.AST, known: dict[str, str]) -> str:
    """Returns the full name of a chain of attributes that begins with an import; empty: it does not."""
    if isinstance(node, ast.Name):
        return known.get(node.id, "")
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, known)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def is_private_ray(name: str) -> bool:
    parts = name.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return parts[0] == "ray" and (hidden or any(f"{name}.".startswith(f"{bad}.") for bad in INTERNAL_RAY))


def private_ray(source: str) -> list[str]:
    """Returns the private names of Ray that a source imports or reaches."""
    tree = ast.parse(source)
    known, names = origins(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(dotted(node, known))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names += [str(word.value) for word in node.args if isinstance(word, ast.Constant)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            names.append(f"{dotted(node.args[0], known)}.{getattr(node.args[1], 'value', '')}")
    return [name for name in names if is_private_ray(name)]


def foreign_assignments(source: str) -> list[str]:
    """Returns what a source changes in modules and classes that are not ours."""
    tree = ast.parse(source)
    known, changed = origins(tree), []
    for node in ast.walk(tree):
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in ("setattr", "delattr"):
                changed.append(f"{dotted(node.args[0], known)}.")
            owner = dotted(node.func, known)
            if owner.startswith("sys.modules.") and owner.endswith(WRITERS):
                changed.append(owner)
            if "monkeypatch" in function:
                changed.append(function)
        elif isinstance(node, ast.Import | ast.ImportFrom) and "mock" in ast.unparse(node):
            changed.append(ast.unparse(node))
        for target in targets:
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(part, ast.Attribute):
                    changed.append(dotted(part, known))
                elif isinstance(part, ast.Subscript) and dotted(part.value, known) == "sys.modules":
                    changed.append("sys.modules")
    return [name for name in changed if name.strip(".") and not name.startswith(("tunefleet.", *SETTINGS))]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_private_of_ray_is_used(file):
    assert private_ray((ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import ray._private.worker",
        "from ray._raylet import GcsClient",
        "from ray.air.execution._internal.actor_manager import RayActorManager",
        "from ray.tune.execution.tune_controller import TuneController",
        "from ray.tune import execution",
        "def f():\n    from ray import _private",
        "import ray\nray._private.state.actors()",
        "from ray import tune as t\nt.execution.tune_controller",
        "import ray as r\nx = getattr(r, '_private')",
        "importlib.import_module('ray._private.services')",
    ],
)
def test_a_private_name_of_ray_is_found(source):
    assert private_ray(source)


def test_a_public_name_of_ray_is_not_taken_for_a_private_one():
    source = "import ray\nfrom ray import tune\nray.nodes(), ray.__version__, tune.Callback, self._private"
    assert private_ray(source) == []


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_of_another_library_is_replaced(file):
    found = set(foreign_assignments((ROOT / file).read_text()))
    assert found == KNOWN_ASSIGNMENTS.get(file.as_posix(), set())


@pytest.mark.parametrize(
    "source",
    [
        "import ray\nray.nodes = mine",
        "from ray.tune import tune_controller as c\nc.RayActorManager = Mine",
        "from torch import nn\nnn.Linear.forward = mine",
        "import torch\nsetattr(torch, 'compile', mine)",
        "import torch\ndelattr(torch.nn, 'Linear')",
        "import torch\ndel torch.compile",
        "import torch\ntorch.limit += 1",
        "import torch\na, torch.limit = 1, 2",
        "import sys\nsys.modules['torch._dynamo'] = stub",
        "import sys\nsys.modules.setdefault('torch._dynamo', stub)",
        "from sys import modules\nmodules['x'] = stub",
        "from unittest import mock",
        "pytest.monkeypatch.setattr(ray, 'nodes', mine)",
    ],
)
def test_a_replacement_is_found(source):
    assert foreign_assignments(source)


def test_what_is_ours_or_a_documented_setting_may_be_assigned():
    source = "import torch, sys\nfrom tunefleet import search\ntorch.backends.cudnn.benchmark = True\n"
    assert (
        foreign_assignments(source + "search.engine.Trial = 1\nself.x = 2\nsys.argv = []\nx = torch.y") == []
    )


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Returns which of our modules each imports, inside functions too; of {module: source}."""
    graph = {}
    for module, source in sources.items():
        graph[module] = found = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found &= sources.keys() - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Returns the modules of a circle among imports; none where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def test_no_circle_among_imports():
    def module_of(file: Path) -> str:
        parts = file.with_suffix("").parts
        return ".".join(("tunefleet", *(parts[2:] if parts[0] == "src" else parts))).removesuffix(".__init__")

    looks_up_lazily = {"tunefleet", "tunefleet.__main__", "tunefleet.study"}
    sources = {module_of(file): (ROOT / file).read_text() for file in FILES}
    assert circle(import_graph({k: v for k, v in sources.items() if k not in looks_up_lazily})) == []


def test_a_circle_is_found_inside_functions_too():
    sources = {"a": "import b", "b": "def f():\n    from c import x", "c": "from a import y", "d": "import a"}
    assert circle(import_graph(sources)) == ["a", "b", "c"]
    assert circle(import_graph(sources | {"c": ""})) == []


def long_functions(source: str, most: int = 50) -> list[str]:
    """Returns the functions with more lines than ``most``, their docstrings apart."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            of_docstring = first.end_lineno - first.lineno + 1 if documented else 0
            if node.end_lineno - node.lineno + 1 - of_docstring > most:
                found.append(node.name)
    return found


@pytest.mark.parametrize("file", FILES, ids=str)
def test_functions_fit_a_screen(file):
    assert long_functions((ROOT / file).read_text()) == []


def test_a_long_function_is_found_and_its_docstring_is_not_counted():
    body = "    x = 1\n" * 50
    assert long_functions(f"def f():\n{body}") == ["f"]
    docstring = '    """A.\n' + "\n" * 60 + '    """\n'
    assert long_functions(f"def f():\n{docstring}" + "    x = 1\n" * 49) == []


@pytest.mark.parametrize("package", [*PACKAGES, "src/tunefleet"])
def test_a_folder_has_at_most_20_files(package):
    assert len([file for file in (ROOT / package).glob("*.py") if not file.is_symlink()]) <= 20


TEXTS = [
    file
    for pattern in (
        "*.md",
        "*/*.md",
        "*/*.py",
        "src/tunefleet/*.py",
        "benchmarks/*.sh",
        "cluster/*",
        ".ci/run",
    )
    for file in ROOT.glob(pattern)
    if file.is_file() and file.name != "CHANGELOG.md"  # history names what was there
]
NAMED = re.compile(
    r"(?<![\w/.{}-])((?:src/tunefleet|search|trainables|models|inference|analysis|benchmarks|tests|cluster|docs)/"
    r"[\w/.-]*\.(?:py|md|sh|yaml|j2)|[A-Z]{4,}\.md)"
)


def missing_files(text: str) -> list[str]:
    """Returns the files of this repository that a text names and that are not there."""
    return [name for name in NAMED.findall(text) if not (ROOT / name).exists()]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_that_is_named_is_there(file):
    assert missing_files(file.read_text("utf-8")) == []


def test_a_file_that_is_not_there_is_found():
    gone = "search/" + "stopping.py"
    assert missing_files(f"see {gone} and search/run.py, README.md, studies/x/best/model.pt") == [gone]
