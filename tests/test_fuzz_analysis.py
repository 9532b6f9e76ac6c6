"""Random studies, damage, flags and terminals: one line, a code of 0 to 3, nothing left behind."""

from tests.fuzz_analysis import draw

DRAWS, SEED = 50, 22


def test_fifty_random_commands_have_no_defect():
    defects = [defect for number in range(DRAWS) if (defect := draw(number, SEED)[2])]
    assert defects == []
