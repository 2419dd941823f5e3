"""The shape of src/: sizes of files and functions, numbers of parameters, and which way imports point."""

from __future__ import annotations

from scripts import house
from scripts.remove_feature import files_of
from src.engine.features import FEATURES


def test_nothing_new_is_over_a_limit():
    """What was over one when the limit was set is in limits.txt, with a number that may only fall."""
    allowed, over = house.allowed_excesses(), house.excesses()
    new = {
        f"{kind} {place} {number}" for (kind, place), number in over.items() if number > allowed.get((kind, place), 0)
    }
    assert sorted(new) == [], "split it; arguments that travel together are a dataclass"


def test_no_file_is_imported_by_what_it_imports():
    imported = {file: house.imports(tree) for file, tree in house.trees().items()}
    modules = {house.module_name(file): file for file in imported}
    done: set[str] = set()

    def follow(file: str, way: tuple[str, ...]) -> None:
        assert file not in way, " -> ".join([*way[way.index(file) :], file])
        if file not in done:
            for module in imported[file]:
                if module in modules:
                    follow(modules[module], (*way, file))
            done.add(file)

    for file in imported:
        follow(file, ())


def test_the_engine_imports_nothing_of_src_outside_itself():
    assert sorted(house.upward_imports()) == [], (
        "src/engine/ is replaced as a whole: hand it what it needs as an argument"
    )


def test_the_slow_tests_exist():
    for line in house.entries(house.ROOT / "tests/slow.txt"):
        file, _, test = line.partition("::")
        text = (house.ROOT / file).read_text()
        name = test.partition(" but every ")[0].partition("[")[0]
        assert f"def {name}" in text, f"{line} is gone: take it out of tests/slow.txt"


def test_only_a_room_imports_a_room():
    """src/features.py apart, where its line is: else the room could not be removed."""
    for feature in FEATURES:
        without_it = [feature, *(other for other in FEATURES if feature.name in other.needs)]
        own = {path.relative_to(house.ROOT).as_posix() for room in without_it for path in files_of(room)}
        modules = {house.module_name(file) for file in own if file.startswith("src/")}
        for file, tree in house.trees().items():
            if file not in own and file != "src/features.py":
                assert not house.imports(tree, everywhere=True) & modules, f"{file} imports the room {feature.name}"
