"""Which class does each image belong to, and which images are test images?"""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from tunefleet.trainables.decoding import Entry, SourceError
from tunefleet.trainables.image_files import Listing, printable

SPLITS = frozenset(("train", "test"))
LAYOUT = (
    "give train/CLASS/FILE and test/CLASS/FILE, or CLASS/FILE alone, of which a part becomes the test images"
)


@dataclass(frozen=True)
class Tree:
    """The images of a folder or archive and their classes, sorted by name."""

    entries: list[Entry]
    places: list[str]  # per image: train/CLASS/FILE or CLASS/FILE, without a folder around all
    classes: tuple[str, ...]  # sorted
    labels: np.ndarray  # int64 (N,), indices into classes
    is_test: np.ndarray | None  # bool (N,); None where the tree has no test/
    notes: tuple[str, ...]  # for the user


def read_tree(listing: Listing) -> Tree:
    """Find the images' classes.

    Raises:
        SourceError: The layout is not `train/CLASS/FILE` and `test/CLASS/FILE`, `train/CLASS/FILE` alone or
            `CLASS/FILE`, perhaps inside a single top folder; or there are too few classes, or a class has
            too few images.
    """
    entries = listing.entries
    skipped = _skipped(listing.skipped)
    if not entries:
        raise SourceError(f"holds no images{f' ({skipped})' if skipped else ''}; {LAYOUT}")
    for before, after in itertools.pairwise(entries):
        if before.name == after.name:
            raise SourceError(f"holds {after.name!r} more than once; pack it again")

    top = _top(entries)
    places = [entry.name.removeprefix(top) for entry in entries]
    is_split = any(place.count("/") > 1 and place.partition("/")[0] in SPLITS for place in places)
    depth = 2 if is_split else 1
    tops = {place.partition("/")[0] for place in places}
    if is_split and not tops <= SPLITS:
        raise SourceError(f"holds {_listed(tops)}, not train/ and test/ alone; {LAYOUT}")
    for entry, place in zip(entries, places, strict=True):
        if place.count("/") != depth:
            raise SourceError(f"holds {entry.name!r}, which lies in no class's folder; {LAYOUT}")
    if is_split and tops == {"test"}:
        raise SourceError(f"holds test/ but no train/; {LAYOUT}")

    folders = [place.split("/")[depth - 1] for place in places]
    _check_folders(listing, top, {place.rpartition("/")[0] for place in places})
    names = sorted(set(folders))
    index = {name: label for label, name in enumerate(names)}
    notes = [f"skipped in {printable(listing.path)}: {skipped}"] if skipped else []
    has_test = is_split and "test" in tops
    if not has_test:
        notes.append("no test/ folder: 20 % of each class's images are used as test images")
    tree = Tree(
        entries=entries,
        places=places,
        classes=tuple(printable(name) for name in names),
        labels=np.array([index[name] for name in folders], dtype=np.int64),
        is_test=np.array([place.startswith("test/") for place in places]) if has_test else None,
        notes=tuple(notes),
    )
    _check_classes(tree)
    return tree


def _top(entries: list[Entry]) -> str:
    """Return the folder around all images that is neither a class nor a split, with its slash, or ""."""
    tops = {entry.name.partition("/")[0] for entry in entries}
    top = tops.pop()
    parts_min = 1 + min(entry.name.count("/") for entry in entries)
    return f"{top}/" if not tops and parts_min > (3 if top in SPLITS else 2) else ""


def _check_folders(listing: Listing, top: str, filled: set[str]) -> None:
    """Raise SourceError if a folder beside the class folders has no image: it is meant as a class."""
    beside = {folder.rpartition("/")[0] for folder in filled}
    for folder in sorted(listing.folders):
        place = folder.removeprefix(top)
        if folder.startswith(top) and place.rpartition("/")[0] in beside and place not in filled:
            within = Counter(
                {key: n for key, n in listing.skipped.items() if f"{key[0]}/".startswith(f"{folder}/")}
            )
            reason = f" ({_skipped(within)})" if within else ""
            raise SourceError(
                f"holds the folder {folder!r}, which has no readable image{reason}; "
                "add images or remove the folder"
            )


def _check_classes(tree: Tree) -> None:
    """Raise SourceError unless each class has a test image and, for validation, two training images."""
    if len(tree.classes) < 2:
        raise SourceError(f"holds one class only, {tree.classes[0]!r}; give two or more")
    counts = {"": tree.labels}
    if tree.is_test is not None:
        counts = {"train/": tree.labels[~tree.is_test], "test/": tree.labels[tree.is_test]}
    fewest = {"": 3, "train/": 2, "test/": 1}
    for folder, labels in counts.items():
        for name, count in zip(tree.classes, np.bincount(labels, minlength=len(tree.classes)), strict=True):
            if count < fewest[folder]:
                raise SourceError(
                    f"holds {count} images of class {name!r} in {folder or 'its folder'}; "
                    f"every class needs {fewest[folder]} or more there; add images or remove the class"
                )


def _skipped(counts: Counter[tuple[str, str]]) -> str:
    """Return the number of skipped files per reason, as text."""
    reasons: Counter[str] = Counter()
    for (_, reason), count in counts.items():
        reasons[reason] += count
    return ", ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common())


def _listed(folders: set[str]) -> str:
    shown = sorted(map(printable, folders))
    return ", ".join(f"{name}/" for name in shown[:5]) + (
        f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    )
