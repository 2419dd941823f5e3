"""trainer.on_nan: a loss or a gradient of nan or inf ends the run before the weights are spoilt, or comes to nothing."""

from __future__ import annotations

import json
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from src.engine.runs.checkpoint_selection import WeightAverage
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import write_json
from src.engine.runs.model_folder import save_model
from src.engine.runs.non_finite import FILE, NonFinite
from src.engine.runs.position import PositionCheckpoint
from src.engine.runs.reading import read_checkpoint
from src.engine.runs.run_settings import changed_settings
from src.engine.runs.writing import DurableCheckpointIO
from tests.conftest import SMALL, check_error
from tests.engine.runs.small_training import classifier, data, fit

INF = math.inf


class Inject(L.Callback):
    """In the steps, adds a number to the loss, or to a gradient."""

    def __init__(self, steps, number=math.nan, to="loss"):
        self.steps, self.number, self.to = steps, number, to

    def on_train_start(self, trainer, module):
        mean_loss = module.mean_loss

        def spoilt(logits, labels):
            loss = mean_loss(logits, labels)
            return loss + self._now(trainer) if self.to == "loss" else loss

        module.mean_loss = spoilt
        if self.to == "gradient":
            module.network.head.bias.register_hook(lambda gradient: gradient + self._now(trainer))

    def _now(self, trainer):
        return self.number if trainer.training and trainer.global_step + 1 in self.steps else 0.0


def train(folder, policy, *callbacks, epochs=2, resume=None, every_n_steps=None, model=None, **settings):
    """Four steps per epoch. Returns the module; raises what the run raises."""
    model = model or classifier(epochs)
    guard = [NonFinite(policy, folder)] if policy else []
    position = PositionCheckpoint(folder, every_n_steps)
    io = DurableCheckpointIO(background=False)
    fit(
        model,
        epochs,
        *guard,
        *callbacks,
        position,
        resume=resume,
        plugins=[io, *settings.pop("plugins", ())],
        **settings,
    )
    return model


def same(one, other) -> bool:
    return all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("policy", ["stop", "skip", "restore"])
def test_a_run_of_finite_numbers_is_the_same_to_the_bit(tmp_path, policy):
    (tmp_path / FILE).touch()
    runs = [train(tmp_path, guard, model=classifier(2, clip=1.0)) for guard in (policy, None)]
    assert same(*runs)
    assert not (tmp_path / FILE).read_text()


@pytest.mark.parametrize(
    ("inject", "said"),
    [
        (Inject([6]), "step 6: the loss is nan"),
        (Inject([6], INF), "step 6: the loss is inf"),  # of which cross-entropy has finite gradients
        (Inject([6], -INF, to="gradient"), "step 6: a gradient is inf (network.head.bias), the loss is "),
    ],
)
def test_stop_comes_before_the_weights_change_and_names_the_batch(tmp_path, inject, said):
    model = classifier(2)
    with pytest.raises(UserError) as error:
        train(tmp_path, "stop", inject, model=model, every_n_steps=1)
    text = error.value.render()
    assert error.value.code == ExitCode.DIVERGED == 77
    assert text.startswith(f"ERROR   {said}")
    module_data = data()
    module_data.train_dataloader()
    names = module_data.names_of_batch(1, 1)
    assert "epoch 2, batch 2 of 4; learning rate: backbone 0.00" in text
    assert f"images: {', '.join(names[:3])} and 2 more, listed in\n        {tmp_path / FILE}" in text
    assert (tmp_path / FILE).read_text().splitlines()[2:] == names
    assert f"trainer.on_nan=skip name={tmp_path.name} # goes on" in text
    saved = read_checkpoint(tmp_path / "last.ckpt")
    assert saved["global_step"] == 5
    parameters = dict(model.named_parameters())
    assert all(tensor.equal(saved["state_dict"][name]) for name, tensor in parameters.items())
    for fix in ("optimizer.lr=0.001", "trainer.on_nan=skip"):
        assert fix in text


@pytest.mark.parametrize("every_n_steps", [1, None])
def test_a_verdict_that_comes_a_step_later_as_on_a_gpu_is_the_same(tmp_path, monkeypatch, every_n_steps):
    """Nothing of the step is saved, and the loss of the last step of an epoch is known before the validation."""
    monkeypatch.setattr(NonFinite, "may_wait", lambda self, step: True)
    for step, saved in ((6, 5 if every_n_steps else 4), (8, 7 if every_n_steps else 4)):
        with pytest.raises(UserError, match=f"step {step}: the loss is nan"):
            train(tmp_path, "stop", Inject([step]), every_n_steps=every_n_steps)
        assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == saved


def test_the_repeated_command_meets_the_same_step(tmp_path):
    said = []
    for resume in (None, tmp_path / "last.ckpt"):
        with pytest.raises(UserError) as error:
            train(tmp_path, "stop", Inject([6]), every_n_steps=1, resume=resume)
        said.append(str(error.value))
    assert said == ["step 6: the loss is nan"] * 2


@pytest.mark.parametrize("policy", ["skip", "restore"])
def test_a_run_that_stopped_goes_on_with_another_policy_as_if_it_had_begun_so(tmp_path, policy):
    """In the middle of an epoch with skip, and at its beginning with restore. Its command may say so under the same name."""
    step, every_n_steps = (6, 1) if policy == "skip" else (5, None)
    with pytest.raises(UserError):
        train(tmp_path, "stop", Inject([step]), every_n_steps=every_n_steps)
    continued = train(tmp_path, policy, Inject([step]), resume=tmp_path / "last.ckpt")
    assert same(continued, train(tmp_path / "whole", policy, Inject([step])))
    assert changed_settings({"trainer.on_nan": "stop"}, {"trainer.on_nan": policy}) == {}
    assert changed_settings({"trainer.max_epochs": 2}, {"trainer.max_epochs": 3})


class Without(Inject):
    """The optimizer does nothing in the steps, and the module keeps its statistics: what skip is to come to."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = {name: tensor.clone() for name, tensor in module.named_buffers()}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step + 1 in self.steps:
            module.step_counts = False
            for parameter in module.parameters():
                parameter.grad = None
            for name, tensor in module.named_buffers():
                tensor.copy_(self.before[name])


@pytest.mark.parametrize("inject", [Inject([2, 3, 7]), Inject([2, 3, 7], INF, to="gradient")])
def test_skip_leaves_the_steps_out(tmp_path, caplog, inject):
    ema = WeightAverage(0.9)
    skipped = train(tmp_path, "skip", inject, ema)
    assert same(skipped, train(tmp_path, None, Without([2, 3, 7], 0.0)))
    assert all(tensor.isfinite().all() for tensor in ema.weights().values())
    assert math.isfinite(skipped.trainer.callback_metrics["train/loss"])
    assert "step 3: " in caplog.text
    assert "(2 in a row)" in caplog.text
    assert "steps that came to nothing: 3" in caplog.text


@pytest.mark.parametrize("policy", ["skip", "restore"])
def test_too_many_in_a_row_stop_also_where_a_restart_is_among_them(tmp_path, policy):
    inject = Inject([1, 2, 3, 4, 5, 6])
    with pytest.raises(UserError, match="step 5: the loss is nan, for the 5th time in a row") as error:
        train(tmp_path, policy, inject, every_n_steps=1)
    assert error.value.code == ExitCode.DIVERGED
    with pytest.raises(UserError, match="step 5: "):
        train(tmp_path, policy, inject, every_n_steps=1, resume=tmp_path / "last.ckpt")


def test_restore_goes_back_to_the_last_epoch_with_a_tenth_of_the_rate(tmp_path):
    class Look(L.Callback):
        def on_train_batch_end(self, trainer, module, *arguments):
            self.weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    at_four, at_six = Look(), Look()
    train(tmp_path, None, at_four, epochs=1, model=classifier(2))
    with pytest.raises(UserError):
        train(tmp_path, "stop", Inject([7]), at_six)
    undisturbed_rate = at_six.rate
    look = Look()

    class End(Exception):
        pass

    class EndAfter(L.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            if trainer.global_step == 6:
                raise End

    with pytest.raises(End):
        train(tmp_path, "restore", Inject([6]), look, EndAfter())
    assert all(look.weights[name].equal(tensor) for name, tensor in at_four.weights.items())
    assert look.rate == pytest.approx(0.1 * undisturbed_rate)


def test_a_restored_run_that_is_interrupted_goes_on_exactly(tmp_path):
    inject = [2, 7]
    undisturbed = train(tmp_path / "whole", "restore", Inject(inject), epochs=3)
    for ends_at in (3, 6, 7, 9):

        class Kill(L.Callback):
            def on_train_batch_start(self, trainer, *arguments, ends_at=ends_at):
                if trainer.global_step == ends_at:
                    raise KeyError("killed")

        with pytest.raises(KeyError):
            train(tmp_path, "restore", Inject(inject), Kill(), epochs=3, every_n_steps=1)
        continued = train(tmp_path, "restore", Inject(inject), epochs=3, resume=tmp_path / "last.ckpt")
        assert same(undisturbed, continued), ends_at


def test_an_update_that_overflows_is_not_saved(tmp_path):
    """Its gradients are finite; the position of the step before stays."""

    class Overflow(L.Callback):
        def on_train_batch_end(self, trainer, module, *arguments):
            if trainer.global_step == 3:
                with torch.no_grad():
                    module.network.head.weight[0, 0] = INF

    with pytest.raises(UserError, match=r"network\.head\.weight is not finite after step 3"):
        train(tmp_path, "stop", Overflow(), every_n_steps=1)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2


def test_fp16_leaves_gradients_to_its_loss_scale_and_a_loss_of_nan_is_an_error(tmp_path):
    settings = {"plugins": [MixedPrecision("16-mixed", "cpu")]}
    train(tmp_path, "stop", Inject([6], INF, to="gradient"), **settings)
    settings = {"plugins": [MixedPrecision("16-mixed", "cpu")]}
    with pytest.raises(UserError, match="step 6: the loss is nan") as error:
        train(tmp_path, "stop", Inject([6]), **settings)
    assert "precision=fp32" in error.value.render()
    settings = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))]}
    with pytest.raises(
        UserError, match="step 3: a gradient is inf"
    ):  # the scale is 2, 1 and then too small to be to blame
        train(tmp_path, "stop", Inject(range(1, 9), INF, to="gradient"), **settings)


def test_json_has_null_for_what_is_no_number(tmp_path):
    write_json(tmp_path / "x.json", {"a": [math.nan, 1.5, (INF,)], "b": {"c": -INF, "d": "nan"}, 3: True})
    strict = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert strict == {"a": [None, 1.5, [None]], "b": {"c": None, "d": "nan"}, "3": True}


@pytest.mark.parametrize("number", [math.nan, INF])
def test_no_model_is_packaged_with_such_weights(tmp_path, number):
    with pytest.raises(UserError, match="the weights to package are not finite: w") as error:
        save_model(tmp_path / "model", {"n": torch.ones(2), "w": torch.tensor([1.0, number])}, None)
    assert error.value.code == ExitCode.DIVERGED
    assert not (tmp_path / "model").exists()


def test_the_command(command, tmp_path):
    """A learning rate at which the weights explode."""
    words = (*SMALL, "name=x", "freeze.preset=full", "optimizer=sgd", "optimizer.lr=100", "data.image_size=32")
    done = command("train", *words, "data.batch_size=8", "trainer.max_epochs=4")
    check_error(done, 77, "the loss is ", "learning rate: backbone", "synthetic/", "name=x-2", "optimizer.lr=0.1")
    assert not (tmp_path / "runs/x/model").exists()
    for path in (tmp_path / "runs/x").rglob("*.json"):
        assert "NaN" not in path.read_text()
