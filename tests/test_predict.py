"""tunefleet predict: images, folders and archives in, CSV out, and a line for what is skipped."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.finished import CLASSES, finished_study, made_data, save_test_images
from tests.images import pack, save_image
from tests.made_study import edit_events
from tunefleet.inference.export import main as export
from tunefleet.inference.predict import close_calls, main
from tunefleet.models.spaces import SPACES
from tunefleet.study import Study

COLUMNS = ["path", "class", *(f"p_{name}" for name in CLASSES)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made_data(tmp_path_factory.mktemp("arrays"))


@pytest.fixture(scope="module")
def study(data, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "study"
    return finished_study(folder, SPACES["softmax"], data, data_dir)


@pytest.fixture
def photos(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return save_test_images(data, Path("photos"))


@pytest.fixture
def predict(study, data_dir, capfd):
    """Runs the command; returns its exit code, its table (None without one) and the lines on stderr."""

    def run(*words):
        code = main([str(study), *map(str, words), "--data-dir", str(data_dir)])
        out, err = capfd.readouterr()
        return code, pd.read_csv(io.StringIO(out)) if out else None, err.splitlines()

    return run


def test_a_folder_gives_the_rows_of_the_test(predict, study, photos):
    code, table, lines = predict(photos)
    assert (code, lines) == (0, [])
    assert table.columns.tolist() == COLUMNS
    assert table["path"].tolist() == [f"photos/{k:02d}.png" for k in range(23)]
    tested = pd.read_parquet(study / "best" / "predictions.parquet")
    np.testing.assert_allclose(table.iloc[:, 2:], tested[["p0", "p1", "p2", "p3"]], atol=1e-5)
    assert table["class"].tolist() == [CLASSES[k] for k in tested["predicted"]]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_an_archive_gives_the_same_and_leaves_nothing_unpacked(predict, photos, data_dir, suffix):
    before = sorted(data_dir.iterdir())
    whole = predict(photos)[1]
    code, table, lines = predict(pack(Path(f"all{suffix}"), photos))
    assert (code, lines) == (0, [])
    assert table["path"].tolist() == [f"all{suffix}/{k:02d}.png" for k in range(23)]
    pd.testing.assert_frame_equal(table.drop(columns="path"), whole.drop(columns="path"))
    assert sorted(data_dir.iterdir()) == before


def test_out_writes_a_new_file(predict, photos):
    assert predict("photos/03.png", "--out", "predictions.csv") == (0, None, [])
    table = pd.read_csv("predictions.csv")
    assert table["path"].tolist() == ["photos/03.png"]
    assert table.iloc[0, 2:].sum() == pytest.approx(1, abs=1e-4)
    code, _, lines = predict("photos/03.png", "--out", "photos/04.png")
    assert (code, lines) == (2, ["error: --out=photos/04.png exists; give a new file, or remove it"])
    code, _, lines = predict("photos/03.png", "--out", "no/p.csv")
    assert (code, lines) == (
        2,
        ["error: --out=no/p.csv cannot be written: there is no folder no; make it first"],
    )


def test_what_cannot_be_read_is_a_line_each_and_the_rest_is_predicted(predict, photos):
    Path("notes.txt").write_text("no image")
    content = Path("photos/05.png").read_bytes()
    Path("cut.png").write_bytes(content[: len(content) // 2])
    Path("photos/06.png").write_bytes(content[:100])
    Path("photos/labels.csv").write_text("a,b")
    Path("photos/.hidden").write_text("")
    Path("empty").mkdir()
    Path("empty.zip").write_bytes(b"PK\5\6" + bytes(18))
    words = ("notes.txt", "cut.png", "photos", "empty", "empty.zip", "gone.png", "photos/07.png")
    code, table, lines = predict(*words)
    assert code == 1
    assert table["path"].tolist() == [*(f"photos/{k:02d}.png" for k in range(23) if k != 6), "photos/07.png"]
    texts = [
        r"notes.txt is not an image",
        r"cut.png cannot be decoded \(.+\)",
        r"photos holds 1 × not an image",
        r"photos/06.png cannot be decoded \(.+\)",
        r"empty holds no images",
        r"empty.zip holds no images",
        r"gone.png does not exist",
    ]
    assert len(lines) == len(texts)
    for line, text in zip(lines, texts, strict=True):
        assert re.fullmatch(f"skipped: {text}", line)


def test_a_camera_raw_file_is_skipped_and_not_predicted_from_its_thumbnail(predict, photos):
    Image.open("photos/00.png").save("photo.dng", format="tiff")
    code, table, lines = predict("photo.dng", "photos/01.png")
    assert (code, table["path"].tolist()) == (1, ["photos/01.png"])
    assert lines == ["skipped: photo.dng cannot be decoded (camera raw (not supported; convert to JPEG))"]


def test_a_cache_that_cannot_be_written_is_named_and_not_the_archive(study, photos, capfd):
    pack(Path("all.zip"), photos)
    assert main([str(study), "all.zip", "--data-dir", "photos/00.png/x"]) == 2
    error = capfd.readouterr().err
    assert error == "error: --data-dir=photos/00.png/x cannot be written (Not a directory); give another\n"


def test_nothing_to_predict_is_an_error(predict, photos):
    Path("notes.txt").write_text("no image")
    code, table, lines = predict("notes.txt")
    assert (code, table) == (2, None)
    assert lines[-1] == "error: nothing was predicted; give images, or folders or archives of images"


def test_a_study_that_is_none_is_an_error(photos, capfd):
    assert main(["photos", "photos"]) == 2
    assert capfd.readouterr().err == ("error: photos holds no study: there is no study.json in it\n")


@pytest.mark.parametrize("command", [main, export])
def test_a_study_without_a_finished_seed_is_a_line(command, study, photos, capfd):
    shutil.copytree(study, "unfinished")
    edit_events(Path("unfinished"), lambda event: None if "final" in event["trial_id"] else event)
    assert command(["unfinished", "new.pt2"]) == 2
    assert capfd.readouterr().err == (
        "error: unfinished has no finished seed of its winner; train some: tunefleet resume unfinished "
        "--final-seeds 4\n"
    )


def test_python_warns_of_what_is_skipped(study, photos):
    Path("notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match="skipped: notes.txt is not an image"):
        frame = Study(study).predict(["notes.txt", photos / "01.png"])
    assert frame.columns.tolist() == COLUMNS
    assert frame["path"].tolist() == ["photos/01.png"]


def test_photos_of_any_size_and_mode_are_predicted(predict, photos):
    for mode, name in (("L", "grey.jpg"), ("RGBA", "clear.png"), ("CMYK", "print.jpg"), ("P", "few.gif")):
        save_image(Path("photos") / "more" / name, 3, (70, 50), mode)
    code, table, lines = predict("photos/more")
    assert (code, lines, len(table)) == (0, [], 4)


def test_a_name_that_breaks_lines_or_is_no_text_stays_one_row(predict, photos):
    image = Image.open("photos/00.png")
    for name in ("a\nb.png", 'c,"d.png', "e\udcff.png"):
        image.save(name, format="PNG")
    code, table, lines = predict("a\nb.png", 'c,"d.png', "e\udcff.png")
    assert (code, lines) == (0, [])
    assert table["path"].tolist() == ["a\nb.png", 'c,"d.png', r"e\udcff.png"]


def test_close_calls_are_counted():
    rows = [("a", "cat", 0.5, 0.49, 0.01), ("b", "cat", 0.5, 0.3, 0.2), ("c", "dog", 0.41, 0.17, 0.42)]
    assert close_calls(pd.DataFrame(rows, columns=["path", "class", "p_cat", "p_dog", "p_eel"])) == 2
