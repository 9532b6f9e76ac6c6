"""RESULTS.md's table says what the studies found, and nothing of what was not run."""

import pytest

from tests.made_study import change, write_own_study, write_study
from tunefleet.analysis.results import COLUMNS, PUBLISHED, command, main, table
from tunefleet.models.spaces import SPACES

STUDY = {
    "space": "convnet",
    "command": "search/run.py --space convnet --data '../my images' --study-dir ../there --trials 4",
    "options": {"epochs": 9, "pruner": "promote"},
    "trials": 4,
    "epochs_spent": 17,
    "seconds": 125.0,
    "commit": "0123456789ab",
    "machine": "2 CPUs",
    "best": {
        "trial_id": "0002",
        "val_accuracy": 0.63,
        "config": {"lr": 0.012345, "augment": "crop", "hidden": 20, "kernel_size": None, "weights": "none"},
    },
    "final": {
        "seeds": [1, 2, 3],
        "diverged": [],
        "test_accuracy": {"mean": 0.61234, "sd": 0.00456, "interval95": None, "values": [0.61, 0.62, 0.61]},
    },
}


def test_published_accuracies_are_those_of_the_spaces():
    assert PUBLISHED.items() <= {name: space.published for name, space in SPACES.items()}.items()


def test_a_row_says_what_was_found_and_the_others_were_not_run():
    lines = table([STUDY]).splitlines()
    assert len(lines) == 2 + 13
    (ours,) = [line for line in lines if line.startswith("| convnet |")]
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert dict(zip(COLUMNS, cells, strict=True)) == {
        "architecture": "convnet",
        "published": "58.36",
        "test accuracy ± sd (seeds)": "**61.23** ± 0.46 (3)",
        "trials": "4",
        "epochs (all)": "9 (17)",
        "weights": "",
        "best hyperparameters": "lr 0.0123, augment crop, hidden 20",
        "minutes": "2.1",
        "machine": "2 CPUs",
        "commit": "0123456789ab",
    }
    assert sum("not run" in line for line in lines) == 12


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("imagenet", "ImageNet"),
        ("../shared/resnet18-imagenet.pth", "ImageNet (CNTK)"),
        ("resnet18-tinyimagenet.pth", "Tiny ImageNet"),
        ("mine.pth", "mine.pth"),
        ("none", "random"),
    ],
)
def test_a_row_names_the_weights_of_its_backbone(weights, said):
    config = STUDY["best"]["config"] | {"weights": weights, "image_size": 64}
    text = table([STUDY | {"space": "resnet_conv", "best": {"config": config}}])
    (ours,) = [line for line in text.splitlines() if line.startswith("| resnet_conv |")]
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[COLUMNS.index("weights")] == said
    assert cells[COLUMNS.index("best hyperparameters")].endswith("image_size 64")


@pytest.mark.parametrize(
    ("backbone", "published"), [(None, "68.20"), ("resnet18", "68.20"), ("resnet34", "")]
)
def test_another_backbone_is_named_and_compared_with_no_published_accuracy(backbone, published):
    config = STUDY["best"]["config"] | ({"backbone": backbone} if backbone else {})
    text = table([STUDY | {"space": "resnet_conv", "best": {"config": config}}])
    (ours,) = [line for line in text.splitlines() if line.startswith("| resnet_conv |")]
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[COLUMNS.index("published")] == published
    assert ("backbone" in ours) == (backbone == "resnet34")


def test_a_space_of_a_persons_file_is_not_taken_for_the_one_of_its_name():
    own = STUDY | {"source": {"name": "convnet"}}
    *rows, ours = table([STUDY, own, own | {"published": 0.777}]).splitlines()
    assert len(rows) == 2 + 13 + 1
    assert rows[-1].startswith("| convnet |  | **61.23**")
    assert ours.startswith("| convnet | 77.70 | **61.23**")


def test_a_study_of_another_space_is_shown_and_not_dropped():
    assert table([STUDY | {"space": "mine"}]).splitlines()[-1].startswith("| mine |  | **61.23**")


def test_a_diverged_seed_is_named():
    final = STUDY["final"] | {"diverged": [2]}
    assert "(3, 1 diverged)" in table([STUDY | {"final": final}])


@pytest.mark.parametrize("final", [None, {"seeds": [], "diverged": [], "test_accuracy": None}])
def test_a_study_without_a_tested_seed_has_no_accuracy(final):
    assert "no seed was tested" in table([STUDY | {"final": final}])


def test_no_cell_ends_a_row_and_no_rounding_lies():
    study = STUDY | {"machine": "a | b", "seconds": 25.0}
    study["best"] = STUDY["best"] | {"config": {"lr": 0.1, "momentum": 0.99996}}
    final = STUDY["final"]
    study["final"] = final | {"test_accuracy": final["test_accuracy"] | {"mean": 0.99998, "sd": 0.00002}}
    (ours,) = [line for line in table([study]).splitlines() if line.startswith("| convnet |")]
    assert r"| a \| b |" in ours
    assert "| 0.42 |" in ours  # minutes
    assert "momentum 0.99996" in ours
    assert "**99.998** ± 0.002 (3)" in ours


@pytest.mark.parametrize("given", ["--study-dir 'a b'", "'--study-dir=a b'"])
def test_a_command_keeps_its_words_and_loses_its_folder(given):
    study = STUDY | {"command": f"search/run.py --data 'it'\"'\"'s\nhere' {given} --trials 4"}
    assert command(study) == r"python search/run.py --data $'it\'s\nhere' --trials 4"


def test_the_command_is_the_studys_without_its_folder():
    assert command(STUDY) == "python search/run.py --space convnet --data '../my images' --trials 4"


def test_command_line(tmp_path, capsys):
    folder = write_study(tmp_path / "made")
    assert main([str(folder)]) == 0
    assert "65.43" in capsys.readouterr().out
    change(folder, options={"epochs": 4, "pruner": "promote", "points": [{}]})
    assert main([str(folder)]) == 0
    assert "65.43" not in capsys.readouterr().out  # a learning-rate study
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2


@pytest.mark.parametrize(
    ("tested", "said"), [(True, "| test_mse **34.57** ± 1.2 (2) |"), (False, "| val_mse **35** ± 1.4 (2) |")]
)
def test_an_own_training_has_its_metric_and_its_hyperparameters(tmp_path, tested, said, capsys):
    folder = write_own_study(tmp_path / "own", tested=tested)
    assert main([str(folder)]) == 0
    (ours,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| mine |")]
    assert said in ours
    assert "| lr 0.0373, schedule cosine |" in ours


def test_a_study_made_outside_a_checkout_has_no_commit_and_a_row(tmp_path, capsys):
    folder = write_study(tmp_path / "study")
    change(folder, commit=None)
    assert main([str(folder)]) == 0
    assert "|  |\n" in capsys.readouterr().out
