"""A report in a real browser: it sorts, filters, prints, fits, fetches nothing, runs no name as a script."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.made_study import EVIL, change, edit_events, write_study
from tests.screenshots import chromium
from tunefleet.analysis.load import load
from tunefleet.analysis.report import write

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium; as root: apt-get install chromium"
)
TRIALS = 300  # more than the page shows at once
IMAGE = '"><img src=x onerror=alert(1)>'


@dataclass
class Heard:
    """What a page did that it must not do."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """300 trials; its path, classes, commands, nodes and one trial's name are hostile."""
    folder = write_study(
        tmp_path_factory.mktemp("pages") / "<b>ünï $x$ 'it' \"is\" &amp;",
        trials=TRIALS,
        epochs=27,
        rungs=(1, 3, 9),
        eta=3,
    )
    odd = {"0001": {"node": "</script><script>alert(2)</script>"}, "0002": {"weights": IMAGE}}

    def edit(event):
        if event["trial_id"] == "0002" and event["epoch"] == 0:
            event["config"] |= odd["0002"]
        return event | (odd["0001"] if event["trial_id"] == "0001" and event["epoch"] else {})

    edit_events(folder, edit)
    change(folder, command=f"search/run.py --data {IMAGE}", machine=EVIL, space=f"convnet{IMAGE}")
    return folder


@pytest.fixture(scope="module")
def report(study):
    return write([load(study)], study)


@pytest.fixture
def opened(browser, report):
    """Opens a page from disk; fails the test if that page complained, fetched, or showed a dialog."""
    heard, contexts = Heard(), []

    def open_page(file: Path = report, width: int = 1280, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda said: heard.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: heard.errors.append(str(error)))
        page.on("request", lambda request: heard.requests.append(request.url))
        page.on("dialog", lambda dialog: (heard.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert heard.errors == []
    assert heard.dialogs == []
    assert heard.requests, "a page that was opened is a request"
    assert [url for url in heard.requests if not url.startswith(("file://", "data:"))] == []


def column(page, name: str) -> list[str]:
    """Returns a column of the trials' table as it is shown."""
    heads = page.locator("#trials th").all_inner_texts()
    at = [head.rstrip(" ↑↓") for head in heads].index(name) + 1
    return page.locator(f"#trials tbody td:nth-child({at})").all_inner_texts()


def sort_by(page, name: str) -> None:
    page.locator("#trials th button", has_text=name).first.click()


def test_headings_sort_by_number_and_missing_values_stay_last(opened):
    page = opened()
    page.click("#all")
    for heading in ("best_val_accuracy", "epochs"):
        before = column(page, heading)
        present, missing = [v for v in before if v], [v for v in before if not v]
        assert len(missing) == (heading == "best_val_accuracy")  # trial 5 diverged
        sort_by(page, heading)
        assert column(page, heading) == sorted(present, key=float) + missing
        sort_by(page, heading)
        assert column(page, heading) == sorted(present, key=float, reverse=True) + missing
    assert set(present) == {"1", "3", "9", "27"}  # of which text would sort 27 before 3
    sort_by(page, "schedule")
    assert column(page, "schedule") == sorted(column(page, "schedule"))


def test_table_shows_the_first_rows_until_all_are_asked_for(opened):
    page = opened()
    assert page.inner_text("#count") == "300 of 300 trials, the first 200 shown"
    assert len(column(page, "trial_id")) == 200
    page.click("#all")
    assert column(page, "trial_id") == [f"{k:04d}" for k in range(TRIALS)]
    assert page.inner_text("#count") == "300 of 300 trials"
    assert page.locator("#all").is_hidden()


def test_filter_wants_every_word(opened):
    page = opened()
    page.fill("#filter", "Diverged")
    assert column(page, "trial_id") == ["0005"]
    assert page.inner_text("#count") == "1 of 300 trials"
    page.fill("#filter", "done COSINE")
    assert 0 < len(column(page, "status")) < 12
    assert set(column(page, "status")) == {"done"}
    assert set(column(page, "schedule")) == {"cosine"}
    page.fill("#filter", "no such trial")
    assert column(page, "trial_id") == []
    page.fill("#filter", "")
    assert len(column(page, "trial_id")) == 200


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_its_width_and_takes_its_colours(opened, width, scheme):
    page = opened(width=width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper, ink = page.evaluate("[getComputedStyle(document.body).backgroundColor,"
                               " getComputedStyle(document.querySelector('figure svg')).color]")  # fmt: skip
    assert (paper, ink) == {
        "light": ("rgb(255, 255, 255)", "rgb(28, 30, 33)"),
        "dark": ("rgb(22, 24, 27)", "rgb(232, 234, 237)"),
    }[scheme]


def test_paper_gets_no_controls(opened):
    page = opened()
    assert page.locator("#filter").is_visible()
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("#filter").is_hidden()
    assert page.locator("#all").is_hidden()
    assert page.locator("#trials").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf().startswith(b"%PDF")


def test_page_without_javascript_shows_the_first_rows_and_says_so(opened):
    page = opened(java_script_enabled=False)
    assert page.get_by_text("The first 200 of 300 trials; trials.csv holds all.").is_visible()
    assert page.locator("#trials tbody tr").count() == 200
    assert page.locator("#filter").is_hidden()


def test_hostile_names_are_shown_and_not_run(opened, study, tmp_path):
    page = opened()
    assert page.locator("script").count() == 2  # the rows, and what sorts them
    assert EVIL in page.inner_text("h1")
    page.fill("#filter", "alert(2)")
    assert column(page, "node") == ["</script><script>alert(2)</script>"]
    assert column(page, "weights") == ["none"]
    assert page.locator("img[src=x]").count() == 0
    both = opened(write([load(study), load(study)], tmp_path / "a <i>b</i> $c$"))
    assert both.locator("script").count() == 0
    assert IMAGE in both.inner_text("body")


def test_the_listening_itself_hears(browser, tmp_path):
    """The page of this test does all that a report must not do."""
    file = tmp_path / "bad.html"
    file.write_text("<script>alert(1); console.error('e')</script><img src='http://127.0.0.1:9/x.png'>")
    dialogs, requests, page = [], [], browser.new_page()
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    page.close()
    assert dialogs == ["1"]
    assert requests[1:] == ["http://127.0.0.1:9/x.png"]
