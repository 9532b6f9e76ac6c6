"""Spaces in people's files: how they are found, kept apart, copied and taken elsewhere."""

import dataclasses
import importlib
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from ray import tune

from tunefleet.models import sources
from tunefleet.models.origin import of_module, pickled
from tunefleet.models.sources import collected, restored, write
from tunefleet.models.space import Space
from tunefleet.models.spaces import find_space
from tunefleet.search.options import StudyOptions

FILE = """
from ray import tune
from torch import nn
from tunefleet import Space
import helper

def build(num_classes, image_shape, width=4):
    import late
    return nn.Sequential(nn.Flatten(), nn.Linear(helper.features(image_shape), num_classes))

space = Space(build, {"lr": tune.loguniform(1e-3, 1e-1), "width": tune.choice([4, 8])})
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "helper.py").write_text("import math\ndef features(shape): return math.prod(shape)\n")
    (tmp_path / "late.py").write_text("LATE = 1\n")
    (tmp_path / "unused.py").write_text("1 / 0\n")
    return tmp_path


def test_a_file_gives_its_only_space(folder):
    space = find_space("mine.py")
    assert (space.name, space.reference, list(space.arguments)) == ("mine", "mine.py", ["width"])
    assert sorted(space.source.files) == ["helper.py", "late.py", "mine.py"]  # late is imported by building
    (folder / "later.py").write_text("")
    (folder / "unused.py").write_text("import importlib\nimportlib.import_module(f'{__package__}.later')\n")
    vars(sys.modules[f"{space.source.package}.mine"])["__builtins__"]["__import__"]("unused")
    assert sorted(set(collected(space).source.files) - set(space.source.files)) == ["later.py", "unused.py"]
    assert not {"mine", "helper", "late"} & set(sys.modules)


def test_neighbours_of_equal_names_and_edited_files_are_kept_apart(folder, tmp_path):
    first = find_space("mine.py")
    (folder / "helper.py").write_text("def features(shape): return 7\n")
    edited = find_space("mine.py")
    other = folder / "other"
    other.mkdir()
    (other / "mine.py").write_text(FILE)
    (other / "helper.py").write_text("def features(shape): return 9\n")
    (other / "late.py").write_text("")
    elsewhere = find_space("other/mine.py")
    widths = [space.build(10, (3, 4, 4))[1].in_features for space in (first, edited, elsewhere, first)]
    assert widths == [48, 7, 9, 48]
    assert first.source.sha256 != edited.source.sha256


def test_another_process_imports_the_sources_and_no_pickle_of_them(folder, tmp_path):
    space = find_space("mine.py")
    space.build(10, (3, 4, 4))
    space = collected(space)
    source = dataclasses.replace(space.source, data_dir=str(tmp_path / "data"))
    space = dataclasses.replace(space, source=source, channels_last=True)
    content = pickle.dumps(space)
    (folder / "mine.py").unlink()
    elsewhere = pickle.loads(content)
    assert elsewhere.build(10, (3, 4, 4))[1].in_features == 48
    assert (elsewhere.name, elsewhere.channels_last) == ("mine", True)
    (written,) = (tmp_path / "data" / "spaces").iterdir()
    assert sorted(file.name for file in written.glob("*.py")) == ["helper.py", "late.py", "mine.py"]


def test_a_space_without_a_file_is_pickled_whole():
    def build(num_classes, image_shape, width=4):
        return width

    space = pickled(Space(build, {"width": tune.choice([4, 8])}, name="made"))
    elsewhere = pickle.loads(pickle.dumps(space))
    assert (elsewhere.name, elsewhere.build(1, 2, 8)) == ("made", 8)


@pytest.mark.parametrize(
    ("text", "reference", "message"),
    [
        ("x = 1", "mine.py", r"mine.py has no Space; write for example: space = Space\(build, ranges\)"),
        (FILE + "second = space", "mine.py", "mine.py has 2 spaces; give one: mine.py:space, …"),
        (FILE, "mine.py:spaec", "spaec is no Space; did you mean space"),
        (
            "import nothing_at_all",
            "mine.py",
            "cannot be imported: mine.py line 1: ModuleNotFoundError: No module",
        ),
        ("def f():\n    return x\nf()", "mine.py", "cannot be imported: mine.py line 2: NameError: name 'x'"),
        ("import sys\nsys.exit(3)", "mine.py", "cannot be imported: mine.py line 2: SystemExit: 3"),
        ("\nimport broken", "mine.py", "cannot be imported: mine.py line 2: ZeroDivisionError"),
        ("if:\n  1", "mine.py", "cannot be imported: mine.py line 1: SyntaxError: invalid syntax"),
        (FILE, "none.py", "there is no such file"),
        (FILE, "mine", "mine is unknown; mine.py is here: give --space mine.py"),
        (FILE, "nowhere.module:space", "there is no module nowhere here"),
        (FILE.replace('"width"', '"widht"'), "mine.py", "widht is neither .* did you mean width"),
    ],
)
def test_a_mistake_is_one_line(folder, text, reference, message, monkeypatch):
    (folder / "mine.py").write_text(text)
    installed = folder / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(installed)
    with pytest.raises(ValueError, match=message) as error:
        find_space(reference)
    assert "\n" not in str(error.value)


def test_a_package_is_copied_whole(folder):
    package = folder / "networks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "small.py").write_text(FILE.replace("import helper", "from networks import helper"))
    (package / "helper.py").write_text((folder / "helper.py").read_text())
    (package / "unused.py").write_text("")
    space = find_space("networks.small:space")
    assert space.name == "small"
    names = [f"networks/{name}.py" for name in ("__init__", "helper", "small", "unused")]
    assert sorted(space.source.files) == ["late.py", *names]


def test_a_study_is_restored_from_its_copy_and_says_where_the_original_differs(folder, tmp_path):
    space = find_space("mine.py")
    write(space.source.files, tmp_path / "copy")
    recorded = space.source.to_dict()
    (folder / "helper.py").write_text("def features(shape): return 7\n")
    found, line = restored(recorded, tmp_path / "copy", str(tmp_path / "data"))
    (folder / "late.py").unlink()
    assert found.name == "mine"
    assert line == "helper.py differs from the study's copy, which is used"
    (tmp_path / "copy" / "mine.py").write_text("changed")
    with pytest.raises(ValueError, match=r"mine\.py is not what the study began with"):
        restored(recorded, tmp_path / "copy", str(tmp_path / "data"))


def test_a_space_of_a_notebook_is_not_restored_from_its_folder(tmp_path):
    recorded = pickled(Space(lambda num_classes, image_shape: None, name="made")).source.to_dict()
    with pytest.raises(ValueError, match=r"resume by tunefleet\.resume\(folder, space=space\)"):
        restored(recorded, tmp_path, "")


def test_built_in_spaces_travel_by_name():
    space = find_space("convnet")
    assert pickle.loads(pickle.dumps(space)).name == "convnet"
    assert len(pickle.dumps(space)) < 1000
    assert sources.find("convnet", {"convnet": space}) is space


def test_two_spaces_of_one_file_are_two(folder, tmp_path):
    (folder / "mine.py").write_text(FILE + "other = Space(lambda n, s: 7, name='other')\n")
    found = [find_space(f"mine.py:{name}") for name in ("space", "other")]
    sources_ = [dataclasses.replace(space.source, data_dir=str(tmp_path)) for space in found]
    assert [source.space().name for source in sources_] == ["mine", "other"]
    assert [list(source.space().ranges) for source in sources_] == [["lr", "width"], []]


def test_a_space_that_was_changed_does_not_come_from_its_source():
    space = find_space("resnet_softmax")
    assert dataclasses.replace(space, trials=3).source == space.source
    assert dataclasses.replace(space, normalise="data").source is None
    assert (
        pickle.loads(pickle.dumps(pickled(dataclasses.replace(space, normalise="data")))).normalise == "data"
    )


@pytest.mark.parametrize("name", ["__main__", "mine"])
def test_a_space_of_a_module_is_found_in_its_file(folder, name, monkeypatch):
    module = ModuleType(name)
    exec(FILE.replace("import helper", ""), vars(module))
    module.__file__ = str(folder / "mine.py")
    monkeypatch.setitem(sys.modules, name, module)
    assert sorted(of_module(module.space).source.files) == ["helper.py", "late.py", "mine.py"]
    module.space = dataclasses.replace(module.space, trials=3)
    assert of_module(module.space) is None  # the file has another one
    module.guarded = module.space
    del module.space
    assert of_module(module.guarded) is None  # made under the guard of __main__


def test_an_installed_space_says_where_another_version_is_there(folder, monkeypatch, tmp_path):
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "theirs.py").write_text(FILE.replace("import helper", ""))
    monkeypatch.syspath_prepend(installed)
    recorded = find_space("theirs:space").source.to_dict()
    assert restored(recorded, tmp_path, "")[1] == ""
    (installed / "theirs.py").write_text("")
    line = restored(recorded, tmp_path, "")[1]
    monkeypatch.delitem(sys.modules, "theirs")
    assert line == "the installed theirs is not the one that the study began with; it is used"


def test_a_script_that_searches_when_it_is_imported_is_one_line(folder):
    (folder / "mine.py").write_text(FILE + "space.search(data='digits')\n")
    with pytest.raises(ValueError, match=r"mine\.py line \d+: .*under: if __name__ == '__main__':") as error:
        find_space("mine.py")
    assert "\n" not in str(error.value)


def imported(name, monkeypatch, folder):
    """Imports a module as a notebook does, and forgets it afterwards."""
    monkeypatch.syspath_prepend(folder)
    for known in ("mine", "helper", "late"):
        monkeypatch.setitem(sys.modules, known, None)
        del sys.modules[known]
    return importlib.import_module(name)


def test_a_space_that_a_notebook_imports_comes_from_its_file(folder, monkeypatch):
    mine = imported("mine", monkeypatch, folder)
    found = of_module(mine.space)
    assert (found.name, found.reference) == ("mine", "mine.py")
    assert sorted(found.source.files) == ["helper.py", "late.py", "mine.py"]


@pytest.mark.parametrize("change", ["metric", "epochs", "normalise", "first"])
def test_a_space_that_was_changed_is_not_what_its_file_has(folder, monkeypatch, change):
    values = {"metric": "val_loss", "epochs": 3, "normalise": "imagenet", "first": {"lr": 0.01, "width": 8}}
    mine = imported("mine", monkeypatch, folder)
    mine.space = dataclasses.replace(mine.space, **{change: values[change]})
    assert of_module(mine.space) is None


def test_a_space_that_its_file_makes_as_a_script_only_is_pickled(folder, monkeypatch):
    mine = imported("mine", monkeypatch, folder)
    (folder / "mine.py").write_text(FILE.replace("\nspace =", "\nif __name__ == '__main__':\n    space ="))
    assert of_module(mine.space) is None


def test_what_a_notebook_imports_of_its_folder_is_pickled_whole(folder, monkeypatch):
    mine = imported("mine", monkeypatch, folder)
    content = pickle.dumps(pickled(Space(mine.build, {"width": tune.choice([4, 8])}, name="made")))
    (folder / "elsewhere").mkdir()
    code = """
import pickle, sys
print(pickle.load(sys.stdin.buffer).build.__globals__["helper"].features((3, 2)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=content, cwd="elsewhere", stdout=subprocess.PIPE
    )
    assert done.stdout == b"6\n"


def test_an_argument_is_added_to_a_persons_network_in_one_line_of_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from ray import tune\nfrom torch import nn\nfrom tunefleet import Space\n\n"
        "def layers(classes, *others):\n"
        "    return nn.Sequential(nn.Flatten(), *others, nn.LazyLinear(classes))\n\n"
        "space = Space(lambda n, s: layers(n), {'lr': tune.choice([0.1])})\n"
    )
    assert list(find_space("mine.py").ranges) == ["lr"]
    *others, _ = Path("mine.py").read_text().splitlines()
    line = "space = Space(lambda n, s, rate: layers(n, nn.Dropout(rate)), {'rate': tune.uniform(0.1, 0.9)})"
    Path("mine.py").write_text("\n".join([*others, line]))
    options = StudyOptions(find_space("mine.py"), image_size=32)
    values = options.fixed_values() | options.suggest(0, [])
    assert values["rate"] == 0.5
    assert options.space.network(2, (3, 8, 8), options.space.config(values))[1].p == 0.5
    assert options.space.parse("rate", "0.25") == 0.25
