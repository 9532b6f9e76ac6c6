"""RESULTS.md's table says what the studies found, and nothing of what was not run."""

import json

import pytest

from analysis.results import COLUMNS, PUBLISHED, command, main, table
from search.spaces import SPACES

STUDY = {
    "space": "convnet",
    "command": "search/run.py --space convnet --data '../my images' --study-dir ../there --trials 4",
    "options": {"epochs": 9},
    "trials": 4,
    "epochs_spent": 17,
    "seconds": 125.0,
    "commit": "0123456789ab",
    "machine": "2 CPUs",
    "best": {
        "config": {"lr": 0.012345, "augment": "crop", "hidden": 20, "kernel_size": None, "weights": "none"}
    },
    "final": {
        "seeds": [1, 2, 3],
        "diverged": [],
        "test_accuracy": {"mean": 0.61234, "sd": 0.00456, "values": [0.61, 0.62, 0.61]},
    },
}


def test_published_accuracies_are_those_of_the_spaces():
    assert {name: space.published_accuracy for name, space in SPACES.items()} == PUBLISHED


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
        "minutes": "2",
        "machine": "2 CPUs",
        "commit": "0123456789ab",
    }
    assert sum("not run" in line for line in lines) == 12


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("imagenet", "ImageNet (torchvision)"),
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


def test_a_study_of_another_space_is_shown_and_not_dropped():
    assert table([STUDY | {"space": "mine"}]).splitlines()[-1].startswith("| mine |  | **61.23**")


def test_a_diverged_seed_is_named():
    final = STUDY["final"] | {"diverged": [2]}
    assert "(3, 1 diverged)" in table([STUDY | {"final": final}])


@pytest.mark.parametrize("final", [None, {"seeds": [], "diverged": [], "test_accuracy": None}])
def test_a_study_without_a_tested_seed_has_no_accuracy(final):
    assert "no seed was tested" in table([STUDY | {"final": final}])


def test_the_command_is_the_studys_without_its_folder():
    assert command(STUDY) == "python search/run.py --space convnet --data '../my images' --trials 4"


def test_command_line(tmp_path, capsys):
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    assert main([str(tmp_path)]) == 0
    assert "61.23" in capsys.readouterr().out
    (tmp_path / "study.json").write_text(json.dumps(STUDY | {"options": {"epochs": 9, "points": [{}]}}))
    assert main([str(tmp_path)]) == 0
    assert "61.23" not in capsys.readouterr().out  # a learning-rate study
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([]) == 2
