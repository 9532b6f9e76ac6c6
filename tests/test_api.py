"""Studies from Python: what keywords become, and what is raised; nothing is trained."""

import os
import re

import pytest
from ray import tune

import tunefleet
from tunefleet import Space
from tunefleet.journal import TrialRecord
from tunefleet.models.spaces import find_space
from tunefleet.search import api, connection, running
from tunefleet.search.options import StudyOptions, parsed

KEY = "k" * 40
DIGITS = {"data": "digits"}


class Finished:
    """A study as it is read when its run has ended."""

    searched = ()

    def __init__(self, folder):
        self.folder = folder


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Returns the requests that were run, in place of running them; ``code`` is how."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    requests = []

    def run(request, session):
        requests.append((request, os.environ.get("WANDB_API_KEY")))
        session.studies.append(request.folder)
        request.folder.mkdir(parents=True)
        (request.folder / "study.json").touch()
        return ran.code

    def ran(**options):
        study = find_space("softmax").search(**DIGITS, **options)
        return study, *requests.pop()

    ran.code = 0
    monkeypatch.setattr(running, "run", run)
    monkeypatch.setattr(api, "Study", Finished)
    return ran


def test_folders_of_a_study_are_where_they_were_asked_for(ran, tmp_path):
    study, request, _ = ran(storage=tmp_path / "shared", wandb="off")
    assert study.folder == request.folder
    assert study.folder.parent == tmp_path / "shared"
    study, request, _ = ran(study_dir="~/mine", wandb="off")
    assert study.folder == request.folder == tmp_path / "mine"


def test_paths_of_a_home_folder_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for open_study in (tunefleet.resume, tunefleet.load):
        with pytest.raises(ValueError, match=f"^{tmp_path / 'none'} holds no study"):
            open_study("~/none")


def test_no_worker_inherits_the_key(ran, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    _, request, inherited = ran(wandb="online", wandb_tags="paper")
    assert (request.wandb.key, request.wandb.tags, inherited) == (KEY, ("paper",), None)
    monkeypatch.delenv("WANDB_MODE")
    assert ran()[1].wandb.mode == "online"
    assert os.environ["WANDB_API_KEY"] == KEY


@pytest.mark.parametrize("mode", [False, "onlin"])
def test_a_wrong_mode_of_wandb_is_one_line(ran, mode):
    with pytest.raises(ValueError, match=f"^--wandb={mode} is unknown.*off, offline, online$"):
        ran(wandb=mode)


def test_failed_trials_raise_nothing(ran, monkeypatch):
    ran.code = 3
    with pytest.raises(RuntimeError, match="the study has stopped; resume it"):
        ran(wandb="off")
    failed = TrialRecord("0000", {})
    failed.status, failed.error = "error", "ValueError: no"
    monkeypatch.setattr(Finished, "searched", [failed] * 3)
    assert ran(wandb="off")[0].searched


class Run:
    """A training of a person's own."""


OWN = Space(run=Run, ranges={"lr": tune.uniform(0.0, 1.0)}, fixed={"width": 4}, metric="val_loss", name="own")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "cifar10"}, "^--data is for images, and own trains by itself; leave it out$"),
        ({"weights": "imagenet"}, "^--weights is for images"),
        ({"precision": "auto"}, "^--precision is for images"),
        ({"fix": {"widht": 3}}, "^widht is neither in the ranges nor in fixed of own; did you mean width"),
        ({"range": {"widht": "choice(3, 4)"}}, "^widht is neither in the ranges nor in fixed"),
        ({"fix": {"epochs": 3}}, "^--fix epochs is not possible; give --epochs$"),
        ({"workers_per_trial": 2}, "own trains alone; give 1"),
    ],
)
def test_what_another_training_does_not_have_is_refused(ran, options, message):
    with pytest.raises(ValueError, match=message):
        OWN.search(**options)
    with pytest.raises(ValueError, match=message):  # on the command line
        StudyOptions(OWN, **parsed(options, OWN))


def test_a_folder_is_not_named_after_images_that_a_study_has_not(ran):
    assert re.fullmatch(r"own-\d+-\d+", OWN.search(fix={"width": 5}, wandb="off").folder.name)


@pytest.mark.parametrize(
    "domain",
    [
        *(tune.loguniform(1e-5, 1e-2), tune.uniform(0.0, 0.5), tune.choice([64, 128]), tune.choice([0.1])),
        *(tune.randint(1, 9), tune.qrandint(8, 64, 8), tune.quniform(0.1, 0.5, 0.1), tune.lograndint(1, 99)),
        *(tune.qloguniform(0.1, 0.5, 0.1), tune.qlograndint(8, 64, 8)),
    ],
)
def test_a_range_of_ray_tune_is_the_text_that_gives_it(domain):
    options = StudyOptions(find_space("softmax"), range={"lr": domain})
    again = StudyOptions(find_space("softmax"), range=options.to_dict()["range"])
    space = find_space("softmax").ranging({"lr": domain})
    assert again.searched.described()["lr"] == space.described()["lr"]


def test_what_is_no_range_is_one_line(ran):
    with pytest.raises(ValueError, match=r"^the range of lr cannot be searched \(it is no range"):
        ran(range={"lr": (1e-5, 1e-2)})


def test_the_ray_of_a_person_is_left_and_measured(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", lambda: type("Theirs", (), {"gcs_address": "1.2.3.4:5"}))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.shutdown", lambda: pytest.fail("it was shut down"))
    assert not connection.is_local()
    connection.connect()
    with pytest.raises(ValueError, match="started without the resource trial_slot"):
        connection.connect(1)
