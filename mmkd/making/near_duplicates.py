"""Leave near-duplicate images out of what is asked: `twins` and `against` of an entry of `make`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from mmkd.data.overlap import words_of
from mmkd.data.twins import BITS, as_array, near_pairs, require_hash
from mmkd.errors import DataError
from mmkd.making.against import Side, sides_of
from mmkd.making.image_hashes import ImageHashes
from mmkd.making.questions import Questions, open_questions
from mmkd.making.state import folder_of
from mmkd.recipe import EvaluateConfig, MakeConfig

Hashes = tuple[int, ...]


@dataclass(frozen=True)
class LeftOut:
    """What is not asked about.

    Attributes:
        twins: number of images, or of records, that are near-duplicates of earlier ones.
        against: how many are near-duplicates of each task, file or folder.
        uncompared: why images of `against` could not be compared.
    """

    twins: int = 0
    against: Mapping[str, int] = field(default_factory=dict)
    uncompared: Sequence[str] = ()

    def __str__(self) -> str:
        """Such as "12 images are near-duplicates of others, 3 of images of pope"."""
        counts = {"others": self.twins}
        counts |= {f"images of {name}": count for name, count in self.against.items()}
        parts = [f"{count:,} of {of}" for of, count in counts.items() if count]
        if not parts:
            return ""
        first, _, of = parts[0].partition(" ")
        what = "image is a near-duplicate" if first == "1" else "images are near-duplicates"
        return ", ".join([f"{first} {what} {of}", *parts[1:]])


def leave_out(
    config: MakeConfig,
    evaluation: EvaluateConfig | None,
    where: str,
    questions: Questions,
    lists: Questions | None,
) -> tuple[Questions, Questions | None, LeftOut]:
    """The questions without those about near-duplicates. Every rank calls it.

    Images that cannot be read are not left out; they are reported when they are asked about.

    Args:
        config: the entry.
        evaluation: of the recipe, which says where tasks are.
        where: what messages call the entry.
        questions: of the entry, equally many about each image or record.
        lists: a question about each image or record, or None.

    Raises:
        MmkdError: ImageHash is not installed, `against` cannot be read, or nothing is left.
        StoppedError: a process was asked to stop.
    """
    if config.twins is None and not config.against:
        return questions, lists, LeftOut()
    require_hash()
    plain = {"prompts": ["?"], "checks": [], "objects": None}
    images = open_questions(config.model_copy(update=plain), where)
    folder = folder_of(config)
    hashes = ImageHashes(folder)
    sides = sides_of(config, evaluation, hashes, folder)
    title = f"{where.removeprefix('make.')}: comparing images"
    found, _ = hashes.of_all(len(images), lambda index: images.at(index).references, title)
    shown = [found.get(index, ()) for index in range(len(images))]
    bits, twins = BITS if config.twins is None else config.twins, config.twins is not None
    times = len(questions) // len(images)
    texts = _texts(questions, times) if config.records is not None and twins else None
    kept, left = kept_places(shown, sides, bits, twins=twins, texts=texts)
    if not kept:
        raise DataError(
            f"no image is left: {left}",
            where=where,
            hint="lower 'twins', or name less in 'against'",
        )
    asked = questions.only([place * times + n for place in kept for n in range(times)])
    if lists is not None and texts is not None:
        kept, _ = kept_places(shown, sides, bits, twins=twins)
    return asked, None if lists is None else lists.only(kept), left


def _texts(questions: Questions, times: int) -> list[str]:
    """The words of what is asked about each record; none for one that cannot be read.

    Args:
        questions: of all records.
        times: number of questions about each.
    """
    found = []
    for first in range(0, len(questions), times):
        text = ""
        with suppress(DataError):
            asked = [questions.at(index).text for index in range(first, first + times)]
            text = "\n".join(" ".join(words_of(one)) for one in asked)
        found.append(text)
    return found


def kept_places(
    shown: Sequence[Hashes],
    sides: Sequence[Side],
    bits: int,
    *,
    twins: bool = True,
    texts: Sequence[str] | None = None,
) -> tuple[list[int], LeftOut]:
    """The images, or records, that are asked about.

    One is left out if any of its images is near an image of a side, or if all of its images are
    near those of an earlier one that is kept, in their order. So what is added at the end does not
    change what is kept before it.

    Args:
        shown: hashes of the images of each record.
        sides: what they are compared with.
        bits: most bits in which near-duplicates differ.
        twins: also compare the records with each other.
        texts: question of each record; records are near-duplicates of each other only if these are
            equal too. None if the same is asked of all.

    Returns:
        Indices in `shown`, ascending, and what is left out.
    """
    values = {v for own in shown for v in own} | {v for side in sides for v in side.hashes}
    near = _neighbours(sorted(values), bits)
    taken: dict[tuple[str, int], list[Hashes]] = defaultdict(list)
    kept, twice, counts = [], 0, dict.fromkeys((side.name for side in sides), 0)
    for place, own in enumerate(shown):
        around = {value for mine in own for value in near[mine]}
        side = next((side for side in sides if not side.hashes.isdisjoint(around)), None)
        text = "" if texts is None else texts[place]
        if side is not None:
            counts[side.name] += 1
        elif twins and own and _has_twin(own, text, taken, near):
            twice += 1
        else:
            kept.append(place)
            if own:
                taken[text, own[0]].append(own)
    uncompared = [error for side in sides for error in side.unreadable]
    return kept, LeftOut(twice, {name: n for name, n in counts.items() if n}, uncompared)


def _has_twin(
    own: Hashes,
    text: str,
    taken: Mapping[tuple[str, int], list[Hashes]],
    near: Mapping[int, set[int]],
) -> bool:
    """Whether a record is a near-duplicate of a kept one, by the question and the first image."""
    others = (other for value in near[own[0]] for other in taken.get((text, value), []))
    return any(
        len(other) == len(own) and all(b in near[a] for a, b in zip(own, other, strict=True))
        for other in others
    )


def _neighbours(values: Sequence[int], bits: int) -> dict[int, set[int]]:
    """For each hash, those near it, itself included."""
    near = {value: {value} for value in values}
    left, right, _ = near_pairs(as_array(values), bits)
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        near[values[a]].add(values[b])
        near[values[b]].add(values[a])
    return near
