"""Every way in which a write fails on a full disk is recognised, on a full disk of 256 KiB."""

import errno
import gzip
import os
import pickle
import resource
import shutil
import sqlite3
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pyarrow import fs

from tunefleet.files import is_full, says_full, write_whole
from tunefleet.journal import Journal
from tunefleet.search.failures import cause_of

NOISE = np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A disk of 256 KiB."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs root, and mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def torch_stream(file):
    with file.open("wb") as stream:
        torch.save(torch.from_numpy(NOISE), stream)


def zipped(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", NOISE.tobytes())


def gzipped(file):
    with gzip.open(file, "wb") as stream:
        stream.write(NOISE.tobytes())


def database(file):
    connection = sqlite3.connect(file)
    connection.execute("create table t (a blob)")
    connection.execute("insert into t values (?)", [NOISE.tobytes()])
    connection.commit()


def arrow(file):
    with fs.LocalFileSystem().open_output_stream(str(file)) as stream:
        stream.write(NOISE.tobytes())


def copied(file):
    (source := file.parent.parent / "source").write_bytes(NOISE.tobytes())
    shutil.copy(source, file)


def journal(file):
    Journal(file).append({"trial_id": "0000", "status": "error", "error": "x" * 10**6})


WRITES = {
    "torch.save to a path": lambda file: torch.save(torch.from_numpy(NOISE), file),
    "torch.save to a stream": torch_stream,
    "np.save": lambda file: np.save(file, NOISE),
    "np.savez": lambda file: np.savez(file, a=NOISE),
    "parquet": lambda file: pd.DataFrame({"a": NOISE}).to_parquet(file),
    "csv": lambda file: pd.DataFrame({"a": NOISE}).to_csv(file),
    "bytes": lambda file: write_whole(file, NOISE.tobytes()),
    "zip": zipped,
    "gzip": gzipped,
    "sqlite": database,
    "image": lambda file: Image.fromarray(NOISE[:1_000_000].reshape(1000, 1000)).save(file, "png"),
    "pyarrow's file system": arrow,
    "copy": copied,
    "journal": journal,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_write_to_a_full_disk_is_recognised_here_and_behind_ray(small_disk, write):
    for file in small_disk.iterdir():
        file.unlink()
    with pytest.raises((OSError, RuntimeError, sqlite3.Error)) as caught:
        write(small_disk / "file")
    assert is_full(caught.value), repr(caught.value)
    assert cause_of(pickle.loads(pickle.dumps(caught.value))) == "disk"


def test_limit_of_a_files_size_counts_as_no_room(tmp_path):
    code = f"open({str(tmp_path / 'a')!r}, 'wb').write(bytes(100_000))"
    limited = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert says_full(limited.stderr), limited.stderr
    assert is_full(OSError(errno.EFBIG, "File too large"))


def test_error_that_follows_from_a_full_disk_counts():
    error = ValueError("Can't close the ZIP file while there is an open writing handle on it")
    error.__context__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert is_full(error)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EACCES, "Permission denied"), ValueError("a bug"), MemoryError(), KeyError("disk"), None],
)
def test_other_errors_are_not_a_full_disk(error):
    assert not is_full(error)
