"""Splits images that each have several labels: iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011).

The label with the fewest images left is dealt out first, each image to the split that lacks most of it: labels are rare
alone, and combinations of them rarer still, so dealing out each combination would leave labels out of val and test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from src.engine.images.labelled_images import SPLITS
from src.engine.images.splits import split_sizes
from src.engine.runs import seeding

Group = list[int]  # images that are copies of each other
Numbers = dict[str, int]  # split -> number of groups


def iterative_split(
    labels: Sequence[frozenset[str]],
    seed: int,
    val_fraction: float,
    test_fraction: float,
    copies: Sequence[str] | None = None,
) -> dict[str, list[int]]:
    """split -> indices. labels: of each image, perhaps none. copies: images with the same text in it stay together.

    Each label has its share of each split to within a few images, and at least one image in each split where it has three,
    unless each of them is the only one of another label in its split.
    """
    groups: dict[object, Group] = {}
    for index in range(len(labels)):
        groups.setdefault((copies[index] or index) if copies else index, []).append(index)
    order = list(groups.values())
    order = [order[place] for place in seeding.split_order(seed, ";", len(order))]
    labels_of = [frozenset().union(*(labels[index] for index in group)) for group in order]
    names = sorted(frozenset().union(*labels_of))
    members = {name: [place for place, own in enumerate(labels_of) if name in own] for name in names}
    wanted = {name: split_sizes(len(having), val_fraction, test_fraction) for name, having in members.items()}
    split_of = _deal(labels_of, members, wanted, split_sizes(len(order), val_fraction, test_fraction))
    _put_right(split_of, labels_of, members, wanted)
    return {
        split: sorted(index for place, group in enumerate(order) if split_of[place] == split for index in group)
        for split in SPLITS
    }


def _deal(
    labels_of: Sequence[Iterable[str]],
    members: Mapping[str, Sequence[int]],
    wanted: Mapping[str, Numbers],
    sizes: Numbers,
) -> list[str]:
    """The split of each group."""
    lacking = {name: dict(numbers) for name, numbers in wanted.items()}
    room, left, split_of = dict(sizes), {name: len(having) for name, having in members.items()}, [""] * len(labels_of)

    def put(place: int, split: str) -> None:
        split_of[place] = split
        room[split] -= 1
        for name in labels_of[place]:
            lacking[name][split] -= 1
            left[name] -= 1

    def need(place: int, split: str) -> tuple[int, int, int]:
        """First by the rarest label, then by all labels of the group, then by the size of the split."""
        return lacking[rarest][split], sum(lacking[name][split] for name in labels_of[place]), room[split]

    while any(left.values()):
        rarest = min((name for name in left if left[name]), key=lambda name: (left[name], name))
        for place in members[rarest]:
            if not split_of[place]:
                put(place, max(SPLITS, key=lambda split: need(place, split)))
    for place, split in enumerate(split_of):
        if not split:  # without a label
            put(place, max(SPLITS, key=lambda split: room[split]))
    return split_of


def _put_right(
    split_of: list[str],
    labels_of: Sequence[Iterable[str]],
    members: Mapping[str, Sequence[int]],
    wanted: Mapping[str, Numbers],
) -> None:
    """Moves a group where a label is missing from a split because its images went where their rarer labels were lacking;
    never the last one of a label in its split."""
    counts = {(name, split): 0 for name in members for split in SPLITS}
    for name, having in members.items():
        for place in having:
            counts[name, split_of[place]] += 1
    for name in sorted(members, key=lambda name: (len(members[name]), name)):
        for split in SPLITS:
            if counts[name, split] or not wanted[name][split]:
                continue
            spare = [p for p in members[name] if all(counts[other, split_of[p]] > 1 for other in labels_of[p])]
            if not spare:
                continue
            moved = max(spare, key=lambda place: counts[name, split_of[place]])
            for other in labels_of[moved]:
                counts[other, split_of[moved]] -= 1
                counts[other, split] += 1
            split_of[moved] = split
