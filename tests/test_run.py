"""The command line: what a wrong argument prints, and that nothing is written then."""

import contextlib
import io
import json
import re
import tarfile
import time

import psutil
import pytest
import torch
from PIL import Image

from tests.configs import make_options
from tests.made_study import spec
from tunefleet import mirror
from tunefleet.models.spaces import SPACES, find_space
from tunefleet.search import run as search
from tunefleet.search import wandb_sync
from tunefleet.search.options import StudyOptions, parsed
from tunefleet.search.run import main
from tunefleet.study import write_study


@pytest.fixture
def run(data_dir, tmp_path, monkeypatch, capsys):
    """Runs search/run.py in an empty folder, up to Ray's start; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))

    def call(*arguments, data="digits"):
        given = [str(argument) for argument in arguments]
        if data and "--data" not in given:
            given += ["--data", data]
        code = main([*given, "--data-dir", str(data_dir)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def assert_one_line_error(result, *needles):
    code, _, err = result
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for needle in needles:
        assert needle in err, err


def write_images(folder, classes=("cat", "dog"), count=6, color=40):
    for split in ("train", "test"):
        for k, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for n in range(count):
                image = Image.new("RGB", (32, 32), (color * (k + 1), 10 * n, 90))
                image.save(folder / split / name / f"{n}.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--space", "resnet_cnv"], ["resnet_cnv is unknown", "did you mean resnet_conv?"]),
        ([], ["give a space"]),
        (["--space", "softmax", "--eta", 1], ["--eta=1", "at least 2"]),
        (["--space", "softmax", "--grace", 20, "--epochs", 9], ["--grace=20", "--epochs=9"]),
        (["--space", "softmax", "--grace", 0], ["--grace=0"]),
        (["--space", "softmax", "--trials", 0], ["--trials=0", "at least 1"]),
        (["--space", "all", "--trials", 0], ["softmax: --trials=0", "at least 1"]),
        (["--space", "all", "--trials", 0, "--study-dir", "new/all"], ["softmax: --trials=0"]),
        (["--space", "softmax", "--epochs", 0], ["--epochs=0"]),
        (["--space", "softmax", "--concurrency", 0], ["--concurrency=0"]),
        (["--space", "softmax", "--time-budget", -1], ["--time-budget=-1"]),
        (["--space", "resnet34"], ["resnet34 is unknown; Choose from: softmax"]),
        (["--space", "softmax", "--seed", 99999999999999], ["--seed=99999999999999", "from 0 to 4294967295"]),
        (
            ["--space", "softmax", "--fix", "lr=high"],
            ["--fix lr=high is not possible; lr is a value of type float"],
        ),
        (["--space", "softmax", "--fix", "learning_rate=0.1"], ["--fix learning_rate is no hyperparameter"]),
        (["--space", "softmax", "--range", "lr=normal(0, 1)"], ["--range lr=normal(0, 1) is not possible"]),
        (["--space", "softmax", "--range", "x=choice(1, 2)"], ["x is neither a hyperparameter"]),
        (
            ["--space", "softmax", "--fix", "lr=0.1", "--range", "lr=choice(1, 2)"],
            ["lr is in --fix and in --r"],
        ),
        (["--space", "softmax", "--metric", "val_accuracy", "--fix", "epochs=3"], ["give --epochs"]),
        (["--space", "mine.py"], ["mine.py: there is no such file"]),
        (["--space", "softmax", "--study-dir", "/proc/x"], ["/proc/x cannot be made", "give another"]),
        (["--space", "softmax", "--study-dir", 300 * "x"], ["cannot be made", "give another"]),
        (["--space", "softmax", "--study-dir", "/etc/passwd/x"], ["--study-dir", "give another"]),
        (["--space", "softmax", "--data", "nothing/here"], ["nothing/here does not exist"]),
        (["--space", "softmax", "--data", "digit"], ["did you mean digits?"]),
        (["--resume", "nothing"], ["nothing holds no study"]),
        (["--resume", "nothing", "--space", "softmax"], ["--resume takes space"]),
    ],
)
def test_bad_argument_is_one_line_and_writes_nothing(run, tmp_path, arguments, needles):
    data = None if "--resume" in arguments else "digits"
    assert_one_line_error(run(*arguments, data=data), *needles)
    assert list(tmp_path.iterdir()) == []


def test_a_hyperparameter_as_a_flag_names_the_one_that_fixes_it(run, capsys):
    with pytest.raises(SystemExit) as end:
        run("--space", "softmax", "--lr", "0.1")
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "--lr is a hyperparameter; to give it to every trial: --fix lr=VALUE" in err
    assert err.count("\n") == 1


def test_what_a_resumed_study_has_for_good_is_no_hyperparameter_to_fix(capsys):
    with pytest.raises(SystemExit) as end:
        search.resume_main(["study", "--epochs", "50"])
    assert end.value.code == 2
    said = "error: --epochs cannot change when a study is resumed: it is its schedule's horizon"
    assert capsys.readouterr().err.startswith(said)


def test_a_repeated_flag_adds_to_the_earlier_one():
    _, options = search.parse(
        ["--fix", "hidden=32", "--fix", "lr=0.1", "momentum=0.9", "--range", "x=1", "--range", "y=2"]
    )
    fix, others = options.pop("fix"), options.popitem()[1]
    assert (fix, others) == ({"hidden": "32", "lr": "0.1", "momentum": "0.9"}, {"x": "1", "y": "2"})


def test_a_range_that_moves_the_first_value_says_so():
    def moved(*pairs):
        space = find_space("convnet")
        return StudyOptions(space, **parsed(search.parse(["--range", *pairs])[1], space)).moved

    first = "the first trial has lr 0.005, since 0.001 is not in its --range"
    assert moved("lr=choice(0.005, 0.02)", "momentum=choice(0.5, 0.9)") == first
    assert moved("lr=choice(0.005, 0.02)", "hidden=choice(30)").startswith(f"{first}; hidden 30, ")
    assert moved("lr=choice(0.001, 0.02)") == ""


def test_more_trials_of_all_spaces_are_refused_with_what_to_do(run, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "all.json").write_text('{"options": {}, "storage": null, "wandb": {}}')
    said = ["all has the studies of all spaces, and --trials extends one", "all/SPACE"]
    assert_one_line_error(run("--resume", "all", "--trials", 64, data=None), *said)


def test_a_tilde_that_the_shell_left_is_the_home_folder(run, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "taken").mkdir(parents=True)
    (home / "taken" / "file").touch()
    monkeypatch.setenv("HOME", str(home))
    assert_one_line_error(
        run("--space", "softmax", "--study-dir=~/taken"), f"--study-dir={home}/taken is no empty"
    )


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"null", b"[]", b"\xff", b"[" * 100_000),
        b'{"options": {"x": 1}, "storage": null, "wandb": {}}',
        b'{"options": {}, "storage": 7, "wandb": {}}',
        b'{"options": {}, "storage": null, "wandb": [1]}',
    ],
)
def test_a_damaged_file_of_all_spaces_is_one_line(run, tmp_path, content):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "all.json").write_bytes(content)
    assert_one_line_error(run("--resume", "all", data=None), "all.json is damaged")


@pytest.mark.parametrize("flag", ["project", "entity", "group", "tags"])
def test_a_name_that_wandb_cannot_take_is_one_line(run, flag):
    result = run("--space", "softmax", "--dry-run", f"--wandb-{flag}=a\udcff")
    assert_one_line_error(result, f"--wandb-{flag}=a\\xff is not possible; give printable characters")


@pytest.mark.parametrize("command", [main, mirror.main, wandb_sync.main])
def test_a_link_to_itself_is_one_line(command, tmp_path, capsys):
    (loop := tmp_path / "loop").symlink_to(loop)
    given = [f"--resume={loop}/x"] if command is main else [f"{loop}/x"]
    assert_one_line_error((command(given), *capsys.readouterr()), "loop/x")


@pytest.mark.parametrize(
    ("name", "value"), [("data", 5), ("trials", "x"), ("weights", None), ("fix", []), ("points", {})]
)
def test_an_option_of_another_type_is_one_line(name, value):
    with pytest.raises(ValueError, match=f"^--{name}=.* give a value of type"):
        make_options("softmax", **{name: value})


@pytest.fixture
def studies(monkeypatch):
    """Replaces studies: records which are started and resumed; those of `codes` end with that code."""
    done, codes = [], {}

    def start(options, folder, script, **others):
        name = options.space.name
        done.append(("start", name, str(script.location)))
        folder.mkdir(parents=True, exist_ok=True)
        status = "stopped" if codes.get(name) == 3 else "done"
        write_study(folder, spec(space=name, status=status))
        return codes.get(name, 0)

    def resume(folder, changes, script, **others):
        done.append(("resume", folder.name, str(script.location)))
        write_study(folder, spec(space=folder.name, status="done"))
        return 0

    monkeypatch.setattr("tunefleet.search.run.start", start)
    monkeypatch.setattr("tunefleet.search.run.resume", resume)
    return done, codes


def test_studies_of_all_spaces_are_resumed_as_one(run, tmp_path, studies):
    done, codes = studies
    codes["twolayernn"] = 3
    assert run("--space", "all", "--trials", 2, "--study-dir", "everything")[0] == 3
    assert done == [("start", name, "everything") for name in ("softmax", "twolayernn")]
    del done[:]
    codes.clear()
    assert run("--resume", "everything", data=None)[0] == 0
    rest = [("start", name, "everything") for name in list(SPACES)[2:]]
    assert done == [("resume", "twolayernn", "everything"), *rest]
    del done[:]
    assert run("--resume", "everything", data=None)[0] == 0
    assert done == []


@pytest.fixture
def ray_beside(monkeypatch):
    """Leaves out Ray, which starts before the inputs are prepared."""
    monkeypatch.setattr("tunefleet.search.running._start_ray", lambda *arguments: None)


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--space", "softmax", "--concurrency", 10_000], ["10000 × 1 CPU", "--concurrency of at most"]),
        (["--space", "softmax", "--cpus-per-trial", 10_000], ["10000 CPUs", "give --cpus-per-trial"]),
        (["--space", "softmax", "--gpus-per-trial", 64], ["--gpus-per-trial=64", "GPUs"]),
        (["--space", "twolayernn", "--fix", f"hidden={10**12}"], ["does not fit into memory", "--fix"]),
        (["--space", "resnet_softmax", "--weights", "nothing.pth"], ["nothing.pth"]),
        (
            ["--space", "resnet_finetune", "--weights", "none", "--fix", "batch_size=1"],
            ["batch_size=1 is not possible with the network's BatchNorm; give 2 or more"],
        ),
        (
            ["--space", "resnet_mymodel", "--weights", "none", "--image-size", 8],
            ["kernel_size=3", "larger images"],
        ),
    ],
)
def test_what_torch_has_to_judge_is_one_line_and_writes_nothing(
    run, ray_beside, tmp_path, arguments, needles
):
    assert_one_line_error(run(*arguments), *needles)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_error_beside_ray_leaves_nothing_of_it(cli, tmp_path):
    command = cli(
        *("--space", "resnet_finetune", "--data", "digits", "--image-size", 32),
        *("--weights", "none", "--fix", "batch_size=1", "--study-dir", tmp_path / "s"),
    )
    known: dict[psutil.Process, str] = {}
    while command.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            known |= {p: p.name() for p in psutil.Process(command.pid).children(recursive=True)}
        time.sleep(0.1)
    assert (command.returncode, command.stderr.read().count("\n")) == (2, 1)
    assert "raylet" in known.values()
    assert psutil.wait_procs(known, timeout=10)[1] == []
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trials", "many"],
        ["--pruner", "median"],
        ["--no-such-flag"],
        ["--fix", "lr"],
    ],
)
def test_argument_of_the_wrong_kind_is_one_line(run, capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        run("--space", "softmax", *arguments)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_folder_of_another_study_is_left_alone(run, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "study.json").write_text("{}")
    assert_one_line_error(
        run("--space", "softmax", "--study-dir", folder), "another study", "tunefleet resume"
    )
    assert (folder / "study.json").read_text() == "{}"


def test_folder_with_files_is_left_alone(run, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    assert_one_line_error(run("--space", "softmax", "--study-dir", tmp_path / "notes"), "no empty folder")
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_finished_study_is_not_resumed(run, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(spec(space="softmax", status="done")))
    assert_one_line_error(run("--resume", tmp_path, data=None), "is done")


def test_resume_refuses_what_would_change_results(run, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(spec(space="softmax", status="stopped")))
    assert_one_line_error(run("--resume", tmp_path, "--eta", 4, data=None), "--eta cannot change")


@pytest.mark.parametrize("part", ["options", "levers"])
def test_a_study_of_another_version_is_one_line(run, tmp_path, part):
    study = spec(space="softmax", status="stopped")
    study["options"] = {"space": "softmax", "epochs": 1, "pruner": "none", "workers_per_trial": 1}
    study[part] = study[part] | {"of_tomorrow": 1}
    (tmp_path / "study.json").write_text(json.dumps(study))
    error = run("--resume", tmp_path, data=None)
    assert_one_line_error(error, "study.json is of another version", "of_tomorrow")


@pytest.mark.parametrize("damage", ["empty", "one class", "corrupt image", "no train"])
def test_unusable_folder_of_images_is_one_line(run, tmp_path, damage):
    folder = tmp_path / "images"
    folder.mkdir()
    if damage != "empty":
        write_images(folder, ("cat",) if damage == "one class" else ("cat", "dog"))
    if damage == "corrupt image":
        (folder / "train" / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    if damage == "no train":
        (folder / "train").rename(tmp_path / "elsewhere")
    before = sorted(tmp_path.iterdir())
    assert_one_line_error(run("--space", "softmax", "--data", folder), "images")
    assert sorted(tmp_path.iterdir()) == before


def test_archive_that_climbs_out_is_refused(run, tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (32, 32)).save(content, "PNG")
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        member = tarfile.TarInfo("../outside/train/cat/0.png")
        member.size = len(content.getvalue())
        archive.addfile(member, io.BytesIO(content.getvalue()))
    assert_one_line_error(run("--space", "softmax", "--data", tmp_path / "bad.tar"), "..")
    assert not (tmp_path.parent / "outside").exists()


def test_truncated_archive_is_one_line(run, tmp_path):
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as archive:
        archive.add(write_images(tmp_path / "images"), "images")
    whole = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    assert_one_line_error(run("--space", "softmax", "--data", tmp_path / "cut.tar.gz"), "cut.tar.gz")


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--weights", "other.pth"], ["other.pth", "resnet18"]),
        (["--weights", "other.pth", "--fix", "backbone=resnet34"], ["other.pth", "resnet34"]),
        (["--weights", "none", "--fix", "backbone=resnt34"], ["did you mean resnet34"]),
        (["--weights", "none", "--fix", "backbone=timm:x"], ["backbone=timm:x"]),
        (["--weights", "none", "--fix", "backbone=vit_b_16"], ["32×32", "give --image-size 224"]),
    ],
)
def test_a_backbone_that_does_not_fit_is_one_line_before_ray_starts(
    run, monkeypatch, tmp_path, arguments, needles
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunefleet.search.running._start_ray", lambda *_: pytest.fail("Ray starts"))
    torch.save({"fc.weight": torch.zeros(10, 5)}, tmp_path / "other.pth")
    assert_one_line_error(run("--space", "resnet_softmax", "--image-size", 32, *arguments), *needles)


def test_no_network_names_the_offline_ways(run, ray_beside, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR10.download", refuse)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert_one_line_error(run("--space", "softmax", "--data", "cifar10"), "--data PATH")
    assert_one_line_error(run("--space", "resnet_softmax", "--weights", "imagenet"), "--weights PATH")


@pytest.mark.parametrize(
    ("address", "needles"),
    [
        (None, ["Ray did not start on this host", "free CPUs"]),
        ("10.0.0.1:6379", ["RAY_ADDRESS=10.0.0.1", "unset"]),
    ],
)
def test_ray_that_does_not_come_up_is_one_line_and_leaves_no_study(
    run, tmp_path, monkeypatch, address, needles
):
    def refuse(**options):
        raise Exception("the node timed out during startup.\nThis could happen because")  # as Ray 2.60 does

    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.init", refuse)
    assert_one_line_error(run("--space", "softmax"), *needles, "timed out")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_forecasts_and_writes_no_study(run, tmp_path):
    code, out, err = run("--space", "softmax", "--dry-run", "--trials", 9, "--epochs", 9, "--concurrency", 1)
    assert (code, err) == (0, "")
    # at least 9 trials to epoch 1, 3 of them to 3, 1 to 9: 9 + 3·2 + 1·6 = 21
    assert "22 expected (81 unpruned), rungs [1, 3]" in out
    assert re.search(r"time +about \d", out)
    assert "1004 train, 434 validation, 359 test" in out
    assert "6 MB of decoded images under --data-dir" in out  # 1,797 of 3·32·32 bytes
    assert list(tmp_path.iterdir()) == []


def test_list_spaces_names_all_thirteen(run):
    code, out, _ = run("--list-spaces")
    assert code == 0
    assert sum("published" in line for line in out.splitlines()) == 13


@pytest.mark.parametrize("name", SPACES)
def test_a_space_is_listed_with_its_ranges_first_values_and_why(run, name):
    code, out, _ = run("--list-spaces", name)
    assert code == 0
    head, *lines = out.splitlines()
    space = SPACES[name]
    assert head == f"{name}: {space.summary}"
    for key in space.ranges:
        assert any(re.fullmatch(rf"  {key}: .+; first {space.start[key]}", line) for line in lines), key
    assert {f"  {key}: always {value}" for key, value in space.fixed.items()} <= set(lines)
    assert lines[-1] == f"  {space.why}" != "  "


def test_all_spaces_go_on_after_one_that_cannot_run(run):
    code, out, err = run("--space", "all", "--dry-run", "--weights", "none", "--image-size", 8, "--trials", 2)
    assert code == 2
    assert "error: resnet_mymodel: kernel_size=3" in err
    assert "resnet_finetune" in out
