"""The README.md of a model/ folder, for whoever gets the folder: a model card (Mitchell et al., 2019, arXiv 1810.03993).

run.py writes it beside what save_model writes. It says what the run knows; nothing is left to be filled in by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path

from src.checkpoints.model_folder import ModelCard
from src.config import Config
from src.text import for_markdown

SHOWN_CLASSES = 20
_SIDES = {"center": "The shorter side is", "squash": "Both sides are", "border": "The longer side is"}

_LOADING = """\
In an environment with this project (`pip install -e .` in its checkout), from the folder that `model/` lies in:

```bash
python -m src.predict model=model/ images=FOLDER_OR_FILE
```

Or in Python; nothing is unpickled, so no code in the files can run:

```python
from pathlib import Path

import torch

from src.checkpoints.model_folder import load_model
from src.data.reading import read_image
from src.data.transforms import eval_transform
from src.models.building import rebuild
from src.models.losses import probabilities

card, state = load_model(Path("model"))
network = rebuild(card, state).eval()

image = read_image("image.jpg", card.read_options)  # uint8 (3, H, W)
images = eval_transform(card.preprocessing)(image).unsqueeze(0)  # uint8 (1, 3, S, S)
with torch.inference_mode():
    shares = probabilities(network(images), card.task)[0]
best = int(shares.argmax())
print(f"{card.classes[best]} {float(shares[best]):.3f}")
```
"""


def model_readme(
    card: ModelCard,
    config: Config,
    *,
    name: str,
    images: Mapping[str, int],
    weights: str,
    chosen: str,
    epochs: int,
    day: date,
) -> str:
    """The README.md, as Markdown.

    name: of the run. images: how many each split has. weights: the line that says what the backbone started from.
    chosen: whose weights these are, such as 'epoch 7'; epochs: how many were trained. day: when the training ended.
    """
    sections = {
        f"# {for_markdown(name)}": _summary(card, config, day),
        "## Data": _data(card, config, images),
        "## Metrics": _metrics(card.metrics),
        "## Training": _training(config, weights, chosen, epochs),
        "## Preprocessing": _preprocessing(card),
        "## Intended use and limits": _limits(card, config, images),
        "## How to load it": _LOADING,
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items())


def _summary(card: ModelCard, config: Config, day: date) -> str:
    return (
        f"A network that says which of {len(card.classes)} classes an image shows: {for_markdown(config.model.backbone)} with "
        f"a new head ({config.model.head}), trained on {day.isoformat()}. The weights are in `model.safetensors`, all "
        "else that is needed to use them in `model.json`."
    )


def _data(card: ModelCard, config: Config, images: Mapping[str, int]) -> str:
    data = config.data
    # Only the last part of a path: the rest of it says more about the author's disk than about the images.
    source = data.name or Path(data.table or data.root or "").name
    more = len(card.classes) - SHOWN_CLASSES
    return (
        f"Source: {data.source}{f', {for_markdown(source)}' if source else ''}.\n\n"
        f"{_table(['split', 'images'], images.items())}\n\n"
        f"Classes: {', '.join(map(for_markdown, card.classes[:SHOWN_CLASSES]))}"
        f"{f' and {more} more, which are in `model.json`' if more > 0 else ''}."
    )


def _metrics(metrics: Mapping[str, float]) -> str:
    """{"val/acc": 0.98, ...}: a row per split, a column per metric."""
    splits = list(dict.fromkeys(key.partition("/")[0] for key in metrics))
    names = list(dict.fromkeys(key.partition("/")[2] for key in metrics))
    return _table(
        ["split", *names], [[split, *(_cell(metrics.get(f"{split}/{name}")) for name in names)] for split in splits]
    )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _training(config: Config, weights: str, chosen: str, epochs: int) -> str:
    limit = config.trainer.limit_batches
    rows = {
        "backbone": config.model.backbone,
        "started from": weights,
        "epochs": f"{epochs} of {limit} batches each: a trial, not a training" if limit else epochs,
        "weights": f"those of {chosen} (checkpoint.select={config.checkpoint.select}, by {config.checkpoint.monitor})",
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.lr:g}, batch size {config.data.batch_size}",
        "augmentation": config.data.augment,
        "precision": config.precision.name,
        "seed": config.seed,
    }
    return _table(["", ""], rows.items())


def _preprocessing(card: ModelCard) -> str:
    steps, output = card.preprocessing, "a logit per class: softmax gives the probabilities"
    if card.task == "binary":
        output = f"one logit: its sigmoid is the probability of {for_markdown(card.classes[1])}"
    return (
        f"1. Turned upright (EXIF), 8 bits of RGB; transparent images are laid on the colour {card.background}.\n"
        f"2. {_SIDES[steps.crop_mode]} resized to {steps.resize_size} pixels ({steps.interpolation}, antialiased), and the "
        f"centre of {steps.image_size} x {steps.image_size} is cut out; where the image is smaller, a border of the "
        f"colour {steps.border} is added.\n"
        f"3. Inside the network: divided by 255, less mean {_numbers(steps.mean)}, by std {_numbers(steps.std)} "
        "(R, G, B).\n\n"
        f"The network takes uint8 (B, 3, {steps.image_size}, {steps.image_size}) and gives {output}."
    )


def _limits(card: ModelCard, config: Config, images: Mapping[str, int]) -> str:
    split = "test" if "test/acc" in card.metrics else "val"
    accuracy, count = card.metrics[f"{split}/acc"], images[split]
    low, high = _wilson(accuracy, count)
    chose = " (which also chose the weights, so it is a little too good)" if split == "val" else ""
    inherited = "" if config.model.weights == "none" else " The pretrained weights bring their own biases and licence."
    return (
        "It is meant for images like those it was trained on: from the same source, and of one of the classes above. "
        "It names a class for every image, also for one that shows none of them, and its probabilities were not "
        f"calibrated: a high one is no proof. Its accuracy of {accuracy:.3f} was counted on {count} {split} images"
        f"{chose}; over many more such images it lies between {low:.3f} and {high:.3f} (95 % interval, Wilson, 1927). "
        "With another camera, place or time it may be far lower: measure it there before you rely on it. Nobody has "
        "examined whether its errors fall on some people or things more than on others, so it must not decide about "
        f"people or safety.{inherited}"
    )


def _wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was counted on so many images; sensible for few of them and near 0 and 1."""
    z = 1.96
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header), *(map(for_markdown, row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
