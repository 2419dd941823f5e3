"""The shape of src/: sizes of files and functions, numbers of parameters, and which way imports point."""

from __future__ import annotations

from scripts import house


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
        assert f"def {test.partition('[')[0]}" in text, f"{line} is gone: take it out of tests/slow.txt"
