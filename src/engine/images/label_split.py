"""Splits images that each have several labels: iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011).

The label with the fewest images left is dealt out first, each image to the split that lacks most of it: labels are rare
alone, and combinations of them rarer still, so dealing out each combination would leave labels out of val and test. Groups of
images, which together have several labels in every task, and folds are dealt out in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from src.engine.images.labelled_images import SPLITS
from src.engine.runs import seeding

Group = list[int]  # images that go to one part together
Counts = Sequence[Counter[str]]  # of each group: label -> number of images
Sizes = Callable[[int], dict[str, float]]  # number of images -> part (a split or a fold) -> how many of them it gets


def iterative_split(
    labels: Sequence[frozenset[str]],
    seed: int,
    val_fraction: float,
    test_fraction: float,
    copies: Sequence[str] | None = None,
) -> dict[str, list[int]]:
    """split -> indices. labels: of each image, perhaps none. copies: images with the same text in it stay together, and count
    as one.

    Each label has its share of each split to within a few images, and at least one image in each split where it has three,
    unless each of them is the only one of another label in its split.
    """
    groups: dict[object, Group] = {}
    for index in range(len(labels)):
        groups.setdefault((copies[index] or index) if copies else index, []).append(index)
    counts = [Counter({name: 1 for index in group for name in labels[index]}) for group in groups.values()]
    return _dealt([*groups.values()], counts, [1] * len(counts), seed, _sizes(val_fraction, test_fraction))


def group_split(
    groups: Sequence[Group], labels: Sequence[Iterable[str]], seed: int, val_fraction: float, test_fraction: float
) -> dict[str, list[int]]:
    """split -> indices. groups: images that stay together. labels: of each image. The fractions are shares of the images."""
    return _dealt(groups, _counts(groups, labels), [*map(len, groups)], seed, _sizes(val_fraction, test_fraction))


def group_folds(groups: Sequence[Group], labels: Sequence[Iterable[str]], seed: int, number: int) -> list[list[int]]:
    """The indices of each fold. Folds have as many images as each other, and of each label, as nearly as groups allow."""

    def sizes(count: int) -> dict[str, float]:
        return {str(fold): count / number for fold in range(number)}

    return [*_dealt(groups, _counts(groups, labels), [*map(len, groups)], seed, sizes).values()]


def split_sizes(count: int, val_fraction: float, test_fraction: float) -> dict[str, int]:
    """How many of so many images go to test, val and train."""
    test = _share(test_fraction, count, spare=2)
    val = _share(val_fraction, count - test, spare=1, of=count)
    return {"test": test, "val": val, "train": count - test - val}


def _share(fraction: float, available: int, spare: int, of: int | None = None) -> int:
    """round(fraction * of), at least one where there is one to spare, and never all that is left."""
    if fraction == 0 or available <= spare:
        return 0
    return min(max(1, round(fraction * (of or available))), available - spare)


def _sizes(val_fraction: float, test_fraction: float) -> Sizes:
    return lambda count: {split: split_sizes(count, val_fraction, test_fraction)[split] for split in SPLITS}


def _counts(groups: Sequence[Group], labels: Sequence[Iterable[str]]) -> Counts:
    return [Counter(name for index in group for name in labels[index]) for group in groups]


def _dealt(
    groups: Sequence[Group], counts: Counts, weights: Sequence[int], seed: int, sizes: Sizes
) -> dict[str, list[int]]:
    """part -> indices. weights: for how many images each group counts. Large groups come first, so that small ones even out
    what they leave; among those of about a size the seed decides."""
    order = sorted(seeding.split_order(seed, ";", len(groups)), key=lambda place: -weights[place].bit_length())
    counts, weights = [counts[place] for place in order], [weights[place] for place in order]
    members: dict[str, list[int]] = {name: [] for name in sorted(set().union(*counts))}
    for place, own in enumerate(counts):
        for name in own:
            members[name].append(place)
    wanted = {name: sizes(sum(counts[place][name] for place in having)) for name, having in members.items()}
    part_of = _deal(counts, weights, members, wanted, sizes(sum(weights)))
    _put_right(part_of, counts, weights, members, wanted)
    dealt: dict[str, list[int]] = {part: [] for part in sizes(0)}
    for place, part in zip(order, part_of, strict=True):
        dealt[part] += groups[place]
    return {part: sorted(indices) for part, indices in dealt.items()}


def _deal(
    counts: Counts,
    weights: Sequence[int],
    members: Mapping[str, Sequence[int]],
    wanted: Mapping[str, Mapping[str, float]],
    room: dict[str, float],
) -> list[str]:
    """The part of each group."""
    lacking = {name: dict(numbers) for name, numbers in wanted.items()}
    left, part_of = {name: len(having) for name, having in members.items()}, [""] * len(counts)

    def put(place: int, part: str) -> None:
        part_of[place] = part
        room[part] -= weights[place]
        for name, count in counts[place].items():
            lacking[name][part] -= count
            left[name] -= 1

    def need(place: int, part: str) -> tuple[float, float, float]:
        """First by the rarest label, then by all labels of the group, then by the size of the part."""
        return lacking[rarest][part], sum(lacking[name][part] for name in counts[place]), room[part]

    while any(left.values()):
        rarest = min((name for name in left if left[name]), key=lambda name: (left[name], name))
        for place in members[rarest]:
            if not part_of[place]:
                put(place, max(room, key=lambda part: need(place, part)))
    for place, part in enumerate(part_of):
        if not part:  # without a label
            put(place, max(room, key=lambda part: room[part]))
    return part_of


def _put_right(
    part_of: list[str],
    counts: Counts,
    weights: Sequence[int],
    members: Mapping[str, Sequence[int]],
    wanted: Mapping[str, Mapping[str, float]],
) -> None:
    """Moves a group, rather a small one, where a label is missing from a part because its images went where their rarer labels
    were lacking; never the last one of a label in its part."""
    number = Counter((name, part_of[place]) for name, having in members.items() for place in having)
    for name in sorted(members, key=lambda name: (len(members[name]), name)):
        for part in wanted[name]:
            if number[name, part] or not wanted[name][part]:
                continue
            spare = [p for p in members[name] if all(number[other, part_of[p]] > 1 for other in counts[p])]
            if not spare:
                continue
            moved = max(spare, key=lambda place: (number[name, part_of[place]], -weights[place]))
            for other in counts[moved]:
                number[other, part_of[moved]] -= 1
                number[other, part] += 1
            part_of[moved] = part
