"""Files and words from somebody else: read, refused, and never run."""

from __future__ import annotations

import pickle
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from scripts.faults.hostile import Payload, hostile_archives, save_as_the_program_would, serving, torch_bytes
from scripts.faults.injecting import STEP, kill
from scripts.faults.programs import Program, check
from scripts.faults.project import Project
from scripts.faults.registry import row
from tests.warm import ROOT

REFUSED = (64, 65, 66, 69, 74)  # exit codes of files and words that are not taken


def stopped(program: Program, run: str = "run") -> Path:
    """A run that was killed in its last epoch; returns its position."""
    program.check_killed(program.train(kill(STEP, 12), run=run))
    return program.checkpoints(run) / "last.ckpt"


@row(
    49,
    "pickle_local",
    promise="the code is not run",
    injection="a pickle that would make a file, at each way in: positions, weights, models, tables, images",
    quick=True,
)
def pickle_local(program: Program) -> str:
    marker = program.folder / "ran"
    stopped(program)
    shutil.copytree(program.path(), program.path("other"))
    for run, name in {"run": "last.ckpt", "other": "best.ckpt"}.items():
        if name == "best.ckpt" and not isinstance(program, Project):
            continue  # it never reads that
        file = program.checkpoints(run) / name
        content = torch.load(file, map_location="cpu", weights_only=True) | {"more": Payload(marker)}
        save_as_the_program_would(program, content, file)
        done = program.train(run=run)
        check(not marker.exists(), f"the code in {name} was run")
        # Another position, or another epoch's weights, may be taken instead, which is said.
        check(done.code in REFUSED or name in done.text, f"{name}: {done.end()}")
    if isinstance(program, Project):
        answers = list(other_ways_in(program, marker))
        check(not marker.exists(), "the code was run")
        codes = [done.code for done in answers]
        check(all(code in REFUSED for code in codes), f"exit codes {codes}; {answers[-1].end()}")
        advice = [done for done in answers if "weights_only" in done.text]
        check(not advice, "advice to switch the protection off is printed")
    return "refused at each, nothing run"


def other_ways_in(project: Project, marker: Path) -> Iterator:
    """The answers to the same pickle as weights, model, table and split."""
    file = project.folder / "payload.pth"
    torch.save({"state_dict": Payload(marker)}, file)
    yield project.train(run="zip", words=(f"model.weights={file}",))
    file.write_bytes(pickle.dumps(Payload(marker)))
    yield project.train(run="bare", words=(f"model.weights={file}",))
    shutil.copy(file, project.folder / "payload.safetensors")
    yield project.train(run="named", words=("model.weights=payload.safetensors",))
    shutil.copy(file, project.folder / "payload.csv")
    yield project.train(run="split", words=("data.split_file=payload.csv",))
    yield project.train(run="table", words=("data=table", "data.table=payload.csv"))
    check(project.train(run="whole").code == 0, "the run to spoil failed")
    shutil.copy(file, project.path("whole") / "model" / "model.safetensors")
    yield project.command("src.predict", "run=runs/whole", "images=photos/apple")
    yield project.command("src.evaluate", "run=runs/whole")


@row(
    50,
    "pickle_http",
    promise="refused, no request is sent",
    injection="the address of a server on this machine with such a pickle, where a file is expected",
)
def pickle_http(program: Program) -> str:
    marker = program.folder / "ran"
    with serving(torch_bytes(Payload(marker))) as (address, requests):
        if isinstance(program, Project):
            answers = [
                program.train(words=(f"model.weights={address}/x.pth",)),
                program.command("src.evaluate", f"run={address}/run"),
                program.command("src.predict", f"model={address}/model", "images=photos"),
            ]
            codes = [done.code for done in answers]
            check(all(code in REFUSED for code in codes), f"exit codes {codes}")
        else:
            program.train(flags=(f"--resume={address}/x.ckpt",))
        check(not marker.exists(), "the code was fetched and run")
        check(not requests, f"{len(requests)} requests were sent")
    return "refused, no request"


@row(
    51,
    "instantiator",
    promise="refused or without effect",
    injection="a checkpoint whose hyper-parameters name a function of somebody else as _instantiator and _class_path",
)
def instantiator(program: Program) -> str:
    marker = program.folder / "ran"
    (program.folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w')\ndef run(*a, **k): pass\n")
    names = {"_instantiator": "theirs.run", "_class_path": "theirs.run", "_target_": "theirs.run"}
    last = stopped(program)
    for file in program.checkpoints().glob("*.ckpt"):
        content = torch.load(file, map_location="cpu", weights_only=True)
        content["hyper_parameters"] = {**content.get("hyper_parameters", {}), **names}
        save_as_the_program_would(program, content, file)
    done = program.train()
    check(not marker.exists(), "the function was called")
    check(done.code in (0, *REFUSED), f"{last.name}: {done.end()}")
    if isinstance(program, Project):
        for command in ("src.evaluate", "src.export"):
            program.command(command, "run=runs/run", *(["format=state_dict"] if command == "src.export" else []))
        check(not marker.exists(), "the function was called")
    return "not called"


TARGETS = """
    os.system os.popen os.execv os.remove subprocess.run subprocess.Popen subprocess.call builtins.eval builtins.exec
    builtins.__import__ builtins.open torch.load torch.hub.load torch.hub.load_state_dict_from_url torch.jit.load
    torch.package.PackageImporter torch.utils.cpp_extension.load torch.serialization.load pickle.load pickle.loads
    shutil.rmtree shutil.move importlib.import_module runpy.run_path runpy.run_module code.interact pty.spawn
    lightning.Trainer lightning.pytorch.Callback hydra.utils.instantiate hydra.utils.call logging.os.system
    logging.config.dictConfig urllib.request.urlopen src.engine.runs.run_dir.os.system src.trainer.importlib.import_module
    src.engine.runs.files.tempfile.mkdtemp src.engine.runs.signals.signal.signal src.engine.runs.run_dir.shutil.rmtree
    numpy.load
""".split()  # noqa: SIM905


@row(
    52,
    "target_allowlist",
    promise="only classes of this project are made",
    injection=f"{len(TARGETS)} names of others as _target_ of a callback, torch.load and torch.hub.load among them",
    plain=False,
)
def target_allowlist(project: Project) -> str:
    from src.engine.runs.errors import UserError
    from src.engine.runs.own_callbacks import own_callback

    taken = []
    for target in TARGETS:
        try:
            own_callback({"_target_": target})
        except UserError:
            continue
        taken.append(target)
    check(not taken, f"made or called: {', '.join(taken)}")
    marker = project.folder / "ran"
    for number, target in enumerate(("os.system", "torch.load", "src.engine.runs.run_dir.os.system")):
        entry = f"callbacks.extra=[{{_target_: {target}, command: 'touch {marker}'}}]"
        project.check_error(project.train(run=f"run{number}", words=(entry,)), 64, target)
    check(not marker.exists(), "a command was run")
    return f"{len(TARGETS)} of {len(TARGETS)} refused"


@row(
    53,
    "archive",
    promise="nothing is written outside, memory stays small",
    injection="zip and tar files with .., absolute paths and links, and one that unpacks to 1 GB, as weights and as images",
    plain=False,
)
def archive(project: Project) -> str:
    outside = project.folder.parent / f"outside-{project.folder.name}"
    files = [*hostile_archives(project.folder, outside)]
    for number, file in enumerate(files):
        done = project.train(run=f"weights{number}", words=(f"model.weights={file.name}",), peak="peak")
        check(done.code in REFUSED, f"{file.name}: {done.end()}")
        mib = int((project.folder / "peak").read_text()) / 1024
        check(mib < 1200, f"{file.name}: {mib:.0f} MB of memory")
        shutil.copy(file, project.folder / "photos" / "apple" / f"{file.name}.png")
    done = project.train(run="images")
    project.check_error(done, 65, f"{len(files)} of")
    check(not outside.exists() and not Path(f"{outside}.link").exists(), "a file was written outside")
    return f"{len(files)} refused, nothing outside, at most {mib:.0f} MB of memory with all libraries"


@row(
    54,
    "weights_hash",
    promise="the SHA-256 is checked at every load",
    injection="other weights in the cache, under the name of the published ones",
    quick=True,
    plain=False,
)
def weights_hash(project: Project) -> str:
    from torchvision.models import get_model, get_model_weights

    name = "shufflenet_v2_x0_5"
    cached = project.folder / "cache/hub/checkpoints" / get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(get_model(name).state_dict(), cached)
    done = project.train(words=("model.weights=default",), environ={"TORCH_HOME": str(project.folder / "cache")})
    project.check_error(done, 65, "SHA-256", cached.name)
    return "exit code 65, both digests shown"


@row(
    55,
    "partial_load",
    promise="an error under a stated share",
    injection="a weights file whose names do not match, and one in which a third does not",
    quick=True,
    plain=False,
)
def partial_load(project: Project) -> str:
    from torchvision.models import get_model

    state = get_model("shufflenet_v2_x0_5").state_dict()
    for run, every in {"none": 1, "third": 3}.items():
        renamed = {f"unknown.{n}" if n % every == 0 else key: value for n, (key, value) in enumerate(state.items())}
        torch.save(renamed, project.folder / f"{run}.pth")
        project.check_error(project.train(run=run, words=(f"model.weights={run}.pth",)), 65, f"{run}.pth", "of")
    return "exit code 65 with the share that fits"


BANNED = {  # what is known to be harmful or to have a hole: facts of November 2026
    "torch": ["2.5.1", "2.9.1"],  # CVE-2025-32434, CVE-2026-24747
    "lightning": ["2.6.2", "2.6.3", "2.6.5"],  # malware twice, CVE-2026-58659
    "hydra-core": ["1.3.2", "1.3.5"],  # GHSA-37p2-j732-x8pj
    "pillow": ["12.1.0", "12.2.0"],
}


@row(
    56,
    "no_compromised_pin",
    promise="banned versions cannot be installed",
    injection="the bounds of pyproject.toml against versions with known malware or holes",
    quick=True,
    plain=False,
)
def no_compromised_pin(project: Project) -> str:
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]
    bounds = {requirement.name: requirement.specifier for requirement in wanted}
    allowed = [
        f"{name} {version}" for name, versions in BANNED.items() for version in versions if version in bounds[name]
    ]
    check(not allowed, f"allowed: {', '.join(allowed)}")
    return f"{sum(map(len, BANNED.values()))} versions are out of bounds"
