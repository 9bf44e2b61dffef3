"""Every recipe of the README, and the site's script, trains an encoder whose outputs are far from unit length, as a
final BatchNorm makes them.

The calls are taken from the README's text; a row that shows keywords only is completed here. A new row fails a test.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import contrastive_ext as ce
from bench.device import Device
from bench.digits import FEATURES, augment, load, new_encoder, probe
from repository import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = README.split("| you have | call |\n|---|---|\n")[1].split("\n\n")[0]
ROWS = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", TABLE, re.MULTILINE))
START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
SCRIPT = START.split("## One import in a training script")[1].split("```python\n")[1].split("```")[0]
STEPS, BATCH = 30, 128


@dataclass
class Training:
    """What a training loop holds beside the batch: an encoder, its average, whatever a recipe keeps between steps."""

    encoder: nn.Module
    average: nn.Module
    queue: ce.NegativeQueue = field(default_factory=lambda: ce.NegativeQueue(3 * BATCH, FEATURES))
    scale: ce.LogitScale = field(default_factory=lambda: ce.LogitScale(0.2))
    temperature: Tensor = field(default_factory=lambda: torch.tensor(0.3, requires_grad=True))

    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(augment(x)), self.encoder(augment(x))

    def shown(self, row: str, **names) -> Tensor:
        """The value of the call that the README shows in the row."""
        (call,) = re.findall(r"`(fused_\w+\(.+?\))`", ROWS[row])
        return eval(call, vars(ce) | {"torch": torch} | names)


def simclr(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    z1, z2 = training.views(x)
    return training.shown("SimCLR / NT-Xent", z1=z1, z2=z2)


def clip(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    image, text = training.views(x)
    return training.shown("CLIP", image=image, text=text, scale=training.scale)


def moco(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    q, k = training.encoder(augment(x)), training.average(augment(x))
    loss = training.shown("MoCo", q=q, k=k, queue=training.queue)
    training.queue.enqueue(k)
    return loss


def soft_labels(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    view, other = augment(x), augment(x)
    mixed, perm, theta = ce.momentum_mixup(view, other)
    q, k, q_mix = training.encoder(view), training.average(other), training.encoder(mixed)
    row = "MoCo with soft labels (SANE)"
    loss = training.shown(row, q=q, k=k, queue=training.queue, q_mix=q_mix, perm=perm, theta=theta)
    training.queue.enqueue(k)
    return loss


def sentence_pairs(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    a, b = training.views(x)
    return training.shown("sentence pairs (MNRL)", a=a, b=torch.cat([b, training.encoder(augment(x.flip(3)))]))


def every_direction(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    a, b = training.views(x)
    return training.shown("sentence pairs in every direction", a=a, b=b)


def prefixes(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    z1, z2 = training.views(x)
    return training.shown("an embedding that may be cut off (Matryoshka)", z1=z1, z2=z2)


def hard_negatives(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    z1, z2 = training.views(x)
    return ce.fused_infonce_loss(z1, z2, layout="one_way", negatives=training.encoder(augment(x.flip(3))))


def learned_temperature(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    return ce.fused_infonce_loss(*training.views(x), temperature=training.temperature)


def known_false_negatives(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    loss = ce.fused_debiased_loss(*training.views(x), ids=labels, queue=training.queue)
    training.queue.enqueue(training.average(x), labels)
    return loss


def guided(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    guide = x.flatten(1), x.flatten(1)
    return ce.fused_infonce_loss(*training.views(x), guide=ce.Guide(*guide, margin=0.05, relative=True))


def false_negatives(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    z1, z2 = training.views(x)
    return training.shown("false negatives to be found", z1=z1, z2=z2)


def sampled(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    """Other images' views as negatives that were drawn with probability 1/2."""
    (call,) = re.findall(r"`negatives=(Columns\(.+?\))`", ROWS["sampled negatives (logQ correction)"])
    log_q = torch.full((len(x),), 0.5).log()
    columns = eval(call, vars(ce) | {"x": training.encoder(augment(x.flip(3))), "log_q": log_q})
    return ce.fused_infonce_loss(*training.views(x), layout="one_way", negatives=columns)


def mined(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    """Documents of other classes that are closest to a query, again as its negatives."""
    queries, documents = training.views(x)
    shown = ROWS["hard negatives to be mined, an encoder to be judged"]
    (call,) = re.findall(r"`(top_columns\(.+?\))`", shown)
    positives = torch.arange(len(x))
    names = {"queries": queries, "documents": documents, "k": 4}
    found = eval(call.replace("positives=...", "positives=positives"), vars(ce) | names | {"positives": positives})
    negatives = documents[found.columns]
    assert 0 <= ce.recall_at_k(queries, documents, positives)[1] <= 1
    return ce.fused_infonce_loss(queries, documents, layout="one_way", negatives=negatives)


def several_processes(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    return ce.fused_infonce_loss(*training.views(x), group=dist.group.WORLD)


def many_positives(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    z1, z2 = training.views(x)
    views = torch.stack([training.encoder(augment(x)), z2])
    return training.shown("many positives per image (DCL with M > 1)", z1=z1, z2=z2, views=views)


def larger_than_memory(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    (call,) = re.findall(r"`(GradientCache\(.+?)`", ROWS["a batch larger than the encoder's memory"])
    return eval(call, vars(ce) | {"encoder": training.encoder, "x1": augment(x), "x2": augment(x)})


def script(training: Training, x: Tensor, labels: Tensor) -> Tensor:
    z1, z2 = training.views(x)
    logger = SimpleNamespace(log=lambda numbers: None)
    names = {"encoder": training.encoder, "x1": augment(x), "x2": augment(x), "z1": z1, "z2": z2}
    scope = names | {"logger": logger, "torch": torch}
    exec(SCRIPT, scope)
    return scope["loss"]


RECIPES: dict[str, Callable[[Training, Tensor, Tensor], Tensor]] = {
    "SimCLR / NT-Xent": simclr,
    "CLIP": clip,
    "MoCo": moco,
    "MoCo with soft labels (SANE)": soft_labels,
    "sentence pairs (MNRL)": sentence_pairs,
    "sentence pairs in every direction": every_direction,
    "explicit hard negatives": hard_negatives,
    "a learned temperature": learned_temperature,
    "an embedding that may be cut off (Matryoshka)": prefixes,
    "false negatives you know of": known_false_negatives,
    "a model that knows better (GISTEmbed)": guided,
    "false negatives to be found": false_negatives,
    "sampled negatives (logQ correction)": sampled,
    "hard negatives to be mined, an encoder to be judged": mined,
    "several processes (DistributedDataParallel)": several_processes,
    "a batch larger than the encoder's memory": larger_than_memory,
    "many positives per image (DCL with M > 1)": many_positives,
    "the training script": script,
}


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_recipe_is_here() -> None:
    assert [*ROWS, "the training script"] == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(name: str, _one_rank: None) -> None:
    images, labels = load(Device("cpu"))
    encoder = nn.Sequential(*new_encoder(), nn.BatchNorm1d(FEATURES))
    training = Training(encoder, copy.deepcopy(encoder).requires_grad_(False))
    learned = [*encoder.parameters(), *training.scale.parameters(), training.temperature]
    optimizer = torch.optim.Adam(learned, 3e-3)
    before = _accuracy(encoder, images, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(STEPS):
            chosen = torch.randperm(len(images))[:BATCH]
            loss = RECIPES[name](training, images[chosen], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ce.momentum_update(encoder, training.average, 0.9)
    after = _accuracy(encoder, images, labels)
    assert after > before, f"one-shot accuracy fell from {before:.3f} to {after:.3f}"


def _accuracy(encoder: nn.Module, images: Tensor, labels: Tensor) -> float:
    encoder.eval()
    accuracy, _ = probe(encoder, images, labels)
    encoder.train()
    return accuracy
