"""One configuration by hand: ``tunefleet train``."""

import pytest

from tunefleet.trainables.train import main
from tunefleet.trainables.training import TrainingRun

OWN = """
from ray import tune
from tunefleet import Space

class Run:
    def __init__(self, config):
        self.rate, self.loss = config["rate"], 5.0
    def epoch(self):
        self.loss *= 1 - self.rate
        return {"val_loss": self.loss}
    def state_dict(self):
        return {"loss": self.loss}
    def load_state_dict(self, state):
        self.loss = state["loss"]

space = Space(run=Run, ranges={"rate": tune.uniform(0.1, 0.5)}, metric="val_loss")
"""


def test_a_persons_own_training_is_tried_without_ray(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)
    assert main(["mine.py", "--rate", "0.5", "--epochs", "2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1/2  val_loss 2.5000  ")
    assert second.startswith("epoch 2/2  val_loss 1.2500  ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits"], "--data is for images, and mine trains by itself; leave it out"),
        (["--precision", "auto"], "--precision is for images"),
        (["--batch-size", "64"], "batch_size is neither in the ranges nor in fixed of mine"),
        (["--rat", "0.3"], "rat is neither in the ranges nor in fixed of mine; did you mean rate?"),
        (["--epoch", "3"], "epoch is neither in the ranges nor in fixed"),  # no abbreviation
    ],
)
def test_what_a_persons_training_does_not_read_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)
    assert main(["mine.py", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_errors_of_a_persons_code_have_their_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN.replace("self.loss *=", "open('no such file'); self.loss *="))
    assert main(["mine.py"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert f'{tmp_path / "mine.py"}", line 9, in epoch' in err


def test_a_space_is_trained_at_its_own_size_and_length(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom tunefleet import Space\n"
        "def build(num_classes, image_shape):\n"
        "    print(image_shape)\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n"
        "space = Space(build, image_size=16, epochs=1)\n"
    )
    assert main(["mine.py", "--data", "digits", "--data-dir", str(data_dir)]) == 0
    shape, epoch = capsys.readouterr().out.splitlines()
    assert shape == "(3, 16, 16)"
    assert epoch.startswith("epoch 1/1 ")


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--space", "twolayernn", "--hidden", str(10**12)], "does not fit into memory"),
        (["--space", "softmax", "--optimizer", "a\nb"], r"optimizer=a\nb is unknown"),
        (["--space", "softmax", "--data", "no\nwhere"], r"no\nwhere"),
        (["softmax", "--threads", "0"], "--threads=0"),
        (["--space", "softmax", "--hidden", "64"], "hidden is no hyperparameter"),
        (["twolayernn", "--hidden", "many"], "hidden=many is not possible; hidden is a value of type int"),
        (["twolayernn", "--hidden"], "--hidden is no flag with a value"),
    ],
)
def test_a_mistake_by_hand_is_one_line(arguments, needle, tmp_path, capsys):
    data = [] if "--data" in arguments else ["--data", "digits"]
    assert main([*arguments, *data, "--data-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert needle in err
    assert err.count("\n") == 1


def test_a_ctrl_c_by_hand_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "epoch", interrupt)
    assert main(["--space", "softmax", "--data", "digits", "--data-dir", str(tmp_path)]) == 3
    assert capsys.readouterr().err == "stopped\n"
