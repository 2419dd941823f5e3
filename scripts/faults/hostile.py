"""Malicious files: pickles that run code, archives that escape or explode; and a server that serves them."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch

from scripts.faults.programs import Program
from scripts.faults.project import Project


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def save_as_the_program_would(program: Program, content: object, file: Path) -> None:
    """Saves with the checksum that the program expects, if it has one."""
    if isinstance(program, Project):
        from src.engine.runs.checksum import save_with_checksum

        with file.open("wb") as opened:
            save_with_checksum(content, opened)
    else:
        torch.save(content, file)


def torch_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@contextmanager
def serving(content: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every request with the content; yields its URL and the list of requested paths."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def hostile_archives(folder: Path, outside: Path) -> Iterator[Path]:
    for name, member in {"up": f"../{outside.name}", "absolute": str(outside)}.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as file:
            file.writestr(member, "here")
        yield folder / f"{name}.zip"
        with tarfile.open(folder / f"{name}.tar", "w") as file:
            file.addfile(tarfile.TarInfo(member))
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, f"{outside}.link"
            file.addfile(link)
        yield folder / f"{name}.tar"
    # The layout of torch.save, with a tensor of zeros that deflates to 1 MB.
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in torch_members(torch.zeros(1)):
            file.writestr(name, bytes(2**30) if name.endswith("data/0") else content)
    yield folder / "bomb.pth"


def torch_members(content: object) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(torch_bytes({"weight": content}))) as file:
        for name in file.namelist():
            yield name, file.read(name)
