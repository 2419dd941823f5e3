"""The corrected command keeps the user's words."""

from __future__ import annotations

import pytest

from src.engine.commands.user_command import corrected


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch):
    return lambda command: monkeypatch.setenv("TRAIN_COMMAND", command)


def test_a_word_is_replaced_where_it_stands(typed) -> None:
    typed("python -m src.train data=image_folder 'data.root=my photos' data.batch_size=0 model.head=mlp")
    assert corrected("data.batch_size=32") == (
        "python -m src.train data=image_folder 'data.root=my photos' data.batch_size=32 model.head=mlp"
    )


def test_a_word_that_was_not_typed_is_added(typed) -> None:
    typed("python -m src.evaluate run=runs/pets")
    assert corrected("split=val") == "python -m src.evaluate run=runs/pets split=val"


def test_a_key_given_twice_stays_once(typed) -> None:
    typed("python -m src.train seed=a +name=x seed=b")
    assert corrected("seed=1", remove=["name"]) == "python -m src.train seed=1"


def test_flags_come_first(typed) -> None:
    typed("python -m src.train seed=1,2")
    assert corrected("-m") == "python -m src.train -m seed=1,2"


def test_other_programs_are_not_suggested(typed) -> None:
    typed("pytest tests/engine/commands/test_user_command.py")
    assert corrected("seed=1") == "python -m src.train seed=1"


def test_a_group_is_a_setting_of_the_other_programs(typed) -> None:
    typed("python -m src.evaluate run=x data.table=y")
    assert corrected("data=table") == "python -m src.evaluate run=x data.table=y data.source=table"
