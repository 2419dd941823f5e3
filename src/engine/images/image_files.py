"""From what a source returns to labelled images: split, and files also checked, without the bad ones where they are skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from src.engine.commands.user_command import corrected
from src.engine.images import copies, near_duplicates, oddities, splits
from src.engine.images.checking import CheckResult, cache_file, check_images, refuse_bad_images
from src.engine.images.groups import NEAR_DUPLICATES, Together, groups_of_paths, say_groups
from src.engine.images.image_bank import FOLDER, ImageBank
from src.engine.images.labelled_images import ImageSet, Label, LabelledImages, Listing, by_split
from src.engine.images.reading import pixels_of
from src.engine.images.splits import SplitSettings
from src.engine.runs.errors import UserError, data_error
from src.engine.runs.text import few, printable, shell_word
from src.engine.weights.preprocessing import ReadOptions

if TYPE_CHECKING:
    from src.engine.steps.task_kind import TaskKind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileSettings:
    """How files are read and checked."""

    options: ReadOptions
    bits: int | None  # of 16-bit channels; None: as many as the check finds
    timeout_seconds: float
    skip_bad: bool  # files that cannot be read are left out, otherwise they are an error
    cache_dir: Path  # remembers the check
    bad_list: Path | None  # where to list the bad ones; copies are listed beside it
    workers: int  # threads of the check
    columns: Sequence[str] = ()  # data.label_columns
    bank_mib: float = 0  # how much the image bank may take; 0: none
    bank: ImageBank | None = None  # of the listing


def load(
    listing: Listing, kind: TaskKind, split: SplitSettings, settings: FileSettings, run_split: Path | None
) -> LabelledImages:
    """run_split: the split.csv of a run that is continued or evaluated. Raises UserError."""
    if run_split and settings.bits is None:
        settings = replace(settings, bits=splits.bits_of_run(run_split))
    settings = _with_bank(settings, listing)
    where, pairs = listing.source or str(listing.root), []
    if run_split is None:  # else the groups were used up when the run's split was made
        splits.check_folds(listing.splits, split, where)
        listing = _grouped_by_path(listing, split.group, where)
    listing, checked = _checked(listing, kind, settings, keep_bad=run_split is not None)
    if run_split is None:
        pairs = _near_pairs(listing, checked, settings, split.group)
        if split.group == NEAR_DUPLICATES:
            listing.groups = near_duplicates.near_groups(listing.names, pairs)
        say_groups(listing.groups, split.group or listing.grouped_by)
    digests = [checked[name].digest for name in listing.names]
    together = Together(listing.groups, digests, kind.strata)
    members = splits.choose_split(listing.names, listing.labels, listing.splits, split, together, kind)
    together.check(members, where)
    is_given = split.file is not None or listing.splits is not None
    pairs = [(listing.names[place], listing.names[other]) for place, other in pairs]
    if split.file:  # images that it does not list are left out, and a class that only they have
        kept = sorted(index for indices in members.values() for index in indices)
        place = {index: new for new, index in enumerate(kept)}
        listing = listing.only(kept)
        members = {name: [place[index] for index in indices] for name, indices in members.items()}
    if run_split is not None:
        listing.groups = splits.groups_of_run(run_split, listing.names) or listing.groups
    images = _labelled(listing, kind, members, settings, checked)
    copy_list = settings.bad_list and settings.bad_list.with_name("copies.txt")
    copies.refuse_copies(images, copy_list, labels_too=run_split is None)
    if pairs and settings.bad_list:
        near_duplicates.report(images, pairs, settings.bad_list.with_name("near_duplicates.csv"), is_given)
    kind.check(images, listing.source or str(listing.root))
    return images


def _grouped_by_path(listing: Listing, group: str | None, where: str) -> Listing:
    if group in (None, NEAR_DUPLICATES, listing.grouped_by):
        return listing
    return replace(listing, groups=groups_of_paths(listing.names, group, where))


def _near_pairs(
    listing: Listing, checked: dict[str, CheckResult], settings: FileSettings, group: str | None
) -> list[tuple[int, int]]:
    """The near-duplicates, as pairs of indices: where they are to stay together, or are reported."""
    if group != NEAR_DUPLICATES:
        if settings.bad_list is None:
            return []
        if len(listing.names) > near_duplicates.MOST:
            most = f"{near_duplicates.MOST:,}"
            log.info(
                f"In more than {most} images near-duplicates are looked for with data.group={NEAR_DUPLICATES} alone."
            )
            return []
    return near_duplicates.near_pairs([checked[name].look for name in listing.names])


def _with_bank(settings: FileSettings, listing: Listing) -> FileSettings:
    if not settings.bank_mib:
        return settings
    root = settings.cache_dir.with_name(FOLDER)
    return replace(settings, bank=ImageBank(root, listing.root, settings.options, settings.bank_mib))


def load_unsplit(listing: Listing, kind: TaskKind, settings: FileSettings, group: str | None = None) -> LabelledImages:
    """The images of test/ where the listing states a split, otherwise all of them, as test. group: data.group of the run,
    which need not find a group in these images."""
    try:
        listing = _grouped_by_path(listing, group, listing.source or str(listing.root))
    except UserError as error:
        log.info(f"These images have no groups, so intervals take each for itself: {error.found}")
    listing, checked = _checked(listing, kind, settings)
    stated = listing.splits or ["test"] * len(listing.names)
    return _labelled(listing, kind, by_split(stated), settings, checked)


def split_image_set(images: ImageSet, kind: TaskKind, settings: SplitSettings) -> LabelledImages:
    """The set with the split that it states, or with one that is dealt out. Raises UserError for labels that cannot be
    learned."""
    texts = [kind.text_of(label, images.classes) for label in images.labels]
    names = images.names or [f"{images.name}/{index:05d}" for index in range(len(texts))]
    where, groups = images.where or f"data={images.name}", images.groups
    splits.check_folds(images.splits, settings, where)
    if settings.group == NEAR_DUPLICATES:
        why = "they are found while files are checked, and this source gives images that are none"
        raise data_error(
            "near-duplicates are looked for in files only", where=where, why=why, fix=corrected(remove=["data.group"])
        )
    if settings.group is not None:
        groups = groups_of_paths(names, settings.group, where)
    say_groups(groups, settings.group or "")
    together = Together(groups, strata=kind.strata)
    members = splits.choose_split(names, texts, images.splits, settings, together, kind)
    together.check(members, where)
    classes, labels, kept = _numbered(texts, kind, known=images.classes)
    found = LabelledImages(classes, names, labels, members, images.read, images.in_memory, texts=kept, groups=groups)
    kind.check(found, where)
    return found


def _numbered(
    texts: list[str], kind: TaskKind, columns: Sequence[str] = (), known: Sequence[str] = ()
) -> tuple[tuple[str, ...], Sequence[Label], list[str] | None]:
    """The names that the labels are about, the labels as numbers, and their texts where they are more than a class's name."""
    names = kind.names(texts, columns, known)
    labels = kind.labels(texts, names)
    return names, labels, None if isinstance(labels[0], int) else texts


def listing_of_run(root: Path, run_split: Path, error: UserError) -> Listing:
    """The images of a run's split.csv that are there. Raises the error where there are none, or where it has no labels."""
    rows = splits.read_split_file(run_split)
    labels = {name: label for name, (_, label) in rows.items() if label and (root / name).is_file()}
    if not labels:
        raise error
    log.warning(f"{error.found}: the run's own split.csv says which images it has, and of which class.")
    return Listing(root, list(labels), list(labels.values()))


def _checked(
    listing: Listing, kind: TaskKind, settings: FileSettings, keep_bad: bool = False
) -> tuple[Listing, dict[str, CheckResult]]:
    """The check of all files, and the listing without the bad ones.

    keep_bad: a run that has begun keeps images that broke since, so that the length of its epochs does not change; the
    loaders replace or skip them.
    """
    root, total = listing.root, len(listing.names)
    cache = cache_file(settings.cache_dir, root)
    # Training fills the bank, which the list of bad images is a sign of; evaluate and the reports only read it.
    fills = settings.bank is not None and settings.bad_list is not None
    with settings.bank.filling() if settings.bank and fills else nullcontext() as filling:
        limit = settings.timeout_seconds
        checked = check_images(listing, settings.options, cache, settings.workers, limit, filling)
    bad = {name: entry.error for name, entry in checked.items() if entry.error}
    if not bad:
        return listing, checked
    error = refuse_bad_images(bad, total, root, settings.bad_list)
    if not settings.skip_bad:
        raise error
    if keep_bad:
        log.warning(f"{len(bad)} of {total} images cannot be read any more: {few(bad, 3)}")
        return listing, checked
    log.warning(f"{len(bad)} of {total} images cannot be read and were left out: {few(bad, 3)}")
    good = listing.only([index for index, name in enumerate(listing.names) if name not in bad])
    if lost := sorted(set(kind.words(listing.labels)) - set(kind.words(good.labels))):
        found = f"class {printable(lost[0])} has no image left that can be read"
        why = "all its files are damaged or of a format that is not read"
        raise data_error(found, where=root, why=why, fix=f"ls -l {shell_word(root / lost[0])}")
    return good, checked


def _labelled(
    listing: Listing,
    kind: TaskKind,
    members: dict[str, list[int]],
    settings: FileSettings,
    checked: dict[str, CheckResult],
) -> LabelledImages:
    checked = {name: checked[name] for name in listing.names}
    bits = settings.bits or oddities.bits_used(checked)
    oddities.report(checked, bits)
    classes, labels, texts = _numbered(listing.labels, kind, settings.columns)
    digests = ["" if checked[name].error else checked[name].digest for name in listing.names]
    read = partial(_read, listing, replace(settings.options, bits=bits))
    return LabelledImages(
        classes,
        listing.names,
        labels,
        members,
        partial(_banked, settings.bank, digests, read) if settings.bank else read,
        bits=bits,
        root=None if listing.content else listing.root,
        digests=digests,
        texts=texts,
        groups=listing.groups,
    )


def _banked(bank: ImageBank, digests: Sequence[str], read: Callable[[int], torch.Tensor], index: int) -> torch.Tensor:
    pixels = bank.read(digests[index])
    return read(index) if pixels is None else pixels


def _read(listing: Listing, options: ReadOptions, index: int) -> torch.Tensor:
    name = listing.names[index]
    return pixels_of(listing.bytes_of(name), listing.location(name), options)[0]
