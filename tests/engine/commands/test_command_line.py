"""What the command line answers: help, and mistakes that are found before torch is imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import is_dataclass
from operator import attrgetter

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from src import config
from src.engine.commands import command_line, config_checks
from src.engine.commands.command_line import CONF
from src.engine.commands.schema import KNOBS
from src.engine.runs.errors import ExitCode, UserError
from tests.conftest import ROOT, SMALL, check_error, command_environment, of_room

MISTAKES = [  # the words, and what the answer must name
    (["data.batchsize=4"], "did you mean data.batch_size?"),
    (["optimizer.learning_rate=3"], "did you mean optimizer.lr?"),
    (["lr=3"], "did you mean optimizer.lr?"),
    (["stratgy=single"], "did you mean strategy?"),
    (["trainer.max_epochs=1.5"], "trainer.max_epochs"),
    (["strategy=ddpp"], "strategy=ddpp"),
    (["precision=fp8"], "fp16"),
    (["data=imagefolder"], "did you mean data=image_folder?"),
    (["freeze.phases={0:[head"], "cannot be read"),
    (["nonsense"], "nonsense"),
    (["hydra.run.dir=elsewhere"], "hydra.run.dir"),
    (["trainer.max_time=90"], "DD:HH:MM:SS"),
    (["model.head=foo"], "linear, mlp, append"),
    (["data.on_bad_image=ignore"], "data.on_bad_image=ignore"),
    (["data.batch_size=-8"], "data.batch_size=-8"),
    (["data.val_fraction=0.5", "data.test_fraction=0.5"], "data.test_fraction=0.5"),
    (["data.background=[0,0]"], "data.background=[0,0]"),
    (["data=image_folder"], "data.root is missing"),
    (["data=table"], "data.table is missing"),
    (["data=torchvision"], "data.name is missing"),
    (["data.name=CIFAR10"], "data.name=CIFAR10 has no effect"),
    (["checkpoint.monitor=val/accuracy"], "val/macro_f1"),
    (["freeze.phases={1:[head]}"], "epoch 0"),
    (["freeze.phases=3"], "freeze.phases=3"),
    (["model.head=append", "model.dropout=0.5"], "model.dropout=0.5"),
    (["optimizer.schedule=onecycle", "optimizer.warmup_fraction=0"], "optimizer.warmup_fraction=0"),
    (["data.batch_size=large"], "data.batch_size is a whole number from 1"),
    (["data.batch_size=2.5"], "data.batch_size=2.5"),
    (["checkpoint.select=swa"], "best, last, average_top_k, ema"),
    (["checkpoint.select=average_top_k", "checkpoint.top_k=1"], "checkpoint.top_k=1"),
    (["checkpoint.select=greedy_soup", "checkpoint.top_k=1"], "checkpoint.top_k=1"),
    (
        ["data.sampler=balanced", "data.class_weights=balanced"],
        "data.sampler=balanced does not go with data.class_weights",
    ),
    (["model.loss=logit_adjusted", "data.sampler=balanced"], "model.loss=logit_adjusted does not go with data.sampler"),
    (["model.loss=focal", "model.loss_options.gama=1"], "did you mean model.loss_options.gamma?"),
    (["data.mix_alpha=1"], "data.mix_alpha=1.0 has no effect with data.mix=none"),
    (["trainer.min_delta=0.1"], "trainer.min_delta=0.1 has no effect with trainer.patience=null"),
    (["task=regression", "data=table", "data.table=x", "data.mix=mixup"], "data.mix=mixup does not go with task"),
    (["checkpoint.every_n_minutes=0"], "checkpoint.every_n_minutes=0"),
    (["oom.policy=retry"], "split, stop"),
    (["oom.policy=stop", "oom.grow_after=5"], "oom.grow_after=5 has no effect"),
    (["freeze.preset=head_only", "freeze.lr_decay=0.8"], "freeze.lr_decay=0.8 has no effect"),
    (["freeze.lr_decay=2"], "freeze.lr_decay=2"),
    (["optimizer=sgd", "optimizer.momentum=1.5"], "optimizer.momentum=1.5 is out of range"),
    (["data=synthetic", "data.num_classes=1"], "data.num_classes=1 is out of range"),
    (["freeze.phases={-1:[head],0:[layer4]}"], "is not a schedule"),
    (["seed=0,1", "debug=true"], "python -m src.train -m seed=0,1 debug=true"),
    (["-m", "--cfg", "job", "seed=0,1"], "--cfg and --info are about one run"),
]


@pytest.mark.parametrize(
    ("words", "named"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_answered_in_one_screen(command, words, named):
    done = command("train", *words)
    check_error(done, 64, named)
    assert "use +" not in done.text  # Hydra's advice, which silences a typo
    assert done.out == ""


def test_an_installation_without_conf_says_so(command, tmp_path):
    (tmp_path / "src").symlink_to(shutil.copytree(ROOT / "src", tmp_path / "installed" / "src"))
    check_error(command("train", PYTHONPATH=str(tmp_path / "installed")), 64, "conf/ is missing", "pip install -e .")


def test_a_sweep_that_is_refused_leaves_no_folder(command, tmp_path):
    assert command("train", "-m", "name=s", "data.batch_size=0,-1").code == 64
    assert not (tmp_path / "runs" / "s").exists()
    (tmp_path / "runs" / "s" / "0").mkdir(parents=True)
    (tmp_path / "runs" / "s" / "0" / "result.json").touch()
    assert command("train", "-m", "name=s", "data.batch_size=0,-1").code == 64
    assert (tmp_path / "runs" / "s" / "0" / "result.json").exists()


def test_a_missing_folder_has_a_code_of_its_own(command):
    check_error(command("train", "data=image_folder", "data.root=nowhere"), 66, "data.root=nowhere does not exist")


def test_a_wrong_value_is_answered_with_the_one_that_stands_there(command):
    assert "python -m src.train optimizer.lr=0.003 seed=1" in command("train", "optimizer.lr=abc", "seed=1").err
    assert "python -m src.train debug=false" in command("train", "debug=maybe").err


def test_a_corrected_command_keeps_the_other_words(command):
    done = command("train", "seed=7", "data.batchsize=4", "name=a b")
    assert "python -m src.train seed=7 data.batch_size=4 'name=a b'" in done.err


@pytest.mark.needs("sweeps")
def test_hydra_hears_of_a_recipe_that_is_a_sweep_before_it_composes(command):
    """Hydra 1.4 refuses a recipe that sets hydra.mode by itself."""
    for words, mode in (["experiment=tune_head"], "MULTIRUN"), (["experiment=tune_head", "hydra.mode=RUN"], "RUN"):
        done = command("train", "--cfg", "hydra", "--package", "hydra.overrides.hydra", *words)
        assert done.out.splitlines()[1:] == [f"- hydra.mode={mode}"]


def test_nothing_that_is_deprecated_is_said(command):
    """Of the versions that are installed; scripts/test_matrix.py runs this with release candidates."""
    for words in (["--help"], ["lr=3"], ["experiment=tune_head", "hydra.sweeper.dry_run=true"]):
        said = command("train", *words, cold=True).text
        assert "eprecat" not in said
        assert "Warning" not in said


def test_mistakes_and_help_do_not_import_torch(command):
    """torch takes seconds: who mistypes a word, or asks for help, must not wait for it."""
    for words in (["data.batchsize=4"], ["model.head=foo"], ["--help"], ["--cfg", "job"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "src.train", *words],
            capture_output=True,
            text=True,
            env=command_environment(),
        )
        imported = {
            line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")
        }
        assert "hydra" in imported
        assert not imported & {"torch", "lightning", "torchvision", "numpy"}


def test_mistyped_keys_and_help_do_not_wait_for_hydra(monkeypatch, capsys):
    monkeypatch.setattr(command_line.hydra, "main", None)
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    command_line.run_hydra(lambda config: None)
    assert "python -m src.train --cfg job" in capsys.readouterr().out
    for word in ("data.batchsize=4", "lr=1", "trainer.foo=1", "optimizer.sgd=1"):
        monkeypatch.setattr(sys, "argv", ["train", word])
        with pytest.raises(UserError, match="is not a setting"):
            command_line.run_hydra(lambda config: None)


@pytest.mark.slow
def test_a_run_imports_no_library_that_it_does_not_use(tmp_path):
    """torchmetrics brings matplotlib and scipy, torchvision brings torch's compiler, whatever this project does."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "src.train", *SMALL, "trainer.max_epochs=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=command_environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "lightning" in imported
    unused = {"ray", "sklearn", "tensorboard", "torch.utils.tensorboard", "onnx", "pandas", "optuna", "timm"}
    assert not imported & unused


def test_help_says_what_there_is(command):
    done = command("train", "--help")
    assert done.code == 0
    assert max(len(line) for line in done.out.splitlines()) <= 97 + len("src")
    assert len(done.out.splitlines()) < 45
    for group in (folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"):
        line = next(line for line in done.out.splitlines() if line.strip().startswith(group.name + " "))
        offered = {word.strip() for word in line.strip().removeprefix(group.name).split("  ")[0:] if word}
        offered = {choice.strip() for part in offered for choice in part.split("|")}
        assert {file.stem for file in group.glob("*.yaml")} <= offered, f"--help does not list all of {group.name}"


@pytest.mark.parametrize("name", ["evaluate", "predict", of_room("export", "export")])
def test_the_other_commands_help_too(command, name):
    done = command(name, "--help")
    assert done.code == 0
    assert f"python -m src.{name} run=runs/NAME" in done.out
    assert command(name).code == 64


def test_evaluate_and_predict_answer_typos(command):
    check_error(command("evaluate", "rn=x"), 64, "did you mean run?")
    check_error(command("evaluate", "run=x", "data.batchsize=3"), 64, "did you mean data.batch_size?")
    check_error(command("evaluate", "split=test"), 64, "either run= or model= must be given")
    check_error(command("evaluate", "run=x", "optimizer.lr=1"), 64, "optimizer.lr is not a setting of src.evaluate")
    check_error(command("predict", "images=x"), 64, "either run= or model=")
    check_error(command("predict", "run=a", "model=b", "images=x"), 64, "either run= or model=")
    check_error(command("predict", "run=a"), 64, "images= is missing")


def test_every_yaml_key_has_a_comment_and_every_choice_composes():
    from tests.conftest import parses

    needs = {
        "image_folder": ["data.root=."],
        "table": ["data.table=x.csv"],
        "torchvision": ["data.name=CIFAR10"],
        "model_parallel_resnet50": ["strategy=model_parallel", "trainer.devices=2"],
        "model_parallel": ["model=model_parallel_resnet50", "trainer.devices=2"],
        "multilabel": ["data=table", "data.table=x.csv"],
        "regression": ["data=table", "data.table=x.csv"],
        "strategy/own": ["strategy.name=src.strategies.building.build_strategy"],
        "pipeline": ["model=model_parallel_resnet50", "trainer.devices=2"],
    }
    for file in CONF.glob("**/*.yaml"):
        if "hydra" in file.parts:
            continue
        for line in file.read_text().splitlines():
            is_key = ":" in line.partition("#")[0] and not line.lstrip().startswith(("#", "-"))
            opens_group = line.rstrip().endswith(":") or line.startswith("hydra:")
            in_recipe = file.parent.name == "experiment" or "{dir:" in line
            assert not is_key or opens_group or in_recipe or " # " in line, f"{file}: {line} has no comment"
        if file.parent != CONF:
            assert parses(
                [
                    f"{file.parent.name}={file.stem}",
                    *needs.get(file.stem, needs.get(f"{file.parent.name}/{file.stem}", [])),
                ]
            )


def test_the_yaml_files_and_the_schema_agree(monkeypatch, tmp_path):
    """Every knob of the schema stands in a YAML file, so that a reader of conf/ sees all there is."""
    keys = set()
    for file in CONF.glob("**/*.yaml"):
        if "hydra" in file.parts:
            continue
        group = "" if file.parent == CONF or file.read_text().startswith("# @package _global_") else file.parent.name
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        loaded.pop("defaults", None)
        loaded.pop("hydra", None)
        nested = {group: loaded} if group else loaded
        keys |= {
            f"{top}.{leaf}" if isinstance(value, dict) else top
            for top, value in nested.items()
            for leaf in (value if isinstance(value, dict) else [""])
        }
    groups = {key.partition(".")[0] for key in KNOBS if "." in key}
    missing = {key for key in KNOBS if key not in keys and key not in groups}
    assert not missing, missing


def test_conf_and_the_schema_have_the_same_defaults():
    """The schema's stand for keys that an older run's config.yaml lacks; conf/'s are those that a reader sees."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = config_checks.read(compose("train", ["data=image_folder", "data.root=."]))
    chosen.data.root = None
    for key in KNOBS:
        default = attrgetter(key)(config.Config())
        assert default == "???" or is_dataclass(default) or attrgetter(key)(chosen) == default, key


def test_a_warning_where_a_phase_is_never_reached(caplog):
    from src.models.freezing import FreezePlan
    from tests.engine.runs.small_training import Backbone

    FreezePlan.of(config.Freeze(preset="last_n", unfreeze_epoch=5), Backbone(), max_epochs=3)
    assert "never reached" in caplog.text


@pytest.mark.parametrize(
    "sweep", [[], of_room("sweeps", ["hydra/launcher=ray_tune"]), of_room("sweeps", ["hydra/sweeper=ray_tune"])]
)
def test_a_sweep_that_would_lead_out_of_runs_dir_writes_nothing(tmp_path, monkeypatch, sweep):
    """Hydra writes into the folder of a sweep before its first job is looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # so that it is as before afterwards
    monkeypatch.setattr("sys.argv", ["train", "-m", *sweep, "seed=0,1", "data=synthetic", "name=../x", "runs_dir=a/b"])
    with pytest.raises(UserError, match="leads out of runs_dir") as caught:
        command_line.run_hydra(lambda composed: pytest.fail("a job was run"))
    assert caught.value.code == ExitCode.CONFIG
    assert not any(tmp_path.iterdir())
