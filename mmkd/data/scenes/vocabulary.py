"""What a scene can show: 48 object classes in 8 groups, 6 card colours, 10 digits.

Every class has one or more OpenMoji assets. Assets in `held_out` never appear in training
pictures; the split `test_assets` shows nothing else.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectClass:
    """One kind of object: its word, its group and the OpenMoji code points that depict it."""

    name: str
    group: str
    assets: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    @property
    def plural(self) -> str:
        return PLURALS.get(self.name, self.name + "s")


PLURALS = {
    "cherry": "cherries",
    "strawberry": "strawberries",
    "dress": "dresses",
    "bus": "buses",
    "fox": "foxes",
    "wrench": "wrenches",
    "fruit": "fruits",
    "food": "foods",
}


def _group(group: str, *classes: tuple) -> tuple[ObjectClass, ...]:
    return tuple(ObjectClass(name, group, *assets) for name, *assets in classes)


CLASSES: tuple[ObjectClass, ...] = (
    *_group(
        "animal",
        ("cat", ("1F431", "1F408"), ("1F63A",)),
        ("dog", ("1F436", "1F415"), ("1F429",)),
        ("pig", ("1F437",), ("1F416",)),
        ("frog", ("1F438",)),
        ("fox", ("1F98A",)),
        ("owl", ("1F989",)),
    ),
    *_group(
        "fruit",
        ("apple", ("1F34E",), ("1F34F",)),
        ("banana", ("1F34C",)),
        ("cherry", ("1F352",)),
        ("grape", ("1F347",)),
        ("lemon", ("1F34B",)),
        ("strawberry", ("1F353",)),
    ),
    *_group(
        "food",
        ("pizza", ("1F355",)),
        ("burger", ("1F354",)),
        ("donut", ("1F369",)),
        ("egg", ("1F373",)),
        ("bread", ("1F35E",)),
        ("cookie", ("1F36A",)),
    ),
    *_group(
        "vehicle",
        ("car", ("1F697", "1F699"), ("1F695",)),
        ("bus", ("1F68C",), ("1F68D",)),
        ("train", ("1F682",)),
        ("bike", ("1F6B2",)),
        ("boat", ("26F5",)),
        ("rocket", ("1F680",)),
    ),
    *_group(
        "plant",
        ("tree", ("1F333",), ("1F332",)),
        ("cactus", ("1F335",)),
        ("rose", ("1F339",)),
        ("tulip", ("1F337",)),
        ("sunflower", ("1F33B",)),
        ("mushroom", ("1F344",)),
    ),
    *_group(
        "instrument",
        ("guitar", ("1F3B8",)),
        ("drum", ("1F941",)),
        ("trumpet", ("1F3BA",)),
        ("violin", ("1F3BB",)),
        ("piano", ("1F3B9",)),
        ("bell", ("1F514",)),
    ),
    *_group(
        "garment",
        ("hat", ("1F3A9",)),
        ("shirt", ("1F455",)),
        ("dress", ("1F457",)),
        ("shoe", ("1F45F",), ("1F45E",)),
        ("glove", ("1F9E4",)),
        ("crown", ("1F451",)),
    ),
    *_group(
        "tool",
        ("hammer", ("1F528",)),
        ("wrench", ("1F527",)),
        ("key", ("1F511",), ("1F5DD",)),
        ("umbrella", ("2614",)),
        ("clock", ("23F0",)),
        ("book", ("1F4D5",), ("1F4D8",)),
    ),
)

GROUPS: tuple[str, ...] = tuple(dict.fromkeys(c.group for c in CLASSES))
BY_NAME: dict[str, ObjectClass] = {c.name: c for c in CLASSES}
BY_GROUP: dict[str, tuple[ObjectClass, ...]] = {
    g: tuple(c for c in CLASSES if c.group == g) for g in GROUPS
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 92, 88),
    "orange": (245, 170, 80),
    "yellow": (247, 228, 110),
    "green": (124, 196, 118),
    "blue": (110, 168, 232),
    "purple": (180, 130, 214),
}

BACKGROUNDS: tuple[tuple[int, int, int], ...] = (
    (255, 255, 255),
    (240, 240, 236),
    (226, 232, 238),
    (238, 228, 218),
    (222, 222, 222),
)

DIGIT_ASSETS: tuple[str, ...] = tuple(f"003{d}-FE0F-20E3" for d in range(10))


def held_out_colour(class_name: str) -> str:
    """The card colour a class never has in training; `test_attributes` shows only these."""
    index = next(i for i, c in enumerate(CLASSES) if c.name == class_name)
    return list(COLOURS)[index % len(COLOURS)]
