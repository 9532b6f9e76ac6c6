"""Do two commits give the same studies? Runs four small ones with each, in turn, and compares them.

    python -m tests.net OLD NEW

OLD and NEW are commits of this repository; NEW may be ``.``, the working tree as it is. Each is run from a
checkout of its own by the Python of this environment. Every trial's configuration and accuracy, every epoch's
numbers and the test accuracies must be equal; times, places and paths may differ. Numbers hold on one machine
only, so none are recorded. Takes about 4 minutes on two cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPACES = ("softmax", "twolayernn", "convnet", "resnet_softmax")
COMMAND = (
    *("--data", "digits", "--trials", "8", "--epochs", "9", "--seed", "0", "--concurrency", "1"),
    *("--device", "cpu", "--precision", "fp32", "--wandb", "off", "--weights", "none"),
)
MAY_DIFFER = ("seconds", "node")  # columns of trials.csv
MEASURED = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_accuracy", "lr", "status")
SECONDS = 600  # the longest that a study may take


def check_out(commit: str, folder: Path) -> Path:
    """Return a folder with a commit's files; of ``.`` those of the working tree."""
    if commit == ".":
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        for name in filter(None, names.decode().split("\0")):
            if os.path.lexists(ROOT / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
        return folder
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def run(checkout: Path, space: str, folder: Path, data_dir: Path) -> None:
    """Run a study with a checkout's code."""
    environment = os.environ | {"PYTHONPATH": f"{checkout / 'src'}:{checkout}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, checkout / "search/run.py", "--space", space, *COMMAND]
    subprocess.run(
        [*command, "--study-dir", folder, "--data-dir", data_dir],
        env=environment,
        cwd=folder.parent,
        timeout=SECONDS,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def outcome(study: Path) -> dict[str, object]:
    """Return what a study has found, by name: each row of trials.csv, each epoch, each final number."""
    header, *rows = (line.split(",") for line in (study / "trials.csv").read_text().splitlines())
    found: dict[str, object] = {}
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        found |= {f"{row[0]} {name}": cells[name] for name in header if name not in MAY_DIFFER}
    for line in (study / "reports.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event.get("epoch"):
            found[f"{event['trial_id']} epoch {event['epoch']}"] = [event.get(name) for name in MEASURED]
    file = study / "result.json"
    content = json.loads((file if file.exists() else study / "study.json").read_text())
    for name in ("status", "final", "epochs_spent"):
        found[name] = content[name]
    return found


def main() -> int:
    """Run the command line; return the exit code: 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.net", description=__doc__.split("\n")[0])
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", help="a commit, or . for the working tree")
    parser.add_argument("--spaces", nargs="+", default=SPACES, metavar="NAME")
    given = parser.parse_args()
    code = 0
    with tempfile.TemporaryDirectory() as temporary:
        location = Path(temporary)
        checkouts = {name: check_out(getattr(given, name), location / name) for name in ("old", "new")}
        for space in given.spaces:
            found = {}
            for name, checkout in checkouts.items():
                study = location / f"{space}-{name}"
                run(checkout, space, study, location / f"data-{name}")
                found[name] = outcome(study)
            old, new = found["old"], found["new"]
            columns = {name.partition(" ")[2] for name in old.keys() ^ new.keys() if " epoch " not in name}
            other = [
                name
                for name in old | new
                if name.partition(" ")[2] not in columns and old.get(name) != new.get(name)
            ]
            print(f"{space}: {len(old)} values, {len(other)} differ", flush=True)
            if columns:
                print(f"    columns of one of them: {', '.join(sorted(columns))}")
            for name in other[:10]:
                print(f"    {name}: {old.get(name)} -> {new.get(name)}")
            code |= bool(other)
    return code


if __name__ == "__main__":
    sys.exit(main())
