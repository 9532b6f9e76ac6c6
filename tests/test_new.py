"""The example that ``tunefleet new`` writes."""

from tunefleet.models.spaces import find_space
from tunefleet.new import main


def test_the_example_is_a_space(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["mine.py"]) == 0
    assert capsys.readouterr().out == "mine.py written; try: tunefleet search mine.py --data digits\n"
    space = find_space("mine.py")
    assert (space.name, list(space.ranges)) == ("mine", ["lr", "width", "dropout"])
    assert space.build(10, (3, 8, 8), 4, 0.5)[1].in_features == 192


def test_a_file_that_is_there_is_never_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("mine")
    assert main(["mine.py"]) == 2
    assert capsys.readouterr().err == "error: mine.py is there already; give another name\n"
    assert (tmp_path / "mine.py").read_text() == "mine"
    assert main(["mine.txt"]) == 2
    assert main(["nowhere/mine.py"]) == 2
