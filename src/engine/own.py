"""The owner's own parts: functions and classes below src. that a setting names, such as model.head=src.my_heads.cosine.

`check_own` reads the file without importing it, so that a mistyped name is answered at once. `build_part` calls what a
setting means, a built-in part or an own one. Only names below src., and what their own file defines, are ever called: a
config from elsewhere that names torch.load, or os.system by way of a module that imports it, would run its code.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from src.engine.commands.user_command import corrected
from src.engine.project import PROJECT
from src.engine.runs.errors import ExitCode, UserError

PREFIX = "src."
ENGINE = "src.engine."
LISTS = ("callbacks.extra", "logger.extra", "metrics")  # of names, or of {_target_: name, option: value}


def is_own(name: Any) -> bool:
    """Whether a setting's value names the owner's own code."""
    return isinstance(name, str) and name.startswith(PREFIX)


def metric_name(entry: Any) -> str:
    """What a metric of the owner's is called in every table: top_five for src.my_metrics.TopFive."""
    dotted = entry.get("_target_", "") if isinstance(entry, dict) else entry
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(dotted).rpartition(".")[2]).lower()


def check_own(key: str, name: str) -> None:
    """Raises UserError unless a file below src/ defines the name. Imports nothing."""
    module, _, attribute = name.rpartition(".")
    file = _file(module)
    if name.startswith(ENGINE):
        raise _refused(key, name, "your own parts lie outside src/engine/", [])
    if not file.is_file():
        raise _refused(key, name, f"there is no file {_shown(file)}", own_like(name))
    try:
        defined = _defined(file)
    except SyntaxError as error:
        why = f"Python cannot read {_shown(file)}, line {error.lineno}: {error.msg}"
        raise UserError(f"{key}={name} cannot be used", where=f"{_shown(file)}:{error.lineno}", why=why) from error
    if attribute not in defined:
        close = [f"{module}.{other}" for other in difflib.get_close_matches(attribute, defined, n=1, cutoff=0.5)]
        listed = f"it defines {', '.join(defined[:6])}" if defined else "it defines nothing"
        raise _refused(key, name, f"{_shown(file)} defines no {attribute}; {listed}", close)


def own_like(name: str) -> list[str]:
    """The function or class outside the engine whose name is nearest to this one, if one is near."""
    names: dict[str, str] = {}  # without src., which would make any two alike where the package has a long name
    for file in (PROJECT / "src").rglob("*.py"):
        module = ".".join(file.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")
        if not f"{module}.".startswith(ENGINE):
            with suppress(SyntaxError, UnicodeDecodeError):
                own = [f"{module}.{attribute}" for attribute in _defined(file)]
                names |= {other.removeprefix(PREFIX): other for other in own}
    return [names[close] for close in difflib.get_close_matches(name.removeprefix(PREFIX), names, n=1, cutoff=0.8)]


def own_object(key: str, name: str) -> Any:
    """The function or class. Raises UserError where there is none, or where its file cannot be imported."""
    check_own(key, name)
    module, _, attribute = name.rpartition(".")
    with owner_errors(key, name):
        return getattr(importlib.import_module(module), attribute)


def build_part(
    key: str,
    name: str,
    built_in: Mapping[str, Callable[..., Any]],
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    kind: Any = object,
) -> Any:
    """Calls the part that a setting names with those of the given values whose names are among its parameters, or with all
    where it takes **others.

    key: the setting, such as model.head. options: further arguments, from the setting options_key(key). kind: what the part
    gives. Raises UserError for an option that the part does not take, one that it needs, an exception inside an own part,
    and a result of another kind.
    """
    part = own_object(key, name) if is_own(name) else built_in[name]
    parameters = inspect.signature(part).parameters
    takes_all = _takes_others(parameters)
    arguments = {other: value for other, value in given.items() if takes_all or other in parameters} | dict(options)
    _check_arguments(key, name, part, given, options)
    if not is_own(name):
        return part(**arguments)
    with owner_errors(key, name):
        result = part(**arguments)
    if not isinstance(result, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise wrong_result(key, name, " or ".join(each.__name__ for each in kinds), f"a {type(result).__name__}")
    return result


def _takes_others(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a function with these parameters has a **others."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _check_arguments(
    key: str, name: str, part: Callable[..., Any], given: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Raises UserError for an option that the part does not take, and for an argument that it lacks."""
    parameters, setting = inspect.signature(part).parameters, options_key(key)
    takes_all = _takes_others(parameters)
    free = [other for other in parameters if other not in given]
    for option in options:
        if option in given or not (takes_all or option in parameters):
            close = difflib.get_close_matches(option, free, n=1)
            raise UserError(
                f"{setting}.{option} has no effect: {name} takes no {option}"
                + (f"; did you mean {setting}.{close[0]}?" if close else ""),
                where=_place(part),
                why=f"it takes {', '.join(free)}" if free else "it takes no options",
                fix=_put_right(setting, dict.fromkeys(close, options[option]), [option]),
            )
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for other, parameter in parameters.items():
        if (
            parameter.default is parameter.empty
            and parameter.kind not in variable
            and other not in {**given, **options}
        ):
            raise UserError(
                f"{key}={name} needs a value for {other}",
                where=_place(part),
                why=f"it has no default, and is none of what is given: {', '.join(given) or 'nothing'}",
                fix=_put_right(setting, {other: "..."}),
            )


def options_key(key: str) -> str:
    """The setting that holds a part's options: data.source has data.options, model.head has model.head_options."""
    section, _, part = key.partition(".")
    if key in LISTS:
        return key
    return f"{section}.options" if part in ("source", "name") else f"{key}_options"


def _put_right(setting: str, values: Mapping[str, Any], remove: Sequence[str] = ()) -> str:
    if setting in LISTS:
        return f"change {setting}"
    return corrected(
        *(f"{setting}.{option}={value}" for option, value in values.items()),
        remove=[f"{setting}.{option}" for option in remove],
    )


def check_still_there(name: str, folder: Path) -> None:
    """Raises UserError where a model needs an own part that this project no longer has, and ValueError where it is another
    project's. folder: model/."""
    if not is_own(name) and re.fullmatch(r"[a-z_]\w*(\.\w+)+", str(name)):
        raise ValueError(f"{name} is a part of another project; those of this one begin with {PREFIX}")
    try:
        if is_own(name):
            check_own("model", name)
    except UserError as error:
        raise UserError(
            f"the model needs {name}, which is not in this project",
            where=str(folder),
            why=error.why,
            fix="put the file back from the project that trained the model",
            code=ExitCode.UNAVAILABLE,
        ) from error


@contextmanager
def owner_errors(key: str, name: str) -> Iterator[None]:
    """Inside, an exception of the owner's code becomes a UserError that names its file and line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        own = str(PROJECT / "src")
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(own)]
        frames = [frame for frame in frames if not frame.filename.startswith(f"{own}/engine/")] or frames
        where = f"{_shown(Path(frames[-1].filename))}:{frames[-1].lineno}" if frames else name
        line = f"\n{frames[-1].line}" if frames else ""
        raise UserError(
            f"{key}={name} raised {type(error).__name__}", where=where, why=f"{str(error)[:400]}{line}"
        ) from error


def wrong_result(key: str, name: str, expected: str, found: str) -> UserError:
    """The error for an own part that gives something else than expected."""
    return UserError(
        f"{key}={name} gives {found}", where=_place(own_object(key, name)), why=f"it has to give {expected}"
    )


def _refused(key: str, name: str, why: str, close: list[str]) -> UserError:
    found = f"{key}={name} does not exist" + (f"; did you mean {close[0]}?" if close else "")
    fix = [corrected(f"{key}={close[0]}")] if close else []
    return UserError(found, where=key, why=f"{why} (docs/your_own.md)", fix=fix)


def _file(module: str) -> Path:
    path = PROJECT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _defined(file: Path) -> list[str]:
    """The public functions, classes and values that a file defines at its top level; not what it imports."""
    names: list[str] = []
    for node in ast.parse(file.read_text(encoding="utf-8"), str(file)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def _place(part: Any) -> str:
    """Where a part is defined: src/my_heads.py:7."""
    try:
        return f"{_shown(Path(inspect.getsourcefile(part) or ''))}:{inspect.getsourcelines(part)[1]}"
    except (TypeError, OSError):
        return getattr(part, "__module__", "src")


def _shown(file: Path) -> str:
    return str(file.relative_to(PROJECT)) if file.is_relative_to(PROJECT) else str(file)
