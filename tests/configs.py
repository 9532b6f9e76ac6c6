"""Short ways to the built-in spaces' configs and networks."""

from tunefleet.models.spaces import SPACES
from tunefleet.search.options import StudyOptions

NETWORKS = {name: space.build for name, space in SPACES.items()}


def make_config(architecture, **values):
    """Returns a config of a built-in space."""
    return SPACES[architecture].config(values)


def make_options(name, **values):
    """Returns the options of a study of a built-in space."""
    return StudyOptions(SPACES[name], **values)


def make_model(name, *arguments, **own):
    """Builds a built-in network."""
    return NETWORKS[name](*arguments, **own)


def own_arguments(name):
    """Returns the arguments of its own that a built-in network's head takes."""
    return tuple(name for name in SPACES[name].arguments if name != "backbone")


def least_epochs(trials, rungs, eta, epochs):
    """Returns the fewest epochs that `promote` can spend on n trials, none of which fails.

    One trial in eta of each rung continues, at least one: trials·r₀ + (trials // eta)·(r₁ - r₀) + …
    """
    spent, reached, alive = 0, 0, trials
    for rung in (*rungs, epochs):
        spent += alive * (rung - reached)
        reached, alive = rung, max(1, alive // eta)
    return spent
