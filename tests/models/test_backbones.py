from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import get_model, get_model_weights, regnet

from src.engine.runs.errors import ExitCode, UserError
from src.engine.weights.backbone_names import backbone_names, check_backbone_name, pretrained_preprocessing
from src.engine.weights.efficientnet_lite import build_efficientnet_lite0
from src.engine.weights.position_size import resampled
from src.engine.weights.preprocessing import Preprocessing
from src.engine.weights.shape_errors import try_size
from src.engine.weights.weights import load_pretrained
from src.models.backbones import blocks, build_backbone, remove_classifier

torch.set_num_threads(1)

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
TORCHVISION = torchvision.models.list_models(module=torchvision.models)


@pytest.fixture(scope="module", autouse=True)
def regnets_on_meta():
    """RegNet computes its widths with tensors, whose values are needed even where the parameters' are not."""
    original = regnet.BlockParams.from_init_params.__func__

    def on_cpu(cls, *args, **kwargs):
        with torch.device("cpu"):
            return original(cls, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regnet.BlockParams, "from_init_params", classmethod(on_cpu))
        yield


def on_meta(name: str, *, keep_classifier: bool = False) -> tuple[torch.nn.Module, int, int]:
    size = pretrained_preprocessing(name).image_size
    with torch.device("meta"):
        return *build_backbone(name, keep_classifier=keep_classifier, image_size=size), size


def test_names_are_lite0_and_torchvisions():
    names = backbone_names()
    assert names[0] == "efficientnet_lite0"
    assert {"resnet18", "vgg19", "vit_b_16", "convnext_tiny"} < set(names)
    assert not [name for name in names if "fasterrcnn" in name or "quantized" in name]


def of_each_family(name: str):
    """A case of the quick tier for one backbone of a family, and of the slow one for its larger relatives."""
    first = next(other for other in backbone_names() if re.split(r"[\d_]", other)[0] == re.split(r"[\d_]", name)[0])
    return name if name == first else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [of_each_family(name) for name in backbone_names()])
def test_every_backbone_gives_the_features_it_says(name):
    backbone, features, size = on_meta(name)
    with torch.no_grad():
        output = backbone.eval()(torch.zeros(2, 3, size, size, device="meta"))
    assert output.shape == (2, features)
    assert features != 1000


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "squeezenet1_1", "vit_b_32", "maxvit_t", "efficientnet_lite0"])
def test_a_kept_classifier_is_the_librarys_own(name):
    backbone, features, _ = on_meta(name, keep_classifier=True)
    assert features == 1000
    if name != "efficientnet_lite0":
        with torch.device("meta"):
            assert list(backbone.state_dict()) == list(get_model(name).state_dict())


def test_only_the_last_of_vggs_linear_layers_goes():
    backbone, features, _ = on_meta("vgg19")
    assert features == 4096
    assert [type(layer).__name__ for layer in backbone.classifier] == [
        "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Identity",
    ]  # fmt: skip


def test_of_several_classifiers_the_last_goes():
    with torch.device("meta"):
        network = get_model("googlenet", aux_logits=True, init_weights=False)
    remove_classifier(network)
    assert isinstance(network.fc, torch.nn.Identity)
    assert isinstance(network.aux1.fc2, torch.nn.Linear)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_inception_models_give_tensors_in_training_and_renormalise_as_their_weights_expect(name):
    backbone, features, size = on_meta(name)
    assert backbone.training
    assert backbone(torch.zeros(2, 3, size, size, device="meta")).shape == (2, features)
    assert backbone.transform_input


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_typo_is_answered_with_close_names():
    with pytest.raises(UserError) as caught:
        check_backbone_name("ResNet81")
    assert caught.value.code == ExitCode.CONFIG
    assert "resnet18" in caught.value.found
    assert caught.value.found.count(",") <= 4
    assert caught.value.fix[0].startswith("python -m src.train model.backbone=resnet")
    with pytest.raises(UserError, match="no backbone 'vit'; close to it: vit_b_16, "):  # a family and not a typo
        check_backbone_name("vit")
    with pytest.raises(UserError, match=r"no backbone 'zzzzzz'$") as caught:
        build_backbone("zzzzzz", keep_classifier=False, image_size=224)
    assert caught.value.fix == ["python -m src.train model.backbone=resnet18"]


def test_timm_is_asked_for_with_a_command(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else find_spec(name))
    with pytest.raises(UserError) as caught:
        check_backbone_name("timm/resnet18")
    assert caught.value.code == ExitCode.UNAVAILABLE
    assert caught.value.fix == ['pip install -e ".[timm]"']
    with pytest.raises(UserError) as caught:  # a name that only timm knows must not import it either
        check_backbone_name("vit_tiny_patch16_224")
    assert caught.value.code == ExitCode.CONFIG


@needs_timm
@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("timm/resnet81", "timm/resnet18"),
        ("timm/resnet18.a1_in2k", "timm/resnet18.a1_in1k"),
        ("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224"),
    ],
)
def test_unknown_timm_names_are_answered_with_close_ones(name, close):
    with pytest.raises(UserError) as caught:
        check_backbone_name(name)
    assert close in caught.value.found
    check_backbone_name(close)


# --- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCHVISION)
def test_preprocessing_is_the_one_of_the_default_weights(name):
    steps, ours = get_model_weights(name).DEFAULT.transforms(), pretrained_preprocessing(name)
    assert [ours.image_size] == steps.crop_size
    assert [ours.resize_size] == steps.resize_size
    assert ours.interpolation == steps.interpolation.value
    assert (list(ours.mean), list(ours.std)) == (steps.mean, steps.std)


def test_preprocessing_of_lite0_and_its_way_through_plain_values():
    ours = pretrained_preprocessing("efficientnet_lite0")
    assert (ours.image_size, ours.resize_size, ours.interpolation) == (224, 256, "bicubic")
    # TensorFlow's (x - 127) / 128 of x in 0..255
    assert (200 / 255 - ours.mean[0]) / ours.std[0] == pytest.approx((200 - 127) / 128)
    assert Preprocessing.from_dict(ours.to_dict()) == ours
    assert isinstance(ours.to_dict()["mean"], list)


@pytest.mark.parametrize(
    "wrong", [{"crop_ratio": 0.0}, {"image_size": 0}, {"interpolation": "lanczos"}, {"std": (1, 0, 1)}, {"mean": (0,)}]
)
def test_preprocessing_refuses_values_that_cannot_be_meant(wrong):
    values = pretrained_preprocessing("efficientnet_lite0").to_dict() | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Preprocessing.from_dict(values)


def test_preprocessing_needs_no_torch():
    code = "import sys, src.engine.weights.preprocessing; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@needs_timm
def test_a_timm_backbone_and_its_preprocessing():
    ours = pretrained_preprocessing("timm/resnet18.a1_in1k")
    assert (ours.image_size, ours.crop_ratio, ours.interpolation) == (224, 0.95, "bicubic")
    backbone, features, size = on_meta("timm/mobilenetv3_small_100")  # num_features 576, but 1024 behind its head
    assert features == 1024
    assert backbone.eval()(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 1024)
    assert on_meta("timm/test_resnet", keep_classifier=True)[1] == 1000


@needs_timm
def test_a_timm_backbone_without_classes_cannot_be_appended_to():
    with pytest.raises(UserError, match="no classifier"):
        on_meta("timm/vit_small_patch14_dinov2", keep_classifier=True)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_b_16", 96),
        ("vit_h_14", 98),
        ("maxvit_t", 224),
        pytest.param("timm/vit_tiny_patch16_224", 96, marks=needs_timm),
    ],
)
def test_a_size_that_patches_do_not_divide_is_answered_with_one_that_they_do(name, size):
    with torch.device("meta"), pytest.raises(UserError) as caught:
        build_backbone(name, keep_classifier=False, image_size=100)
    assert f"data.image_size={size}" in caught.value.fix[0]
    assert "100" in caught.value.where


@pytest.mark.parametrize(
    ("name", "own"), [("vit_b_32", 224), pytest.param("timm/vit_tiny_patch16_224", 224, marks=needs_timm)]
)
def test_a_transformer_takes_another_size_and_its_position_embeddings_are_resampled(name, own, tmp_path):
    trained, _ = build_backbone(name, keep_classifier=False, image_size=own)
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    backbone, features = build_backbone(name, keep_classifier=False, image_size=96)
    loaded = load_pretrained(backbone, name, str(tmp_path / "trained.pth"), keep_classifier=False, min_match=1.0)
    assert "positions, resampled to" in loaded.line
    assert not loaded.random
    assert backbone.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, features)


def test_embeddings_of_an_even_surface_stay_even_and_tokens_stay_as_they_are():
    value = torch.cat([torch.full((1, 2, 4), 9.0), torch.arange(4.0).expand(1, 49, 4)], 1)
    small = resampled(value, torch.empty(1, 2 + 9, 4))
    torch.testing.assert_close(small, torch.cat([value[:, :2], value[:, 2:11]], 1))
    assert resampled(value, torch.empty(1, 9, 4)) is None, "without tokens"
    ramp = torch.arange(8.0).repeat(8, 1).reshape(1, 64, 1)  # grows from left to right
    wide = resampled(ramp, torch.empty(1, 256, 1)).reshape(16, 16)
    assert (wide.diff(dim=1) > -0.1).all()
    assert wide.diff(dim=0).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "smallest"), [("inception_v3", 75), ("vgg11", 32), ("densenet121", 29), ("squeezenet1_0", 21)]
)
def test_a_size_that_is_too_small_is_refused_with_the_smallest_that_works(name, smallest):
    with torch.device("meta"):
        build_backbone(name, keep_classifier=False, image_size=smallest)
        with pytest.raises(UserError) as caught:
            build_backbone(name, keep_classifier=False, image_size=smallest - 1)
    assert f"the smallest it takes are {smallest} x {smallest}" in caught.value.found
    assert caught.value.fix[0] == f"python -m src.train model.backbone={name} data.image_size={smallest}"
    assert "layer '" in caught.value.why
    assert len(caught.value.render().splitlines()) <= 15


@pytest.mark.parametrize("name", ["squeezenet1_1", "densenet121", "googlenet", "mnasnet0_5"])
def test_the_dry_run_on_meta_agrees_with_the_real_network(name):
    backbone = get_model(name, **({"init_weights": False, "aux_logits": False} if name == "googlenet" else {})).eval()
    for size in (1, 8, 14, 15, 16, 17, 28, 29, 32):
        try:
            with torch.no_grad():
                backbone(torch.zeros(1, 3, size, size))
            works = True
        except RuntimeError:
            works = False
        assert (try_size(backbone, size).error is None) == works, size


def test_a_copy_of_an_mnasnet_takes_its_tensors_back_from_a_plain_dictionary():
    """As a checkpoint has them; torchvision's own class asks for the number of a version beside them."""
    backbone = copy.deepcopy(build_backbone("mnasnet0_5", keep_classifier=False, image_size=64)[0])
    changed = {name: tensor + 1 for name, tensor in backbone.state_dict().items()}
    backbone.load_state_dict(changed)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in backbone.state_dict().items())


def test_the_real_network_has_the_last_word(monkeypatch):
    """Some timm models do things that do not run on meta; they must not be refused for it."""
    original = torchvision.models.SqueezeNet.forward

    def forward(self, images):
        if images.is_meta:
            raise NotImplementedError("not on meta")
        return original(self, images)

    monkeypatch.setattr(torchvision.models.SqueezeNet, "forward", forward)
    backbone, features = build_backbone("squeezenet1_1", keep_classifier=False, image_size=32)
    assert features == 512
    assert backbone.training


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_classifier", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_lite0", "resnet18", "vgg11_bn", "efficientnet_b0", "densenet121", "vit_b_32", "swin_v2_t",
        "regnet_y_400mf", "maxvit_t", "mnasnet0_5", "googlenet", "convnext_tiny", "squeezenet1_0",
        pytest.param("timm/test_vit", marks=needs_timm), pytest.param("timm/convnext_atto", marks=needs_timm),
    ],
)  # fmt: skip
def test_every_parameter_belongs_to_exactly_one_block(name, keep_classifier):
    backbone, _, _ = on_meta(name, keep_classifier=keep_classifier)
    names = blocks(backbone)
    assert len(names) == len(set(names)) > 4
    for parameter, _ in backbone.named_parameters():
        owners = [block for block in names if parameter == block or parameter.startswith(block + ".")]
        assert len(owners) == 1, (parameter, owners)
    owned = {block for block in names if any((p + ".").startswith(block + ".") for p, _ in backbone.named_parameters())}
    assert owned == set(names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
        ("efficientnet_b0", [f"features.{i}" for i in range(9)]),
        ("vgg11", [f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)] + ["classifier.0", "classifier.3"]),
        (
            "efficientnet_lite0",
            ["_conv_stem", "_bn0", *(f"_blocks.{i}" for i in range(16)), "_conv_head", "_bn1"],
        ),
        (
            "vit_b_32",
            ["class_token", "conv_proj", "encoder.pos_embedding"]
            + [f"encoder.layers.encoder_layer_{i}" for i in range(12)]
            + ["encoder.ln"],
        ),
    ],
)
def test_blocks_are_named_as_people_know_them(name, expected):
    assert blocks(on_meta(name)[0]) == expected


# --- efficientnet_lite0 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [224, 97])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_folded_padding_gives_the_same_bits(size, layout):
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    folded = build_efficientnet_lite0(size)
    folded.load_state_dict(plain.state_dict())
    plain, folded = (model.eval().to(memory_format=layout) for model in (plain, folded))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    with torch.no_grad():
        assert torch.equal(plain(images), folded(images))
    pads = [sum(isinstance(layer, torch.nn.ZeroPad2d) for layer in model.modules()) for model in (plain, folded)]
    # 16 depthwise convolutions and the stem. On 224 five have a stride of 2 on an even size, which cannot be folded.
    assert pads == ([17, 5] if size == 224 else [17, pads[1]])
    assert pads[1] < pads[0]
