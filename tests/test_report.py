"""The page and its figures, of a hand-made study with names that would break a careless page."""

import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.made_study import (
    EVIL,
    change,
    edit_events,
    remove_trials,
    write_events,
    write_own_study,
    write_study,
)
from tunefleet.analysis import plots
from tunefleet.analysis.facts import PIXELS, facts, first_layer_images
from tunefleet.analysis.load import load
from tunefleet.analysis.report import main, write
from tunefleet.study import Study


@pytest.fixture
def folder(tmp_path):
    """Twelve trials of up to four epochs, one of them diverged, and two fresh seeds."""
    return write_study(tmp_path / "study's <folder>")


def test_a_study_writes_its_page(folder, tmp_path):
    assert Study(folder).report() == folder / "report.html"
    assert Study(folder).report(tmp_path / "out").read_bytes() == (folder / "report.html").read_bytes()
    assert (tmp_path / "out" / "figures").is_dir()


def test_page_has_every_figure_and_number(folder, tmp_path):
    page = write([load(folder)], tmp_path / "out").read_text()
    for name in ("winner_curves", "all_curves", "best_so_far", "rung_survival", "hyperparameters"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size > 1000
        assert (tmp_path / "out" / "figures" / f"{name}.svg").read_text().startswith("<?xml")
    assert page.count("<svg") == 9  # and parallel coordinates, importance, confusion, class accuracy
    for text in (
        "65.43 ± 1.23 %",
        "54.38 to 76.48 %",
        "66.00 %",
        "1 min 15 s",
        "0.03734",
        "48 without pruning",
    ):
        assert text in page
    assert page.count("<tr><td>0") == 12  # trials
    assert page.count("data:image/png") >= 7  # five filters and two mistakes


def test_page_says_that_test_images_were_looked_at_before(folder, tmp_path):
    assert "looked at before" not in write([load(folder)], tmp_path / "out").read_text()
    best = Study(folder).best
    events = [
        {"trial_id": "0012", "epoch": 0, "config": best | {"lr": 0.05}},
        {"trial_id": "0012", "epoch": 1, "val_accuracy": 0.99, "status": "done"},
        {"trial_id": "final-3", "epoch": 0, "config": best | {"lr": 0.05, "seed": 1, "refit": True}},
        {"trial_id": "final-3", "epoch": 1, "test_accuracy": 0.9, "status": "done"},
    ]
    (folder / "best" / "config.json").write_text(json.dumps(Study(folder).seeds[0].config))
    assert load(folder).predictions is not None
    write_events(folder, Study(folder).events + events)
    page = write([load(folder)], tmp_path / "out").read_text()
    assert "The test images were looked at before, for 2 seeds of an earlier winner." in page
    assert load(folder).predictions is load(folder).misclassified is load(folder).first_layer is None


def test_page_needs_nothing_from_elsewhere_and_no_name_becomes_markup(folder, tmp_path):
    page = write([load(folder)], tmp_path / "out").read_text()
    assert "alert(" not in page.replace("&lt;script&gt;alert(", "")
    assert "&lt;script&gt;alert" in page
    loaded = re.findall(r"""(?:src|href)=["']?(?!data:|#)([^"' >]+)""", page)
    assert loaded == []
    assert plots.INK not in page
    assert plots.GRID not in page


def test_study_that_has_just_begun_has_a_page(folder, tmp_path):
    remove_trials(folder, status="running")
    page = write([load(folder)], tmp_path / "out").read_text()
    assert "A study of 0 trials, status running" in page


def test_mistakes_have_their_own_labels(folder):
    (first, second) = facts(load(folder))["mistakes"]
    assert first[1:] == ("dog", EVIL, "75\u00a0%")  # row 3: label 1, predicted 0
    assert second[1:] == (EVIL, "dog", "75\u00a0%")


@pytest.mark.parametrize(
    ("shape", "count"),
    [((10, 3072), 10), ((70, 3, 5, 5), 64), ((10, 512), 0), ((4, 256, 3, 3), 0), ((2, 4), 0)],
)
def test_only_weights_that_see_pixels_are_shown(shape, count):
    assert len(first_layer_images(np.zeros(shape))) == count


def test_command_line(folder, tmp_path, capsys):
    assert main([str(folder)]) == 0
    assert (folder / "report.html").exists()
    assert main([str(tmp_path / "nothing")]) == 2
    assert "holds no study" in capsys.readouterr().err
    (folder / "reports.jsonl").write_text("damaged\n")
    assert main([str(folder)]) == 2
    assert "tunefleet collect" in capsys.readouterr().err


def test_several_studies_are_compared_in_one_page(folder, tmp_path):
    other = write_study(tmp_path / "lr")
    change(other, space="softmax")
    edit_events(other, lambda event: None if event["trial_id"].startswith("final") else event)
    curve = pd.DataFrame(
        {"lr": [0.01, 0.1], "seeds": 3, "mean": [0.5, None], "low": [0.4, None], "high": [0.6, None]}
    )
    curve.assign(verdict=["done", "diverged"]).to_csv(other / "lr_curve.csv", index=False)
    page = write([load(folder), load(other)], tmp_path / "out").read_text()
    assert page.count("<svg") == 2  # accuracy against seconds, learning-rate curves
    assert "Plain networks" in page
    assert "Frozen backbones" not in page
    assert "58.36" in page  # published
    assert "65.43 ± 1.23 (2)" in page
    assert page.count("<td>softmax</td>") == 0  # a learning-rate study has no test accuracy


def test_a_persons_networks_are_compared_apart_from_the_built_in_ones(folder, tmp_path):
    other = write_study(tmp_path / "mine")
    change(other, space="resnet_mine", source={"name": "resnet_mine"})
    page = write([load(folder), load(other)], tmp_path / "out").read_text()
    assert [page.count(name) for name in ("Plain networks", "Own networks", "Frozen backbones")] == [1, 1, 0]


def test_page_of_an_own_training_has_its_metric_and_nothing_of_images(tmp_path):
    folder = write_own_study(tmp_path / "own")
    page = write([load(folder)], tmp_path / "out").read_text()
    for text in (
        "<h1>mine</h1>",
        "A study of 12 trials by val_mse (less is better), status done",
        "<b>34.57 ± 1.2</b><span>test_mse, mean ± sd of 2 fresh seeds<",
        "<b>23.52 to 45.62</b><span>95 % interval of that mean<",
        "<b>34</b><span>best val_mse<",
        "Trial 0008, chosen by its val_mse of 34.</p>",
        "val_mse of every trial.",
        "Best val_mse found",
        "for the rank of val_mse at the first rung",
        "val_mse: at its last epoch",
        "best_val_mse",
    ):
        assert text in page
    body = page.partition("</style>")[2]
    for text in ("accuracy", "images", "Misclassified", "First layer", "split ", " %</b>"):
        assert text not in body, text


def test_page_says_that_there_is_no_test_figure(tmp_path):
    page = write([load(write_own_study(tmp_path / "own", tested=False))], tmp_path / "out").read_text()
    assert "<b>35 ± 1.4</b><span>val_mse, mean ± sd of 2 fresh seeds; there is no test figure<" in page
    assert "chosen by its val_mse of 34; there is no test figure.</p>" in page
    assert "test_mse" not in page


def test_a_study_by_another_metric_has_its_test_figure_and_accuracy_beside_it(folder):
    change(folder, metric={"name": "val_loss", "mode": "min"})
    tests = {"final-1": 1.25, "final-2": 0.75}
    edit_events(folder, lambda e: e | ({"test_loss": tests[e["trial_id"]]} if "test_accuracy" in e else {}))
    best = load(folder).winner.config  # another one than by val_accuracy
    fresh = [best | {"seed": seed, "refit": True} for seed in (1, 2)]
    edit_events(folder, lambda e: e | ({"config": fresh.pop(0)} if e.get("config", {}).get("refit") else {}))
    said = facts(load(folder))
    assert said["cards"][:5] == [
        ("test_loss, mean ± sd of 2 fresh seeds", "1 ± 0.35"),
        ("95 % interval of that mean", "-2.177 to 4.177"),
        ("test accuracy, mean ± sd of 2 fresh seeds", "65.43 ± 1.23 %"),
        ("95 % interval of that mean", "54.38 to 76.48 %"),
        ("best val_loss", "0.3"),
    ]
    assert said["best_text"] == "Trial 0000, chosen by its val_loss of 0.3 on 100 images."


def test_own_trainings_are_compared_in_a_table_of_their_own(folder, tmp_path):
    own = write_own_study(tmp_path / "own")
    page = write([load(folder), load(own)], tmp_path / "out").read_text()
    assert "65.43 ± 1.23 (2)" in page
    (table,) = re.findall(r"<h2>Own trainings</h2>.*?</table>", page, re.DOTALL)
    assert "<td>test_mse 34.57 ± 1.2 (2)</td>" in table
    assert "accuracy" not in table
    assert "images" not in table
    alone = write([load(own), load(own)], tmp_path / "alone").read_text()
    assert "<h1>2 studies</h1>" in alone
    assert "accuracy" not in alone


def test_images_of_a_page_are_no_larger_than_it_shows_them(tmp_path):
    folder = write_study(tmp_path / "made", pixels=1024)
    np.save(folder / "best" / "first_layer.npy", np.random.default_rng(0).normal(size=(10, 3 * 512 * 512)))
    page = write([load(folder)], tmp_path / "out").read_text()
    images = [
        Image.open(io.BytesIO(base64.b64decode(text))) for text in re.findall(r"png;base64,([^\"]+)", page)
    ]
    sizes = [image.size for image in images]
    assert sizes.count((PIXELS, PIXELS)) == 12  # ten filters, two mistakes
    assert len(page) < 3_000_000


def test_ctrl_c_is_code_3_without_a_traceback(folder, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tunefleet.analysis.report.load", interrupt)
    assert main([str(folder)]) == 3
    assert capsys.readouterr().err == "stopped\n"


def test_a_list_that_all_trials_have_is_shown_once(tmp_path):
    folder = write_study(tmp_path / "made")

    def edit(event):
        return event | ({"config": event["config"] | {"sizes": [64, 64]}} if "config" in event else {})

    edit_events(folder, edit)
    assert "sizes [64, 64]" in facts(load(folder))["shared"]


def test_counts_of_one_are_singular(tmp_path):
    folder = write_study(tmp_path / "made", trials=1, epochs=1, rungs=())

    def edit(event):
        return (
            None
            if event["trial_id"] == "final-2"
            else event | ({"test_accuracy": 0.99997} if "test_accuracy" in event else {})
        )

    edit_events(folder, edit)
    change(folder, validation_count=1)
    said = facts(load(folder))
    assert said["subtitle"].startswith("A study of 1 trial, ")
    assert said["cards"][0] == ("test accuracy, mean of 1 fresh seed", ">99.99 %")
    assert said["best_text"].endswith(" on 1 image.")
