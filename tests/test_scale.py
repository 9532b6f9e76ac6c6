"""A study of 10,000 trials becomes a page that is not slow, not big, and does not eat the machine."""

import subprocess
import sys
from pathlib import Path

from tests.made_study import write_study

ROOT = Path(__file__).parents[1]
CPU_SECONDS = 60  # of the process, which a busy machine leaves as they are; it needs about 20
MEMORY = 1024  # MiB at most at once
PAGE = 15  # MiB
# VmHWM and not ru_maxrss, which keeps through exec how large the process was that started this one
MEASURE = """
import pathlib, re, sys, time
from tunefleet.analysis.report import main
code = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
print(time.process_time(), int(peak[1]) / 1024)
sys.exit(code)
"""


def test_ten_thousand_trials_make_a_page(tmp_path):
    folder = write_study(tmp_path / "big", trials=10_000, epochs=27, rungs=(1, 3, 9), eta=3)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seconds, memory = map(float, done.stdout.splitlines()[-1].split())
    page = folder / "report.html"
    assert seconds < CPU_SECONDS
    assert memory < MEMORY
    assert page.stat().st_size < PAGE * 2**20
    assert page.read_text().count('["9999", ') == 1  # the last trial is there
