"""What may the commands that write and run studies be given? For tests/fuzz.py.

Of a hundred draws two start Ray, for a study of two trials; the others are refused before, or only forecast.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import ray
import torch
from filelock import FileLock
from PIL import Image

from tests.configs import make_options
from tests.fuzz import ROOT, Command
from tests.fuzz_analysis import NAMES, VALUES
from tests.test_damage import DAMAGES
from tests.test_wandb_sync import STUDY_JSON
from tests.test_wandb_sync import write_study as write_trials
from tunefleet import collect, mirror
from tunefleet.models.space import FIELDS
from tunefleet.models.spaces import SPACES
from tunefleet.search import lr_study, run, wandb_sync
from tunefleet.search.options import HELP, flag
from tunefleet.study import Study, write_result, write_study
from tunefleet.trainables import train
from tunefleet.trainables.preparation import prepare

RAY_EVERY = 50  # draws
WORDS = (
    *(
        "",
        " ",
        "x",
        "-1",
        "0",
        "1",
        "2",
        "3",
        "7",
        "1e3",
        "1.5",
        "-0.0",
        "nan",
        "inf",
        "-inf",
        "1e-400",
        "1e400",
    ),
    *(
        "9" * 30,
        "-" + "9" * 30,
        "9" * 5000,
        "0x10",
        "1_0",
        "١",
        "½",
        "猫",
        "\udcff",
        "1\n",
        "a\nb",
        "[bold]",
        "[/]",
    ),
    *(
        "$(id)",
        "`id`",
        "it's",
        "%s",
        "%",
        "{0}",
        "--",
        "auto",
        "none",
        "None",
        "True",
        "cuda",
        "cpu",
        "tpe",
        "x" * 300,
    ),
)
HELD: list[FileLock] = []  # of this process; the fork that runs a command finds them taken
SMALL = ("softmax", "twolayernn", "convnet")


def _no_ray(address: str, **options: Any) -> NoReturn:
    if address == "local":
        os._exit(97)  # a code that is a defect
    raise ConnectionError("no cluster")


@functools.cache
def cache_dir() -> Path:
    """Return a cache with digits in it, for all draws."""
    folder = Path(tempfile.gettempdir()) / "tunefleet-fuzz"
    prepare("digits", folder)
    torch.set_num_threads(1)
    return folder


def make_path(rng: random.Random, folder: Path) -> str:
    """Return a path, possible or not."""
    (folder / "a file").write_text("mine")
    full = folder / "mine"
    full.mkdir(exist_ok=True)
    (full / "notes.txt").write_text("mine")
    (full / "loop").unlink(missing_ok=True)
    (full / "loop").symlink_to(full / "loop")
    names = [str(folder / "new" / name) for name in NAMES]
    impossible = (
        *(
            "",
            "a file",
            "a file/x",
            "/proc/x",
            "/proc/1/mem",
            "/dev/null",
            "/dev/null/x",
            "/dev/full",
            "x" * 300,
        ),
        *(
            "/".join(["x" * 200] * 30),
            "~nobody-here/x",
            "mine",
            "mine/loop",
            "mine/loop/x",
            ".",
            "..",
            "/",
            "/sys/x",
        ),
        *(
            "s3://",
            "s3:///x",
            "gs://a b/c",
            "nosuch://a/b",
            "file:///proc/x",
            "s3://a\n/b",
            "://",
            "http://[x/",
        ),
    )
    return rng.choice([*names, *impossible, "new", "~/new", "\udcff/new"])


def make_images(rng: random.Random, folder: Path) -> str:
    """Return a source of images, readable or not."""
    kind = rng.choice(
        ["good", "good", "good", "empty", "file", "text", "one", "archive", "path", "device", "fifo"]
    )
    top = folder / f"images {len(list(folder.iterdir()))}" / rng.choice(NAMES)
    top.parent.mkdir()
    if kind == "path":
        return make_path(rng, folder)
    if kind == "device":
        return rng.choice(
            ["/dev/zero", "/dev/null", "/dev/full", "/dev/random", "/proc", "/proc/self/mem", "/"]
        )
    if kind == "fifo":
        os.mkfifo(top)
        return str(top)
    if kind == "file":
        top.write_bytes(rng.randbytes(100))
        return str(top)
    if kind == "archive":
        archive = top.parent / f"images{rng.choice(['.zip', '.tar', '.tar.gz', '.npz', '.tgz'])}"
        archive.write_bytes(rng.choice([b"", b"PK\x05\x06" + bytes(18), rng.randbytes(600), bytes(10240)]))
        return str(archive)
    top.mkdir()
    splits = rng.choice([("",), ("train", "test")])
    for split in splits:
        for name in rng.sample(NAMES, 1 if kind == "one" else 3):
            at = top / split / name
            at.mkdir(parents=True, exist_ok=True)
            for number in range(0 if kind == "empty" else rng.choice([1, 12])):
                file = at / f"{number}{rng.choice(['.png', '.PNG', '', ' [x].png'])}"
                if kind == "text" and rng.random() < 0.7:
                    file.write_bytes(rng.choice([b"", b"text", b"\x89PNG\r\n\x1a\n" + rng.randbytes(50)]))
                else:
                    with file.open("wb") as stream:
                        color = tuple(rng.randbytes(3))
                        Image.new("RGB", rng.choice([(8, 8), (8, 8), (1, 1), (40, 3)]), color).save(
                            stream, "png"
                        )
    return str(top)


def make_study(rng: random.Random, folder: Path) -> tuple[Path, str]:
    """Write a study and damage it; return its folder and what was done."""
    made, study = folder / "made", folder / "studies" / rng.choice(NAMES)
    write_trials(made)
    options = make_options(
        "softmax",
        epochs=9,
        data="digits",
        image_size=32,
        data_dir=str(cache_dir()),
        pruner="promote",
        workers_per_trial=1,
    ).to_dict()
    options["storage"] = rng.choice(
        [None] * 8 + ["nosuch://a/b", "s3://", "s3://no-bucket/x", "file:///proc/x", "\udcff"]
    )
    status = rng.choice(["done", "stopped", "running"])
    facts = STUDY_JSON | {"options": options, "data_sha256": "0" * 64, "split_sha256": "0" * 64}
    if rng.random() < 0.1:
        facts["levers"] = facts["levers"] | {
            rng.choice([*facts["levers"], "of another version"]): rng.choice(VALUES)
        }
    if rng.random() < 0.4:
        points = [{"lr": lr, "seed": 0} for lr in (0.1, 0.2, 0.4)]
        facts["options"]["points"] = rng.choice([points, points, points, None, []])
    if rng.random() < 0.4:
        facts["wandb"] = {"mode": "offline", "project": rng.choice(["tunefleet", "a/b", "\n"]), "tags": []}
    done = status
    if rng.random() < 0.25:  # a whole file with a wrong value in it
        at: Any = rng.choice([facts, facts["options"]])
        key = rng.choice(list(at))
        at[key] = rng.choice(VALUES)
        done += f", {key} = {str(at[key])[:20]!a}"
    if rng.random() < 0.5:  # a folder of the first edition
        facts |= {"status": status, "seconds": 60.0}
        (made / "result.json").unlink()
    elif status == "running":
        (made / "result.json").unlink()
    else:
        write_result(Study(made), status, 60.0)
    with contextlib.suppress(ValueError):
        write_study(made, facts)
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        done += ", " + damage(rng, made)
    study.parent.mkdir(exist_ok=True)
    made.rename(study)
    if rng.random() < 0.1:
        with contextlib.suppress(OSError):
            HELD.append(FileLock(study / ".lock"))
            HELD[-1].acquire(timeout=0)
            done += ", locked"
    return study, done


def damage(rng: random.Random, made: Path) -> str:
    """Damage a file of a study; return what was done."""
    name = rng.choice(
        [
            "study.json",
            "result.json",
            "reports.jsonl",
            "reports.jsonl",
            "trials.csv",
            ".lock",
            ".collect.lock",
        ]
    )
    name = rng.choice([name, name, name, "wandb", "epochs.parquet", "epochs.parquet.tmp", "study.json.tmp"])
    file = made / name
    kind = rng.choice(["missing", "empty", "folder", "loop", "null", *["changed"] * 6])
    if file.is_dir():
        return f"{name} left"
    content = file.read_bytes() if file.is_file() else b""
    file.unlink(missing_ok=True)
    if file.suffix in (".tmp", ".csv", ".parquet") and kind in ("folder", "loop"):
        file.touch()  # files of ours, which are replaced
    elif kind == "folder":
        file.mkdir()
        (file / "x").touch()
    elif kind == "loop":
        file.symlink_to(file)
    elif kind == "empty":
        file.touch()
    elif kind == "null":
        file.write_bytes(
            rng.choice([b"null", b"[]", b"{}", b"\x00" * 50, b"[" * 100_000, b"\xff\xfe{}", b"9" * 5000])
        )
    elif kind == "changed" and content:
        how = rng.choice(DAMAGES)
        kind = how.__name__
        with contextlib.suppress(ValueError, IndexError):  # too little to damage so
            content = how(content, rng)
        file.write_bytes(content)
    return f"{name} {kind}"


def make_flags(rng: random.Random, folder: Path, names: list[str], most: int) -> list[str]:
    """Return random flags of a study."""
    given: list[str] = []
    for name in rng.sample(names, rng.randrange(most + 1)):
        word = rng.choice(WORDS)
        if name in ("data", "weights"):
            word = rng.choice([make_images(rng, folder), "digits", "digit", word])
        elif name == "data_dir":
            word = make_path(rng, folder)
        if name == "fix":
            pairs = [
                f"{rng.choice([*FIELDS, 'hidden', 'x', ''])}={rng.choice(WORDS)}"
                for _ in range(rng.choice([1, 3]))
            ]
            given += ["--fix", *pairs]
        elif name == "storage":
            given.append(f"--storage={make_path(rng, folder)}")
        elif name == "wandb":
            which = rng.choice(["project", "entity", "group", "tags"])
            given.append(f"--wandb-{which}={word}")
        else:
            given.append(f"{flag(name)}={word}")
    if rng.random() < 0.05:
        given.insert(0, rng.choice(["--nosuch", "\udcff", "--lr=0.1", "-", "--nosuch\n", "--s", "--wandb=x"]))
    return given


def make_environment(rng: random.Random, folder: Path) -> dict[str, str | None]:
    """Return variables to change."""
    home, short = folder / "home", folder / "tmp"
    home.mkdir()
    short.mkdir()
    long = folder / ("t" * 96)
    long.mkdir()
    environment: dict[str, str | None] = {
        "HOME": rng.choice([str(home), str(home), None, "/", "/proc/x", ""]),
        "TMPDIR": rng.choice([str(short)] * 4 + [str(long), "/proc/x", ""]),
        "TERM": rng.choice(["dumb", "xterm", None, "x"]),
        "COLUMNS": rng.choice([None, "80", "1", "0", "-3", "x", "99999"]),
        "PYTHONIOENCODING": rng.choice(["ascii", "latin-1", "utf-8", "utf-8"]),
        "WANDB_MODE": rng.choice(["disabled"] * 4 + ["offline", "online", "x", "", "\udcff"]),
        "FORCE_COLOR": rng.choice([None, None, "1"]),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "TORCH_HOME": str(cache_dir()),  # of downloaded weights
    }
    odd = {
        "RAY_ADDRESS": rng.choice(["127.0.0.1:9", "x", "ray://", "auto", "\udcff", "127.0.0.1:99999999"]),
        "CUDA_VISIBLE_DEVICES": rng.choice(["", "-1", "x"]),
        "WANDB_API_KEY": rng.choice(["x", "a\nb", "0" * 40, "\udcff"]),
        "WANDB_TAGS": rng.choice(["", ",", "x" * 300]),
        "OMP_NUM_THREADS": "1",
        "NETRC": "/dev/null/x",
        "WANDB_CONFIG_DIR": rng.choice(["/dev/null/x", "\udcff"]),
    }
    if rng.random() < 0.3:
        name = rng.choice(list(odd))
        environment[name] = odd[name]
    return environment


def make_command(rng: random.Random, folder: Path, number: int) -> Command:
    """Return a command that writes or runs a study, with what it reads."""
    ray.init = _no_ray  # in the forks of this process
    cache = cache_dir()
    environment = make_environment(rng, folder)
    if number % RAY_EVERY == 0:
        return start_study(rng, folder, environment)
    kind = rng.choice(
        [
            *("run", "run", "run", "lr_study", "lr_study", "resume", "resume", "all", "extend", "from"),
            *("collect", "collect", "wandb_sync", "mirror", "training", "help", "all, refused"),
        ]
    )
    options = [*HELP, "storage", "wandb"]
    of_lr = [*lr_study.OPTIONS, "storage", "wandb"]
    small = ["--data=digits", f"--data-dir={cache}", "--epochs=1", "--trials=2"]
    dry, study, state = False, "", ""
    if kind in ("resume", "extend", "from", "collect", "wandb_sync", "mirror"):
        path, state = make_study(rng, folder)
        study = rng.choice([str(path)] * 9 + [make_path(rng, folder)])
    if kind in ("run", "lr_study", "from"):
        dry = True
        space = rng.choice([*SMALL] * 4 + [*SPACES, *WORDS, "all"])
        given = [f"--space={space}", *(small if kind == "run" else small[:-1]), "--dry-run"]
        if rng.random() < 0.4:
            given.append(f"--study-dir={make_path(rng, folder)}")
        given += make_flags(rng, folder, options if kind == "run" else of_lr, 3)
        if kind == "from":
            given = [*given, f"--from={study}"]
        if kind != "run" and rng.random() < 0.5:
            given += rng.choice([["--lrs", *rng.sample(WORDS, 2)], [f"--seeds={rng.choice(WORDS)}"]])
        main = run.main if kind == "run" else lr_study.main
    elif kind == "resume":
        main = rng.choice([run.main, lr_study.main])
        given = [f"--resume={study}", *make_flags(rng, folder, options if main is run.main else of_lr, 1)]
    elif kind == "all":  # a folder of studies: their options are damaged, or refused for each space
        top = folder / rng.choice(NAMES)
        top.mkdir()
        of_all: Any = {"options": {"data": "no/such"}, "storage": None, "wandb": {}}
        if rng.random() < 0.7:
            at = rng.choice([of_all, of_all["options"]])
            at[rng.choice(["options", "storage", "wandb", "data", "epochs", "x"])] = rng.choice(VALUES)
        text = json.dumps(of_all).encode()
        content = rng.choice(
            [text, text, text, b"", b"{}", b"[]", b"null", text[:20], b"\xff", b"[" * 100_000]
        )
        (top / "all.json").write_bytes(content)
        main, given, state = run.main, [f"--resume={top}"], content[:200]
    elif kind == "all, refused":
        wrong = rng.choice(["--trials=0", "--data=no/such", "--eta=1", "--fix=lr=-1", "--storage=nosuch://x"])
        where = [f"--study-dir={make_path(rng, folder)}"] if rng.random() < 0.7 else []
        main, given = run.main, ["--space=all", *small, *where, *make_flags(rng, folder, options, 1), wrong]
    elif kind == "extend":
        main, given = lr_study.main, [f"--extend={study}", *make_flags(rng, folder, of_lr, 1)]
    elif kind == "collect":
        keep = rng.choice([[], [], ["--keep-lines", rng.choice(WORDS)], ["--keep-lines=3"]])
        main, given = collect.main, [*keep, "--", study] if rng.random() < 0.9 else [study, *keep]
    elif kind == "wandb_sync":
        main = wandb_sync.main
        given = ["--offline", study] if rng.random() < 0.5 else [study]
        given += make_flags(rng, folder, ["wandb"], 1)
    elif kind == "mirror":
        main, given = mirror.main, [study]
    elif kind == "training":
        main = train.main
        names = [*FIELDS, "hidden"]
        given = [f"--space={rng.choice([*SMALL, *SMALL, *WORDS])}", *small[:3], "--threads=1"]
        given += [
            f"--{name.replace('_', '-')}={rng.choice(WORDS)}"
            for name in rng.sample(names, rng.choice([1, 2, 4]))
        ]
        if rng.random() < 0.3:
            given.append(f"--data={make_images(rng, folder)}")
        if rng.random() < 0.3:
            name = rng.choice(["data-dir", "device", "precision", "threads"])
            given.append(f"--{name}={rng.choice([*WORDS, make_path(rng, folder)])}")
    else:
        main = rng.choice([run.main, lr_study.main, collect.main, wandb_sync.main, mirror.main, train.main])
        given = [rng.choice(["--help", "--help", "-h", "--nosuch", "--nosuch\n", "--list-spaces", "\udcff"])]
        dry = True
    data_dir = next((g.partition("=")[2] for g in reversed(given) if g.startswith("--data-dir=")), None)
    cached = folder / (data_dir or "data")
    errors = len(SPACES) if kind == "all" or "--space=all" in given else 1
    return Command(kind, main, given, environment, cache=cached, dry=dry, errors=errors, state=state)


def start_study(rng: random.Random, folder: Path, environment: dict[str, str | None]) -> Command:
    """Return a command that runs a study of two trials with names and an environment of all kinds."""
    environment |= {
        "WANDB_MODE": "disabled",
        "RAY_ADDRESS": None,
        "TMPDIR": None,
    }  # Ray leaves its logs there
    data = rng.choice(["digits", make_images(rng, folder)])
    script = rng.choice(["search/run.py", "search/lr_study.py"])
    more = (
        ["--trials=2", "--final-seeds=1"]
        if script.endswith("run.py")
        else ["--lrs", "0.01", "0.1", "--seeds=1"]
    )
    given = [
        "--space=softmax",
        f"--data={data}",
        f"--data-dir={cache_dir()}",
        "--epochs=1",
        "--concurrency=2",
    ]
    study = f"--study-dir={folder}/studies/{rng.choice(NAMES)}"
    return Command(
        "started",
        None,
        [sys.executable, str(ROOT / script), *given, study, *more],
        environment,
        cache=cache_dir(),
    )
