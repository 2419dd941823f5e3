"""Where the default weights of a backbone are: in an installed package, in torch's cache, in Hugging Face's, or downloaded.

weights.py asks for the file and the SHA-256 it must have.
"""

from __future__ import annotations

import http.client
import logging
import re
import shlex
import socket
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from filelock import FileLock

from src.engine.commands.user_command import corrected
from src.engine.runs.errors import ExitCode, UserError
from src.engine.weights import efficientnet_lite
from src.engine.weights.backbone_names import TIMM_PREFIX, is_timm

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30  # without an answer from the network; urlopen alone would wait for ever


def default_file(name: str) -> tuple[Path, str]:
    """The file of the default weights, downloaded if it must be, and the SHA-256 (or its beginning) it must have."""
    if name == efficientnet_lite.NAME:
        return efficientnet_lite.weights_file(), efficientnet_lite.WEIGHTS_SHA256
    if is_timm(name):
        return _timm_file(name)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(
            f"{name} has no default weights",
            where=f"model.backbone={name} model.weights=default",
            why="it is a backbone of your own, and src/engine/weights/hub.py does not say where its weights are",
            fix=corrected(f"model.backbone={name}", "model.weights=none"),
        )
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    expected = re.search(r"-([0-9a-f]{8,64})\.", path.name)[1]  # resnet18-f37072fd.pth
    if not path.exists():
        _download(url, path, expected, name)
    return path, expected


def _download(url: str, path: Path, expected: str, name: str) -> None:
    """To path, whole and with the expected hash or not at all. Of several processes one downloads, the others wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"), _default_timeout(TIMEOUT_SECONDS):
            if not path.exists():
                torch.hub.download_url_to_file(url, str(path), expected, progress=sys.stderr.isatty())
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        command = shlex.join(["curl", "-L", "-o", str(path), url])
        raise _unavailable(name, path.name, path.parent, command, error) from error
    except OSError as error:
        raise UserError(
            f"cannot write the weights of {name} to {path.parent}: {error.strerror or error}",
            where=str(path),
            why="pretrained weights are kept in torch's cache folder; the variable TORCH_HOME moves it",
            fix=f"TORCH_HOME=$HOME/torch_home {corrected()}",
            code=ExitCode.CANNOT_WRITE,
        ) from error
    except RuntimeError as error:  # download_url_to_file: invalid hash value (expected "...", got "...")
        raise UserError(
            f"the download of {path.name} is not what {name}'s authors published: {error}",
            where=url,
            why="the connection was cut, or something between here and there (a proxy, a log-in page) answered",
            fix=[corrected(), corrected("model.backbone=efficientnet_lite0", remove=["model.weights"])],
            code=ExitCode.DATA,
        ) from error


@contextmanager
def _default_timeout(seconds: float) -> Iterator[None]:
    """Of sockets made inside. Used under the lock, since it belongs to all threads: two would restore each other's."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _timm_file(name: str) -> tuple[Path, str]:
    """From the Hugging Face cache, which names each blob by its SHA-256; downloaded only if it is not there."""
    import huggingface_hub
    import timm

    cfg = timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))
    if not cfg.hf_hub_id:
        raise UserError(
            f"{name} has no pretrained weights on the Hugging Face hub",
            where=f"model.backbone={name} model.weights=default",
            why="timm defines the network only",
            fix=corrected(f"model.backbone={name}", "model.weights=none"),
        )
    repository, _, revision = cfg.hf_hub_id.partition("@")
    source = {"repo_id": repository, "filename": "model.safetensors", "revision": revision or None}
    try:
        try:
            path = Path(huggingface_hub.hf_hub_download(**source, local_files_only=True))
        except huggingface_hub.errors.LocalEntryNotFoundError:
            log.info(f"downloading {repository}/model.safetensors from the Hugging Face hub")
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each of five retries
            path = Path(huggingface_hub.hf_hub_download(**source))
    except Exception as error:  # offline, no such file, no access: the hub has a dozen classes for it
        folder = Path(huggingface_hub.constants.HF_HUB_CACHE)
        copy = shlex.join(["hf", "download", repository, "model.safetensors", "--cache-dir", str(folder)])
        raise _unavailable(name, f"{repository}/model.safetensors", folder, copy, error) from error
    blob = path.resolve().name  # a file without links (Windows) or without LFS is not named so and cannot be checked
    return path, blob if re.fullmatch(r"[0-9a-f]{64}", blob) else ""


def _unavailable(name: str, file: str, folder: Path, command: str, error: Exception) -> UserError:
    return UserError(
        f"cannot download {file}, the pretrained weights of {name}",
        where=f"not in {folder}",
        why=f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}",
        fix=[
            f"{corrected('model.backbone=efficientnet_lite0')}   # its weights come with the installation",
            f"{corrected(f'model.backbone={name}', 'model.weights=PATH')}   # a file you have",
            f"{corrected(f'model.backbone={name}', 'model.weights=none')}   # from scratch",
            f"{command}   # where there is a network; then copy it to that folder",
        ],
        code=ExitCode.UNAVAILABLE,
    )
