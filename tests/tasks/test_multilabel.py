"""task=multilabel: what a label is, the split, the numbers against scikit-learn, thresholds, what is refused and written."""

from __future__ import annotations

import csv
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from src.config import Config, Data, Model
from src.data.sources import load_images
from src.engine.images.groups import Together
from src.engine.images.image_files import split_image_set
from src.engine.images.label_split import iterative_split
from src.engine.images.labelled_images import ImageSet, LabelledImages
from src.engine.images.splits import SplitSettings, choose_split
from src.engine.runs.errors import UserError
from src.engine.runs.files import write_csv
from src.engine.steps.label_metrics import best_threshold
from src.engine.steps.metrics import SplitMetrics
from src.models.losses import MultilabelLoss, positive_weights
from src.tasks.multilabel import Multilabel
from tests.conftest import check_error, write_images
from tests.tasks.shapes import NAMES as SHAPES
from tests.tasks.shapes import write_shapes

NAMES = ("cat", "dog", "tree")


def images(*texts: str, names: tuple[str, ...] = NAMES, **splits: list[int]) -> LabelledImages:
    """All in train, and in val, unless splits say otherwise."""
    splits = {"train": [*range(len(texts))], "val": [*range(len(texts))], "test": []} | splits
    labels = Multilabel().labels(texts, names)
    return LabelledImages(names, [f"{i}.png" for i in range(len(texts))], labels, splits, torch.zeros, texts=[*texts])


def drawn(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with ties and labels (number, 3); no image has the last label."""
    random = np.random.default_rng(seed)
    labels = random.random((number, 3)) < [0.5, 0.2, 0]
    logits = (random.normal(size=(number, 3)) + 2 * labels - 1).round(1)
    return torch.tensor(logits).float(), torch.tensor(labels).float()


def test_the_label_of_a_row_is_one_cell_or_several_columns():
    kind = Multilabel()
    assert kind.label_text({"label": " outdoor;cat ; ;cat;"}) == "cat;outdoor"
    assert kind.label_text({"label": " "}) == ""
    assert kind.label_text({"Dog": "1", "cat": "TRUE", "ox": " 0", "tree": "false"}) == "Dog;cat"
    for cell in ("", "2", "yes", "1.0", "-1"):
        with pytest.raises(ValueError, match=r"column dog: .* is not 0, 1, false or true"):
            kind.label_text({"cat": "1", "dog": cell})
    assert kind.names(["b;a", "", "c;a"]) == ("a", "b", "c")
    assert kind.names(["Dog", ""], ["Dog ", "cat"]) == ("Dog", "cat")  # one without an image too, for `check` to find
    assert kind.labels(["cat;tree", ""], NAMES) == [(1, 0, 1), (0, 0, 0)]
    with pytest.raises(KeyError):
        kind.labels(["cow"], NAMES)


@pytest.mark.parametrize("columns", [[], ["Cat", "dog"]])
def test_a_table_and_its_split_file_give_the_same_labels(tmp_path, columns):
    root = write_images(tmp_path / "p", {"a": 12}, size=8)
    own = [("Cat",), ("dog", "Cat"), (), ("dog",)] * 3
    cells = [
        ",".join(str(int(name in labels)) for name in ("Cat", "dog")) if columns else ";".join(labels) for labels in own
    ]
    rows = [f"a/{number:03d}.png,{cell}" for number, cell in enumerate(cells)]
    (root / "t.csv").write_text("\n".join([f"path,{'CAT,Dog' if columns else 'label'}", *rows]))
    data = Data(source="table", table=str(root / "t.csv"), label_columns=columns)
    found = load_images(data, Multilabel(), 0, cache_dir=tmp_path)
    assert found.classes == ("Cat", "dog")
    assert found.labels == [(1, 0), (1, 1), (0, 0), (0, 1)] * 3
    write_csv(tmp_path / "split.csv", *found.table())
    again = load_images(data, Multilabel(), 1, cache_dir=tmp_path, run_split=tmp_path / "split.csv")
    assert again.table() == found.table()
    (root / "t.csv").write_text((root / "t.csv").read_text().replace("000.png,", "000.png,x", 1))
    with pytest.raises(UserError):
        load_images(data, Multilabel(), 1, cache_dir=tmp_path, run_split=tmp_path / "split.csv")


def test_a_lost_combination_of_labels_is_no_lost_label(tmp_path):
    (tmp_path / "split.csv").write_text("path,label,split\na,cat,train\nb,dog,val\ngone,cat;dog,train\n")
    settings = SplitSettings(0, 0.2, 0.2, file=tmp_path / "split.csv")
    assert choose_split(["a", "b"], ["cat", "dog"], None, settings, kind=Multilabel())["train"] == [0]
    (tmp_path / "split.csv").write_text("path,label,split\na,cat,train\nb,dog,val\ngone,cat;ox,train\n")
    with pytest.raises(UserError, match="no image of class ox is left, of 1"):
        choose_split(["a", "b"], ["cat", "dog"], None, settings, kind=Multilabel())


def test_an_own_source_gives_texts_and_names():
    own = ImageSet("own", ("tree", "cat"), ["cat", "tree; cat", "", "tree"] * 5, torch.zeros)
    found = split_image_set(own, Multilabel(), SplitSettings(0, 0.2, 0.2))
    assert found.labels[:4] == [(0, 1), (1, 1), (0, 0), (1, 0)]
    with pytest.raises(UserError, match="1 label of the images: dog"):
        split_image_set(
            ImageSet("own", ("cat",), ["cat", "dog"], torch.zeros), Multilabel(), SplitSettings(0, 0.2, 0.2)
        )
    with pytest.raises(UserError, match="cannot be called 'a;b'"):
        split_image_set(ImageSet("own", ("a;b",), [""], torch.zeros), Multilabel(), SplitSettings(0, 0.2, 0.2))


@pytest.mark.parametrize("seed", range(8))
def test_every_label_has_its_share_of_every_split_and_copies_stay_together(seed):
    """Labels of 3 to 60 images, which occur together at random."""
    random = np.random.default_rng(seed)
    shares = np.linspace(0.03, 0.6, 20)
    labels = [frozenset(np.flatnonzero(row).astype(str)) for row in random.random((100, 20)) < shares]
    labels += [frozenset({"rare", "0", "5"})] * 3 + [frozenset({"pair"})] * 2 + [frozenset()] * 10
    copies = [str(number // 2) if 20 <= number < 30 else str(-number) for number in range(len(labels))]
    labels[20:30] = [labels[number // 2 * 2] for number in range(20, 30)]
    splits = iterative_split(labels, seed, 0.15, 0.15, copies)
    assert (
        splits
        == iterative_split(labels, seed, 0.15, 0.15, copies)
        != iterative_split(labels, seed + 1, 0.15, 0.15, copies)
    )
    assert sorted(chain(*splits.values())) == [*range(115)]
    for first in range(20, 30, 2):
        assert any({first, first + 1} <= {*members} for members in splits.values())
    for name in {*chain(*labels)}:
        groups = {copies[index] for index, own in enumerate(labels) if name in own}
        of_split = {
            split: {copies[index] for index in members if name in labels[index]} for split, members in splits.items()
        }
        assert of_split["train"]
        assert of_split["val"] or len(groups) == 1
        assert of_split["test"] or len(groups) < 3
        assert len(of_split["val"]) == pytest.approx(0.15 * len(groups), abs=6)
    assert len(splits["val"]) == pytest.approx(17, abs=3)


def test_a_group_is_dealt_out_with_all_labels_of_its_images():
    """10 groups of 4 images, three of which have one image with the rare label."""
    texts = ["rare;cat" if index in (1, 14, 27) else "cat" if index % 3 else "" for index in range(40)]
    groups = [str(index // 4) for index in range(40)]
    kind = Multilabel()
    dealt = Together(groups, strata=kind.strata).deal(kind.split, texts, 0, 0.2, 0.2)
    assert all(len({*members} & {1, 14, 27}) == 1 for members in dealt.values())
    assert all(
        {index // 4 * 4 + place for index in members for place in range(4)} == {*members} for members in dealt.values()
    )


def test_labels_that_cannot_be_learned_or_measured_are_refused():
    Multilabel().check(images("cat;dog", "tree", ""), "t.csv")
    for found, error in {
        "2 labels with no image in the train split: dog, tree": images("cat", "", "dog;tree;cat", train=[0, 1]),
        "1 label with every image of the train split: tree": images("cat;tree", "dog;tree"),
        "1 label with no image in the val split: dog": images("cat;dog", "tree", "cat", val=[1, 2]),
        "no image has a label": images("", "", names=()),
    }.items():
        with pytest.raises(UserError, match=found):
            Multilabel().check(error, "t.csv")


def test_what_an_owner_should_know_is_said():
    kind = Multilabel()
    many = images(*["cat;dog"] * 20, *["tree"] * 3, *[""] * 2, test=[0, 20])
    assert kind.described(many) == ["labels    cat 41, dog 41, tree 7", "          1.7 per image, 4 have none"]
    assert kind.warning(many).startswith("1 of 3 labels have fewer than 10 training images (tree 3)")
    assert "in none of its numbers: tree." in kind.warning(images(*["cat;dog;tree"] * 20, "cat;dog", test=[20]))
    assert "so cat,dog is one label" in kind.warning(images(*["cat,dog"] * 20, "", names=("cat,dog",)))
    assert kind.warning(images(*["cat;dog;tree"] * 20, "")) == ""


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # of the process without an image
@pytest.mark.parametrize("sizes", [(61,), (1, 60), (7,) * 8 + (5,)])
def test_metrics_are_those_of_scikit_learn(sizes):
    """Over batches of any size, in three processes of which the last has no image; no image has the last label."""
    logits, labels = drawn(61)
    kind = Multilabel()
    parts = [SplitMetrics(kind, NAMES, "val") for _ in range(3)]
    loss = kind.loss(Config(), NAMES, labels)
    for number, (outputs, own) in enumerate(zip(logits.split(sizes), labels.split(sizes), strict=True)):
        parts[number % 2].update(loss(outputs, own), outputs, own, loss.weight(own))
    metrics = [part.asking[""].metric for part in parts]
    shared: list[list[torch.Tensor]] = [[] for _ in metrics]
    for metric, own in zip(metrics, shared, strict=True):  # what torchmetrics would gather, in its order
        metric.sync(
            dist_sync_fn=lambda tensor, group, own=own: [own.append(tensor) or tensor],
            distributed_available=lambda: True,
        )
        metric.unsync()
    of_state = [list(tensors) for tensors in zip(*shared, strict=True)]
    assert all(len({tensor.ndim for tensor in tensors}) == 1 for tensors in of_state), "what gloo can gather"
    metrics[2].dist_sync_fn = lambda tensor, group: of_state.pop(0)
    metrics[2].distributed_available_fn = lambda: True
    found, predicted = metrics[2].compute(), (logits >= 0).float()
    assert found["macro_f1"] == pytest.approx(f1_score(labels[:, :2], predicted[:, :2], average="macro"))
    assert found["map"] == pytest.approx(average_precision_score(labels[:, :2], logits[:, :2]), abs=1e-7)
    assert found["subset_acc"] == pytest.approx((labels == predicted).all(1).double().mean())
    assert set(found) == {"macro_f1", "map", "subset_acc"}


def test_the_position_of_a_training_keeps_sums_only():
    logits, labels = drawn(30)
    train = SplitMetrics(Multilabel(), NAMES, "train")
    for part in (slice(0, 11), slice(11, 30)):
        train.update(torch.tensor(0.5), logits[part], labels[part], len(labels[part]))
    resumed = SplitMetrics(Multilabel(), NAMES, "train")
    resumed.resume({key: values[None] for key, values in train.sums().items()}, rank=0, world=1)
    resumed.update(torch.tensor(0.5), logits, labels, 30)
    train.update(torch.tensor(0.5), logits, labels, 30)
    assert resumed.compute() == train.compute()
    assert set(train.compute()) == {"loss", "macro_f1", "subset_acc"}


def test_the_loss_is_the_binary_cross_entropy_of_each_label():
    logits, labels = drawn(11)
    loss = MultilabelLoss()
    torch.testing.assert_close(loss(logits, labels), F.binary_cross_entropy(logits.sigmoid(), labels))
    parts = [loss(logits[part], labels[part]) * loss.weight(labels[part]) / 11 for part in (slice(0, 3), slice(3, 11))]
    torch.testing.assert_close(sum(parts), loss(logits, labels))
    assert loss(logits.half(), labels).dtype == torch.float32


def test_an_own_loss_gives_one_number_per_image(monkeypatch):
    logits, labels = drawn(11)
    model = Model(backbone="resnet18", loss="src.my_losses.mine", loss_options={"scale": 2})

    def mine(logits: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * (logits - labels).abs().sum(1)

    monkeypatch.setattr("src.engine.steps.task_kind.own_object", lambda key, name: mine)
    loss = Multilabel().loss(Config(model=model), NAMES, labels)
    torch.testing.assert_close(loss(logits, labels), 2 * (logits - labels).abs().sum(1).mean())
    assert loss.weight(labels) == 11


def test_positive_weights():
    labels = torch.zeros(100, 3)
    labels[:50, 0], labels[:20, 1], labels[:2, 2] = 1, 1, 1
    assert positive_weights(labels, "none") is None
    assert positive_weights(labels, "inverse").tolist() == [1, 4, 49]
    assert positive_weights(labels, "balanced").tolist() == [1, 4, 10]
    config = Config(model=Model(backbone="resnet18"), data=Data(source="table", class_weights="balanced"))
    found = Multilabel().loss(config, NAMES, labels)(torch.zeros(100, 3), labels)
    expected = sum((weight * count + 100 - count) / 300 for weight, count in ((1, 50), (4, 20), (10, 2)))
    assert float(found) == pytest.approx(expected * np.log(2))


def test_thresholds_are_chosen_for_f1_and_near_a_half():
    apart = torch.tensor([0.9, 0.8, 0.3, 0.2]), torch.tensor([1.0, 1, 0, 0])
    assert best_threshold(*apart) == 0.5
    assert best_threshold(apart[0] / 10, apart[1]) == pytest.approx(0.055)  # in the middle of the gap
    assert best_threshold(torch.full((4,), 0.2), apart[1]) == pytest.approx(0.1)  # ties: all or none
    for hopeless in (torch.zeros(4), torch.full((4,), float("nan"))):
        assert best_threshold(hopeless, apart[1]) == 0.5
    random = np.random.default_rng(0)
    labels = torch.tensor(random.random(400) < 0.2).float()
    probabilities = torch.tensor(0.3 * random.random(400)).float() + 0.3 * labels
    threshold = best_threshold(probabilities, labels)
    best = max(f1_score(labels, probabilities >= each) for each in probabilities)
    assert f1_score(labels, probabilities >= threshold) > best - 0.5 / labels.sum()
    assert f1_score(labels, probabilities >= 0.5) < best - 0.2


def test_the_task_chooses_thresholds_unless_one_is_given(caplog):
    caplog.set_level("INFO")
    labels = torch.tensor([[1.0, 1, 0]] * 4 + [[1, 0, 1]] * 6 + [[0, 0, 0]] * 10)
    logits = (labels - 0.5) * 4 - torch.tensor([2.5, 1.9, 0])
    kind = Multilabel()
    assert kind.predicted(logits).equal((logits >= 0).float())
    kind.tune(logits, labels)
    middle = float(torch.tensor([-4.5, -0.5]).sigmoid().mean())
    assert kind.thresholds(NAMES) == pytest.approx((middle, 0.5, 0.5))
    assert "chosen on val for the F1 of 2 labels" in caplog.text
    assert "; 0.5 for 1 label with fewer than 5 val images" in caplog.text
    assert Multilabel(values=kind.values).predicted(logits).equal(kind.predicted(logits))
    given = Multilabel(threshold=0.3)
    assert not given.tunes
    assert given.predicted(torch.tensor([[-0.8, -0.9, 0]])).tolist() == [[1, 0, 1]]
    assert given.row(NAMES, [0.3, 0.29, 0.9]) == ["cat;tree", "0.300000", "0.290000", "0.900000"]


def test_a_row_says_the_labels_and_what_comes_next():
    kind = Multilabel(values={"thresholds": (0.2, 0.9, 0.5)})
    rows = [kind.header(NAMES), kind.row(NAMES, [0.25, 0.8, 0.6]), kind.row(NAMES, [0.1, 0.2, 0.3])]
    assert [kind.shown(NAMES, row) for row in rows] == [
        ("labels", "probability", "next below its threshold"),
        ("tree, cat", "0.60 0.25", "dog 0.80"),
        ("none", "", "tree 0.30"),
    ]
    assert kind.reading(NAMES).endswith("(cat 0.2, dog 0.9, tree 0.5; task_values in model.json)")


def test_the_table_of_results_is_that_of_scikit_learn(tmp_path):
    logits, labels = drawn(50)
    kind = Multilabel(values={"thresholds": (0.3, 0.9999, 0.5)})
    kind.write(tmp_path / "labels.csv", NAMES, kind.kept(logits, labels))
    first, second, third = csv.DictReader((tmp_path / "labels.csv").open())
    predicted = kind.predicted(logits)
    for row, column in ((first, 0), (second, 1)):
        truth, told = labels[:, column], predicted[:, column]
        expected = [precision_score(truth, told, zero_division=0), recall_score(truth, told), f1_score(truth, told)]
        expected.append(average_precision_score(truth, logits[:, column]))
        assert [float(row[name] or 0) for name in ("precision", "recall", "f1", "ap")] == pytest.approx(
            expected, abs=1e-6
        )
        assert (int(row["images"]), int(row["predicted"])) == (truth.sum(), told.sum())
    assert (second["precision"], second["threshold"]) == ("", "0.9999")
    assert [third[name] for name in ("label", "images", "recall", "f1", "ap")] == ["tree", "0", "", "", ""]


@pytest.mark.needs("reports")
def test_the_report_shows_all_labels_or_the_worst(tmp_path):
    from src.engine.reports.report import write_report

    config = "data: {source: table, name: null, root: null, table: a.csv}\nmodel: {backbone: x}"
    from tests.engine.reports.test_report import Page  # apart: without the room, the linter wants another order

    (tmp_path / "config.yaml").write_text(config)
    logits, labels = drawn(50)
    Multilabel().write(tmp_path / "labels.csv", ("<cat>", "dog", "tree"), torch.cat([logits, labels], 1))
    page = Page(write_report(tmp_path))
    assert [row[0] for row in page.rows[-3:]] == ["<cat>", "dog", "tree"]
    assert page.rows[-1][1:3] == ["0", str(int((logits[:, 2] >= 0).sum()))]
    assert "F1 of the labels" in page.source
    rows = [f"label {number},3,3,1,1,{number / 40},1,0.5" for number in range(40)]
    (tmp_path / "labels.csv").write_text("\n".join(["label,images,predicted,precision,recall,f1,ap,threshold", *rows]))
    page = Page(write_report(tmp_path))
    assert [row[0] for row in page.rows[-10:]] == [f"label {number}" for number in range(10)]
    assert "The 10 of 40 with the lowest F1" in page.source


TABLE = ("task=multilabel", "data=table", "data.table=t.csv")
MISTAKES = [
    (["task=multilabel"], "task=multilabel does not go with data=digits", "data=table data.table="),
    (
        ["task=multilabel", "data=image_folder", "data.root=."],
        "does not go with data=image_folder",
        "data.root=. data.table=",
    ),
    (["task=multilabel", "data=torchvision", "data.name=CIFAR10"], "does not go with data=torchvision", "data=table"),
    ([*TABLE, "task.positive=cat"], "task.positive=cat has no effect", "task=binary"),
    ([*TABLE, "checkpoint.monitor=val/acc"], "checkpoint.monitor=val/acc does not go with", "monitor=val/macro_f1"),
    ([*TABLE, "data.label_columns=[cat,Cat]"], "names a column twice", "data.label_columns"),
    ([*TABLE, "task.threshold=1.5"], "task.threshold=1.5", "task.threshold="),
]


@pytest.mark.parametrize(("words", "found", "fix"), MISTAKES)
def test_a_setting_that_does_not_fit_is_refused(command, tmp_path, words, found, fix):
    (tmp_path / "t.csv").write_text("path,label\n")
    check_error(command("train", *words), 64, found, fix)


def test_a_wrong_cell_is_named_with_its_line(command, tmp_path):
    (tmp_path / "t.csv").write_text("path,cat,dog\na.png,1,0\nb.png,0,2\n")
    for name in "ab":
        (tmp_path / f"{name}.png").touch()
    check_error(command("train", *TABLE, "data.label_columns=[cat,dog]"), 65, "t.csv, line 3", "column dog: '2'")


def test_a_run_and_a_prediction_from_the_command_line(command, tmp_path):
    """Of a network that learns nothing: what is learned is in test_multilabel_runs.py."""
    write_shapes(tmp_path, 40)
    columns = f"data.label_columns=[{','.join(SHAPES)}]"
    words = ("task=multilabel", "data=table", "data.table=columns.csv", columns, "debug=true")
    network = (
        "model.backbone=shufflenet_v2_x0_5",
        "model.weights=none",
        "data.image_size=32",
        "model.label_smoothing=0.2",
    )
    done = command("train", *words, *network, "trainer.threads=1", "logger=csv", "name=quick")
    assert done.code == 0, done.text
    assert "images    40 with 3 labels: 28 train, 6 val, 6 test" in done.out
    assert "model.label_smoothing=0.2 has no effect with task=multilabel" in done.text
    assert (
        (tmp_path / "runs/quick/labels.csv")
        .read_text()
        .startswith("label,images,predicted,precision,recall,f1,ap,threshold")
    )
    done = command("predict", "model=runs/quick/model", "images=images/000.png")
    assert done.code == 0, done.text
    header = (tmp_path / "predictions.csv").read_text().splitlines()[0]
    assert header == "path,labels,probability_disc,probability_square,probability_stripes,error"
