"""A weights file of somebody else: which file is meant, what kind it is, and the tensors in it by name.

weights.py asks for the tensors. No file is ever allowed to run code: torch.load is called with weights_only=True, and
the plain objects that training programs keep beside their weights become inert stand-ins.
"""

from __future__ import annotations

import pickle
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from src.engine.commands.user_command import corrected
from src.engine.runs.checksum import damage
from src.engine.runs.errors import ExitCode, UserError, data_error
from src.engine.runs.reading import read_safetensors
from src.engine.runs.text import printable, shell_word
from src.engine.weights.low_rank import merged
from src.engine.weights.stand_ins import Inert, stand_ins

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")
SAVE_TENSORS = 'torch.save(model.state_dict(), "weights.pth")   # in the program that made the file'

MOST_MEMBERS = 50_000  # of a zip archive: a tensor each
_MAX_DEPTH = 8  # of dictionaries in dictionaries; deeper nesting is no training program's


# --- which file ------------------------------------------------------------------------------------------------------


def local_file(weights: str) -> Path:
    """The file that model.weights names: itself, or the one in a model folder or a run's folder. Raises UserError."""
    path = Path(weights)
    with suppress(RuntimeError):  # ~name of somebody who has no account here
        path = path.expanduser()
    try:
        if path.is_dir():
            return _file_of_folder(path)
        is_file, exists = path.is_file(), path.exists()
    except OSError as error:  # a name that is too long, a folder without permission
        raise cannot_read(path, error) from error
    if "://" in weights:
        name = weights.partition("?")[0].rpartition("/")[2] or "weights.pth"
        raise UserError(
            f"model.weights is an address, not a file: {weights}",
            why="only a backbone's default weights are downloaded, since their SHA-256 is known",
            fix=[f"{shlex.join(['curl', '-L', '-o', name, weights])} && {corrected(f'model.weights={name}')}"],
            code=ExitCode.NO_INPUT,
        )
    if not is_file:
        kind = "is neither a file nor a folder" if exists else "does not exist"
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        raise UserError(
            f"cannot read the weights {path}: it {kind}",
            where="model.weights",
            why="model.weights is default, none, a weights file, or a folder with model.safetensors (a run's model/)",
            fix=[corrected("model.weights=default"), f"ls -l {shell_word(folder)}"],
            code=ExitCode.NO_INPUT,
        )
    return path


def cannot_read(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read the weights {shown(path)}: {error.strerror}",
        where="model.weights",
        why="this account may not read the file, its name is too long, or the disk fails",
        fix=[f"ls -l {shell_word(path)}", corrected("model.weights=default")],
        code=ExitCode.NO_INPUT,
    )


def _file_of_folder(folder: Path) -> Path:
    for inside in ("model.safetensors", "model/model.safetensors"):
        if (folder / inside).is_file():
            return folder / inside
    inner = [folder, folder / "checkpoints", folder / "model"]
    files = [file for place in inner if place.is_dir() for file in sorted(place.iterdir()) if file.suffix in SUFFIXES]
    why = f"it holds {', '.join(file.name for file in files[:6])}" if files else "it holds no other weights file either"
    fix = [corrected(f"model.weights={file}") for file in files[:3]]
    if (folder / ".metadata").is_file() or any(file.suffix == ".distcp" for file in folder.iterdir()):
        why, fix = "it is a sharded checkpoint of torch.distributed, a piece per process", [SAVE_TENSORS]
    raise UserError(
        f"the folder {folder} has no model.safetensors",
        where="model.weights",
        why=why,
        fix=fix or [f"ls -lR {shell_word(folder)}", corrected("model.weights=default")],
        code=ExitCode.NO_INPUT,
    )


# --- its content -----------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, with the keys of nested dictionaries: 'state_dict.conv1.weight'.

    An optimizer's tensors are left out: its averages have the weights' names and shapes. Raises UserError for a file
    that is damaged, of another kind, or has code in it.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1024)
        _check_kind(path, start)
        content = _content(path, start)
        tensors = merged(dict(_named(content, "", _MAX_DEPTH, set())))
    except (MemoryError, UserError):
        raise
    except Exception as error:  # torch raises OSError, EOFError, RuntimeError, UnpicklingError, ... for cut files
        # Without its cause where torch advises to load code, too: error.log would pass that on.
        raise unreadable(path, error) from (None if "weights_only" in str(error) else error)
    if not tensors:
        why = "weights are found by their names, such as conv1.weight"
        raise content_error(path, f"holds no tensors by name but {_described(content)}", why)
    return tensors


def _content(path: Path, start: bytes) -> object:
    if start[8:9] == b"{":  # after the length of its header: safetensors, whatever it is called
        return read_safetensors(path)
    mmap = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
    if not mmap and start[:4] == b"PK\x03\x04":  # torch would say "[Errno 22] Invalid argument"
        raise EOFError("it begins like a file of torch.save, but its end is missing")
    with torch.serialization.safe_globals(stand_ins()):
        if path.suffix == ".safetensors":  # by its name alone, torch would take it for one
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _named(content: object, prefix: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """seen: ids of the containers that were opened; a pickle may hold one twice, and in itself."""
    if id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, Mapping):
        items = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):  # tensors in a list have no names
        items = [(str(i), value) for i, value in enumerate(content) if not isinstance(value, Tensor)]
    else:
        return
    for key, value in items:
        if isinstance(value, Tensor):
            yield prefix + key, value
        elif depth and not key.lower().startswith(("optim", "opt_state")):
            yield from _named(value, f"{prefix}{key}.", depth - 1, seen)


def _described(content: object) -> str:
    if isinstance(content, Mapping):
        return f"a dictionary with {', '.join(map(shown, list(content)[:6]))}" if content else "an empty dictionary"
    return "an object" if isinstance(content, Inert) else f"a {type(content).__name__}"


def shown(name: object) -> str:
    """A name or text from a file, for the screen."""
    text = str(name)
    return printable(text if len(text) <= 120 else text[:120] + "...")


# --- what else it may be ---------------------------------------------------------------------------------------------

_AGAIN = "download it again; the address must be the file's own (on GitHub: 'Raw', on Hugging Face: 'resolve')"

_MAGIC = {  # the first bytes, what the file is then, and what to do
    b"\x89HDF\r\n": ("an HDF5 file, as Keras and MATLAB write", "ask its authors for the weights of the PyTorch model"),
    b"\x93NUMPY": ("a NumPy array", SAVE_TENSORS),
    b"\x1f\x8b": ("compressed with gzip", "gzip -dc {path} > weights.pth"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "git -C {folder} lfs pull"),
}
_TORCHS_PICKLE = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch.serialization's magic number, after the protocol


def _check_kind(path: Path, start: bytes) -> None:
    """Raises UserError for a file that is recognised by its first bytes as something else than weights."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, (kind, fix) in _MAGIC.items():
        if start.startswith(magic):
            folder = shell_word(path.absolute().parent)
            raise _other_kind(path, kind, fix.format(path=shell_word(path), folder=folder))
    if not start:
        raise _other_kind(path, "empty: it has 0 bytes", "copy or download it again")
    if text.startswith(b"<"):
        raise _other_kind(path, f"a web page or XML: {shown(text[:60].decode('latin-1'))}", _AGAIN)
    if text.startswith((b"{", b"[")):
        index = b'"weight_map"' in text or path.name.endswith(".index.json")
        kind = "the index of weights that lie in several files" if index else "JSON: text, not tensors"
        raise _other_kind(path, kind, SAVE_TENSORS)
    if zipfile.is_zipfile(path):
        _check_zip(path)
    elif start[:1] == b"\x80" and len(start) > 20 and start[2:15] != _TORCHS_PICKLE + b".":
        raise _other_kind(path, "a pickle that torch.save did not write, which is never opened", SAVE_TENSORS)
    elif start[257:262] == b"ustar":
        raise _other_kind(path, "a tar archive", f"tar -tf {shell_word(path)}")


def _check_zip(path: Path) -> None:
    """An archive of torch.save has a CRC-32 of each member, which torch.load does not look at. Files from before torch 1.6
    and safetensors have none. Raises UserError for another archive, and ValueError or BadZipFile for a damaged one."""
    with zipfile.ZipFile(path) as archive:
        members, names = archive.infolist(), archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            kind = "an archive of NumPy arrays" if names and names[0].endswith(".npy") else "a zip archive"
            holds = ", ".join(map(shown, names[:3])) or "nothing in it"
            raise _other_kind(path, f"{kind} with {holds}", f"unzip -l {shell_word(path)}")
        if any(name.endswith("/constants.pkl") for name in names):
            return  # TorchScript, some of it compressed, which torch.load refuses
        if len(members) > MOST_MEMBERS or sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError(f"{len(members)} members, which torch.save would not have compressed")
        if archive.comment.startswith(b"crc32 ") and (what := damage(path)) is not None:  # a checkpoint of ours
            raise ValueError(what)
        if (broken := archive.testzip()) is not None:
            raise ValueError(f"the CRC-32 of {broken} is not the one it was written with")


def _other_kind(path: Path, kind: str, fix: str) -> UserError:
    return content_error(path, f"is {kind}", "weights are read from files of torch.save and from .safetensors", [fix])


def content_error(path: Path, what: str, why: str, fix: Sequence[str] = (SAVE_TENSORS,)) -> UserError:
    """what: is or holds something that cannot be used. The backbone's default weights are suggested after the fix."""
    fix = [*fix, corrected("model.weights=default")]
    return data_error(f"the weights file {path.name} {what}", where=str(path), why=why, fix=fix)


def unreadable(path: Path, error: Exception) -> UserError:
    """What to say of an error that a library raised about a weights file."""
    code = re.search(r"[Uu]nsupported GLOBAL (\S+)|GLOBAL (\S+) was not an allowed|(TorchScript)", str(error))
    if "must be imported to load DTensors" in str(error):
        return _other_kind(path, "one of several pieces: it holds sharded tensors (DTensor)", SAVE_TENSORS)
    if code and isinstance(error, pickle.UnpicklingError | RuntimeError):
        wanted = shown(next(filter(None, code.groups())))
        why = f"it wants {wanted}; reading it could run anything on this machine"
        return content_error(path, "holds code and not only tensors: refused", why)
    reason = (str(error).strip() or "the file ends early").splitlines()[-1]
    if "weights_only" in str(error):
        reason = "torch does not know it as a file of tensors"
    found = f"cannot read the weights file {path.name}: it is damaged or of another kind"
    why = f"{type(error).__name__}: {shown(reason)}"
    return data_error(found, where=str(path), why=why, fix="copy or download it again")
