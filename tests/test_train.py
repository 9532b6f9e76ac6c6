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
