"""Wrong commands, and the answer to each: the user's own command, corrected, with every other word kept."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.engine import features
from src.engine.commands import command_line, config_checks, word_checks
from src.engine.commands.command_line import translate
from src.engine.commands.config_checks import without_effect
from src.engine.commands.hydra_words import for_hydra
from src.engine.commands.stray_words import split
from src.engine.commands.suggestions import CONF
from src.engine.runs.errors import UserError
from tests.conftest import of_room, parses

OTHERS = ["model.head=mlp", "name=it's me (1)"]  # what must stand in every fix
WRONG = [  # the words, what the answer names, and the words of its first fix beside the others
    ("--batch-size 4", "did you mean data.batch_size=4?", "data.batch_size=4"),
    ("--lr=0.1 --epochs 5", "--lr=0.1 is not an option", "optimizer.lr=0.1 trainer.max_epochs=5"),
    ("-b 4", "-b is not an option", "data.batch_size=4"),
    ("--gpus 2 strategy=ddp", "trainer.devices=2", "trainer.devices=2 strategy=ddp"),
    ("--fp16", "precision=fp16", "precision=fp16"),
    ("--debug", "debug=true", "debug=true"),
    ("--pretrained --arch resnet50", "model.weights=default", "model.weights=default model.backbone=resnet50"),
    ("--device cuda", "trainer.accelerator=gpu", "trainer.accelerator=gpu"),
    ("\u2014m seed=1,2", "did you mean -m?", "-m seed=1,2"),
    ("--multrun seed=1,2", "did you mean --multirun?", "--multirun seed=1,2"),
    ("data.batch_size 4", "'data.batch_size' cannot be read", "data.batch_size=4"),
    ("data.batch_size = 4", "cannot be read", "data.batch_size=4"),
    ("data.batch_size= 4", "cannot be read", "data.batch_size=4"),
    ("data.batch_size =4", "cannot be read", "data.batch_size=4"),
    ("data.batch_size==4", "cannot be read", "data.batch_size=4"),
    ("data.batch_size:4", "cannot be read", "data.batch_size=4"),
    ("data.batch_size: 4", "cannot be read", "data.batch_size=4"),
    ("freeze.phases={0: [head], 2: [all]}", "cannot be read", "'freeze.phases={0:[head],2:[all]}'"),
    ("data=image_folder data.root=my photos", "'photos' cannot be read", "data=image_folder 'data.root=my photos'"),
    ("\"'seed=1'\"", "cannot be read", "seed=1"),
    ("sgd", "'sgd' cannot be read", "optimizer=sgd"),
    ("debug", "'debug' cannot be read", "debug=true"),
    ("somewhere", "'somewhere' cannot be read", "data=image_folder data.root=somewhere"),
    ("freeze=head_only", "freeze is a section; did you mean freeze.preset=head_only?", "freeze.preset=head_only"),
    ("trainer=gpu", "did you mean trainer.accelerator=gpu?", "trainer.accelerator=gpu"),
    ("trainer=ddp trainer.devices=2", "did you mean strategy=ddp?", "strategy=ddp trainer.devices=2"),
    ("checkpoint=best", "did you mean checkpoint.select=best?", "checkpoint.select=best"),
    ("model=resnet50", "did you mean model.backbone=resnet50?", "model.backbone=resnet50"),
    ("optimizer=1", "did you mean optimizer.lr=1?", "optimizer.lr=1"),
    ("optimizer=adam", "did you mean optimizer=adamw?", "optimizer=adamw"),
    ("precision=16", "did you mean precision=fp16?", "precision=fp16"),
    ("logger=none", "did you mean logger=csv?", "logger=csv"),
    ("memory=false", "did you mean memory.log=false?", "memory.log=false"),
    ("data=somewhere", "did you mean data=image_folder data.root=somewhere?", "data=image_folder data.root=somewhere"),
    ("dataset=somewhere", "did you mean data?", "data=image_folder data.root=somewhere"),
    ("seed=abc", "seed is a whole number, and 'abc' is not", "seed=0"),
    ("seed=", "seed is a whole number", "seed=0"),
    ("trainer.num_nodes=two", "trainer.num_nodes is a whole number", "trainer.num_nodes=1"),  # and not =true
    ("seed=1.5", "seed is a whole number, and '1.5' is not", "seed=0"),
    ("optimizer.lr=high", "optimizer.lr is a number, and 'high' is not", "optimizer.lr=0.003"),
    ("freeze.last_n=true", "freeze.last_n is a whole number", "freeze.last_n=12"),
    ("debug=maybe", "debug is true or false", "debug=false"),
    ("data.image_size=[1", "cannot be read", "data.image_size=64"),
    ("resume=false", "resume=false is not a choice", "resume=never"),
    ("data.batch_size=0", "data.batch_size=0 is out of range", "data.batch_size=32"),
    ("optimizer.lr=-1", "optimizer.lr=-1.0 is out of range", "optimizer.lr=0.001"),
    ("trainer.gradient_clip=-1", "trainer.gradient_clip=-1.0 is out of range", "trainer.gradient_clip=1.0"),
    ("data.num_images=0 data=synthetic", "data.num_images=0 is out of range", "data.num_images=240 data=synthetic"),
    ("data=image_folder data.root=", "data.root= has no value", "data=image_folder data.root=photos/"),
    ("+seed=3", "+seed adds a setting that exists", "seed=3"),
    ("~data.root", "~data.root takes a setting away", "data.root=null"),
    ("optimzer.lr=1", "did you mean optimizer.lr?", "optimizer.lr=1"),
    of_room("pipeline", "optimizer.scheduler=1f1b", "did you mean strategy.schedule?", "strategy.schedule=1f1b"),
    ("+data.batchsize=4", "did you mean data.batch_size?", "data.batch_size=4"),
    ("runs_dir=${sede}", "${sede} is not a setting; did you mean ${seed}?", "'runs_dir=${seed}'"),
    ("seed=0,1", "seed has several values", "-m seed=0,1"),
    ("hydra.run.dir=a/b", "hydra.run.dir has no effect", "runs_dir=a/b"),
    ("hydra.job.chdir=true", "hydra.job.chdir=true does not go", ""),
    ("hydra.sweep.dir=x", "hydra.sweep.dir has no effect without -m", "-m hydra.sweep.dir=x"),
    ("-m hydra.sweep.dir=/tmp/x", "hydra.sweep.dir=/tmp/x leads out of runs_dir", "-m runs_dir=/tmp/x"),
    ("-m hydra.sweep.subdir=../x", "hydra.sweep.subdir=../x leads out of runs_dir", "-m"),
    of_room("sweeps", "experiment=tune_hea", "did you mean experiment=tune_head?", "experiment=tune_head"),
    of_room("sweeps", "experiment=tune_head,tune_finetune", "would run tune_head and", "experiment=tune_head"),
    ("experiment=null", "experiment=null is not a choice", ""),
    ("data.background=1,2,3", "data.background has several values", "'data.background=[1,2,3]'"),
    ("seed=1e3", "seed is a whole number", "seed=1000"),
    ("' seed=1'", "cannot be read; did you mean seed?", "seed=1"),
    ("-m runs_dir=a,b seed=0,1", "runs_dir has several values", "-m runs_dir=a seed=0,1"),
    of_room("sweeps", "-m experiment=tune_head,tune_finetune", "would run tune_head and", "-m experiment=tune_head"),
    of_room("sweeps", "-m hydra/launcher=basic,ray_tune", "hydra/launcher has several values", "-m hydra/launcher=basic"),
    ("data.root=somewhere", "has no effect with data=digits", "data=image_folder data.root=somewhere"),
    ("optimizer.momentum=0.9", "does not go with optimizer=adamw", "optimizer=sgd optimizer.momentum=0.9"),
    ("checkpoint.ema_decay=0.9", "has no effect with checkpoint.select=best", "checkpoint.select=ema checkpoint.ema_decay=0.9"),
    ("checkpoint.monitor=val/accuracy", "is not a choice", "checkpoint.monitor=val/acc"),
    ("trainer.devices=2", "strategy=single does not go with trainer.devices=2", "trainer.devices=1"),
    of_room("pipeline", "strategy=pipeline", "needs a network that is split", "strategy=pipeline"),
    ("--no-debug", "did you mean debug=false?", "debug=false"),
    ("--no-pretrained", "did you mean model.weights=none?", "model.weights=none"),
    ("--cpu", "did you mean trainer.accelerator=cpu?", "trainer.accelerator=cpu"),
    ("--gpus all strategy=ddp", "did you mean trainer.devices=auto?", "strategy=ddp trainer.devices=auto"),
    ("--device cuda:1", "did you mean trainer.accelerator=gpu?", "trainer.accelerator=gpu"),
    ("--root somewhere", "did you mean data=image_folder", "data=image_folder data.root=somewhere"),
    ("root=somewhere", "did you mean data.root?", "data=image_folder data.root=somewhere"),
    ("images somewhere", "'images' cannot be read", "data=image_folder data.root=images"),
    ("python -m src.train seed=1", "src.train stands twice", "seed=1"),
    ("resume=somewhere/last.ckpt", "is not a choice: resume is auto or never", "name=somewhere"),
    ("--resume somewhere", "did you mean name=somewhere?", "name=somewhere"),
    ("seed=1 ''", "'' cannot be read", "seed=1"),
    ("data:batch_size=4", "did you mean data.batch_size?", "data.batch_size=4"),
    ("labels.csv", "'labels.csv' cannot be read", "data=table data.table=labels.csv"),
    ("data=image_folder data.root=my images", "'images' cannot be read", "data=image_folder 'data.root=my images'"),
    ("optimizer.lr=0,001", "optimizer.lr has several values", "optimizer.lr=0.001"),
    ("optimizer.lr=1e-3,", "cannot be read", "optimizer.lr=1e-3"),
    ("trainer.devices=0,1", "trainer.devices has several values", "'trainer.devices=[0,1]' strategy=ddp"),
    ("data.image_size=224x224", "is a whole number, and '224x224' is not", "data.image_size=224"),
    ("trainer.accelerator=cuda", "trainer.accelerator=cuda is not a choice", "trainer.accelerator=gpu"),
    ("data.augment=true", "data.augment=true is not a choice", "data.augment=standard"),
    ("model.name=resnet50", "did you mean model.backbone?", "model.backbone=resnet50"),
    ("optimizer.name=sgd", "does not go with optimizer=sgd", "optimizer=sgd optimizer.momentum=0.9"),
    ("strategy.sync_batchnorm=true", "has no effect with strategy=single", "strategy=ddp oom.policy=stop"),
    ("runs_dir=${HOME}", "did you mean ${oc.env:HOME}?", "'runs_dir=${oc.env:HOME}'"),
    ("-m optimizer=sgd,adam", "did you mean optimizer=sgd,adamw?", "-m optimizer=sgd,adamw"),
    ("-m model=resnet18,resnet50", "did you mean model.backbone=", "-m model.backbone=resnet18,resnet50"),
    ("-m optimizer.lr=1e-3, 3e-3", "'3e-3' cannot be read", "-m optimizer.lr=1e-3,3e-3"),
    ("strategy=ddp trainer.devices=4 data.batch_size=2", "is smaller than", "strategy=ddp trainer.devices=4 data.batch_size=4"),
]  # fmt: skip


def answer(words: list[str]) -> UserError:
    """What src.train says of the words before it imports torch."""
    try:
        word_checks.check_words(words)
        sweep = word_checks.is_sweep(words)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("train", overrides=for_hydra(split(words)[1], multirun=sweep))
        config_checks.read(composed)
    except (HydraException, OmegaConfBaseException) as error:
        return translate(error)
    except UserError as error:
        return error
    raise AssertionError(f"{words} is right")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for name in ("somewhere", "images", "my images"):
        Path(name).mkdir()
    for file in ("labels.csv", "somewhere/config.yaml", "somewhere/last.ckpt"):
        Path(file).touch()
    features.register()
    OmegaConf.register_new_resolver("sweep_name", lambda name, _: name or "sweep", replace=True)


@pytest.mark.parametrize(("typed", "named", "fixed"), WRONG, ids=[getattr(one, "values", one)[0] for one in WRONG])
def test_the_fix_is_the_command_corrected(typed, named, fixed, monkeypatch):
    words = [*(shlex.split(typed) if "{" not in typed or "$" in typed else typed.split()), *OTHERS]
    monkeypatch.setenv("TRAIN_COMMAND", shlex.join(["python", "-m", "src.train", *words]))
    error = answer(words)
    assert named in error.found
    assert len(error.render(Path("trace")).splitlines()) <= 15
    for place, line in enumerate(error.fix):
        command = shlex.split(line, comments=True)
        assert command[:3] == ["python", "-m", "src.train"], line
        assert set(OTHERS) <= set(command), f"{line} lost a word"
        assert "..." not in line
        if not (set(command) & {"-m", "--multirun"}):
            assert parses(command[3:]), line
        if place == 0:
            wanted = shlex.split(fixed)
            assert set(wanted) <= set(command), f"{line} lacks {wanted}"
            kept = [word for word in command[3:] if word in words]
            assert [word for word in words if word in kept] == kept, "in another order"


@pytest.mark.parametrize("word", ["nonsense", "help", "--foo 3", "=3", "new.key=1", "optimizer.lr=\u201c1\u201d"])
def test_what_nothing_is_near_to_is_answered_with_help_or_a_value(word, monkeypatch):
    monkeypatch.setenv("TRAIN_COMMAND", f"python -m src.train {word}")
    error = answer(word.split())
    assert error.fix[0] in ("python -m src.train --help", "python -m src.train optimizer.lr=0.003")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.hidden=64"], "model.hidden=64 has no effect with model.head=linear"),
        (["model.min_match=0.5"], "model.min_match=0.5 has no effect with model.weights=default"),
        (["data.on_bad_image=skip"], "data.on_bad_image=skip has no effect with data=digits"),
        (["data.background=[0,0,0]", "data=synthetic"], "has no effect with data=synthetic"),
        (["freeze.preset=full", "freeze.last_n=3"], "freeze.last_n=3 has no effect with freeze.preset=full"),
        (["freeze.phases={0:[head]}", "freeze.unfreeze_epoch=3"], "freeze.unfreeze_epoch=3 has no effect"),
        (["freeze.phases={0:[head]}", "freeze.preset=full"], "freeze.preset=full has no effect with freeze.phases"),
        (
            ["freeze.preset=head_only", "optimizer.backbone_lr_scale=0.5"],
            "optimizer.backbone_lr_scale=0.5 has no effect",
        ),
        (["freeze.batchnorm=keep", "freeze.batchnorm_momentum=0.5"], "freeze.batchnorm_momentum=0.5 has no effect"),
        (["logger.project=x"], "logger.project=x has no effect with this logger"),
        (["logger=wandb", "logger.tracking_uri=x"], "logger.tracking_uri=x has no effect"),
        (["logger.offline=true"], "logger.offline=true has no effect"),
        (["resume=never"], "resume=never has no effect with name=null"),
        (
            ["data=image_folder", "data.root=.", "data.split_file=labels.csv", "data.val_fraction=0.3"],
            "data.val_fraction",
        ),
        (
            ["checkpoint.select=last", "checkpoint.top_k=3"],
            "checkpoint.top_k=3 has no effect with checkpoint.select=last",
        ),
        (["memory.log=false", "memory.history=true"], "memory.history=true has no effect with memory.log=false"),
        (["debug=true", "trainer.max_epochs=5"], "trainer.max_epochs=5 has no effect with debug=true"),
        (["optimizer.backbone_lr_scale=0"], "the backbone learns nothing"),
        (["debug=true", "trainer.limit_batches=5"], "trainer.limit_batches=5 has no effect with debug=true"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_that_nothing_reads_is_said(words, named, monkeypatch, caplog):
    monkeypatch.setenv("TRAIN_COMMAND", shlex.join(["python", "-m", "src.train", *words]))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        said = without_effect(config_checks.read(compose("train", overrides=words)))
    assert len(said) == 1
    assert named in said[0]
    assert not caplog.messages, "each process of a run and each trial of a sweep reads the config"


def test_a_sweep_says_once_what_has_no_effect(caplog):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", overrides=["model.hidden=64"])
    command_line.check(composed)
    command_line.check(composed)
    assert len(caplog.messages) == 1
    assert "model.hidden=64 has no effect" in caplog.text


def test_the_ready_configs_have_no_setting_without_effect():
    for words in (
        [],
        ["experiment=linear_probe"],
        ["experiment=finetune_all"],
        ["logger=wandb"],
        ["data=synthetic"],
        ["experiment=finetune_all", "debug=true"],
    ):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            assert without_effect(config_checks.read(compose("train", overrides=words))) == []


def test_a_key_given_twice_is_said(caplog):
    word_checks.check_words(["seed=1", "seed=2", "name=a", "name=a"])
    assert caplog.messages == ["seed is given twice: seed=1 has no effect, seed=2 counts."]


def test_options_may_stand_between_settings():
    assert split(["seed=1", "-m", "--cfg", "job", "a=1"]) == (["-m", "--cfg", "job"], ["seed=1", "a=1"])
    assert word_checks.is_sweep(["seed=1", "-m"])
    assert not word_checks.is_sweep(["experiment=linear_probe"])


@pytest.mark.needs("sweeps")
def test_a_recipe_may_be_a_sweep():
    assert word_checks.is_sweep(["experiment=tune_head"])
    assert not word_checks.is_sweep(["experiment=tune_head", "hydra.mode=RUN"])


@pytest.mark.parametrize("name", ["../x", "..", ".", "/tmp/x", "a/../../b"])
def test_a_name_stays_in_runs_dir(name, monkeypatch):
    monkeypatch.setenv("TRAIN_COMMAND", shlex.join(["python", "-m", "src.train", f"name={name}"]))
    error = answer([f"name={name}"])
    assert "leads out of runs_dir" in error.found
    assert parses(shlex.split(error.fix[0])[3:])


def test_the_environment_is_as_before():
    assert "TRAIN_COMMAND" not in os.environ


@pytest.mark.needs("pipeline")
def test_a_setting_that_does_not_take_the_value_is_not_meant(monkeypatch):
    """optimizer.schedule and strategy.schedule are alike, but their choices are not."""
    monkeypatch.setenv("TRAIN_COMMAND", "python -m src.train optimizer.scheduler=plateau")
    assert answer(["optimizer.scheduler=plateau"]).fix == ["python -m src.train optimizer.schedule=plateau"]
