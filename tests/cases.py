"""Everything a call of a loss over pairs can say, as factors with levels, and how a case becomes a call.

A factor names the keywords it decides about; its first level leaves them out. losses/test_truth.py fails on a keyword
of a public loss that no factor names. Other losses: cases_of_sets.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

import contrastive_ext as ce
import truth
from draw import KINDS, MEMORIES, Draw
from truth_check import Call

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Factor:
    levels: tuple
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Losses of one signature.

    functions  by name (function, module, fixed arguments)
    inputs     keywords without which there is no call
    """

    name: str
    functions: dict[str, tuple[Callable, type, dict]]
    inputs: tuple[str, ...]
    factors: dict[str, Factor]
    allowed: Callable[[Mapping], bool]
    call: Callable[[Mapping, int], Call]

    @property
    def levels(self) -> dict[str, tuple]:
        return {name: factor.levels for name, factor in self.factors.items()}


# what every loss takes
COMMON = {
    "dtype": Factor(tuple(DTYPES)),
    "kind": Factor(KINDS),
    "memory": Factor(MEMORIES),
    "normalize": Factor((True, False), ("normalize",)),
    "reduction": Factor(("mean", "sum", "none"), ("reduction",)),
    "return_stats": Factor((False, True), ("return_stats",)),
    "t": Factor((None, 0.02, 0.07, 0.3, 1.0, 5.0)),
    "as_module": Factor((False, True)),
    "autocast": Factor((False, True)),
    "backend": Factor((None,), ("backend",)),  # every case runs on every backend
}
SCALE = Factor(("default", "temperature", "learned", "logit_scale", "learned_scale"), ("temperature", "logit_scale"))
SCALE_WITHOUT_LOGIT_SCALE = Factor(("default", "temperature", "learned"), ("temperature",))


def common_rules(case: Mapping) -> bool:
    get = case.get
    if "scale" in case and "t" in case and (get("scale") == "default") != (get("t") is None):
        return False
    return not (get("kind") == "lattice" and get("normalize") is True)


def scale_of(case: Mapping, default: float, inputs: dict, wanted: set, constants: dict, rows: int = 0) -> Callable:
    """Put the temperature of a case into the arguments; the result makes 1/temperature of the truth's inputs."""
    style, t = case["scale"], case["t"]
    if style.endswith("rows"):  # a temperature for every row
        t = t * (0.7 + 0.6 * torch.rand(rows, generator=torch.Generator().manual_seed(rows), dtype=torch.float64))
        t = t.to(torch.float64 if case["dtype"] == "float64" else torch.float32)
        (inputs if style == "learned_rows" else constants)["temperature"] = t
        if style == "learned_rows":
            wanted.add("temperature")
            return lambda leaves, compute: 1 / leaves["temperature"]
        return lambda leaves, compute: 1 / t.to(compute)
    if style == "default":
        return lambda leaves, compute: torch.tensor(1 / default, dtype=compute)
    name = "logit_scale" if "scale" in style and style != "learned" else "temperature"
    value = 1 / t if name == "logit_scale" else t
    if style.startswith("learned"):
        inputs[name] = torch.tensor(value, dtype=torch.float64 if case["dtype"] == "float64" else torch.float32)
        wanted.add(name)
        return lambda leaves, compute: leaves[name] if name == "logit_scale" else 1 / leaves[name]
    constants[name] = value
    return lambda leaves, compute: torch.tensor(1 / t, dtype=compute)


def may_overwrite(case: Mapping, tensors: list) -> list:
    """The tensors, unless they lie in one buffer with what autograd has saved: it would refuse the backward."""
    return [] if case["memory"] == "shared" else tensors


def plain_arguments(case: Mapping) -> dict:
    names = ("normalize", "reduction", "return_stats")
    return {name: case[name] for name in names if case[name] != COMMON[name].levels[0]}


def how_called(case: Mapping, operands: torch.dtype | None = None) -> dict:
    """Fields of `Call` that follow from the factors all losses share."""
    dtype = DTYPES[case["dtype"]]
    return {
        "dtype": dtype, "operands": operands or dtype, "normalize": case["normalize"], "reduction": case["reduction"],
        "return_stats": case["return_stats"], "as_module": case["as_module"], "autocast": case["autocast"],
        "exact": case["kind"] == "lattice" or (case["normalize"] and case["shape"][-1] == 1),
        "group": case.get("group", False),
    }  # fmt: skip


@cache
def parameters_of(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


HINGE_MARGIN = 0.4321  # no multiple of what a lattice has: its corner is met by no case


@dataclass(frozen=True)
class Hinge(ce.RowLoss):
    """The README's loss of a user."""

    def from_stats(self, stats):
        (lse,) = stats.lse
        return torch.relu(lse - stats.count.log() - stats.pos + HINGE_MARGIN * stats.scale)


PAIR_LOSSES = {
    "infonce": (ce.fused_infonce_loss, ce.InfoNCELoss, {}),
    "decoupled": (ce.fused_decoupled_loss, ce.DecoupledLoss, {}),
    "debiased": (ce.fused_debiased_loss, ce.DebiasedLoss, {}),
    "hard": (ce.fused_hard_negative_loss, ce.HardNegativeLoss, {}),
    "bayesian": (ce.fused_bayesian_loss, ce.BayesianLoss, {}),
    "row_loss": (ce.fused_row_loss, ce.RowLossModule, {"row_loss": Hinge()}),
}

# the number of more rows of z2 by the end of the name
LAYOUTS = (
    "two_view", "one_way", "one_way more", "symmetric", "symmetric more", "q2d d2q", "q2d q2q more", "q2d d2d more",
    "q2d q2q d2q d2d", "one_way index", "one_way index fewer",
)  # fmt: skip

PAIR_FACTORS = {
    "loss": Factor(tuple(PAIR_LOSSES), ("row_loss",)),
    "layout": Factor(LAYOUTS, ("layout",)),
    "shape": Factor(((9, 16), (1, 8), (2, 1), (3, 5), (17, 12), (33, 17), (24, 64))),
    "grad": Factor(("all", "z1", "z2")),
    "scale": Factor((*SCALE.levels, "rows", "learned_rows"), SCALE.keywords),
    "queue": Factor(("none", "tensor", "float32", "held", "held part", "held ids", "held part ids half"), ("queue",)),
    "ids": Factor(("none", "few", "wide", "int32", "uint8", "one", "labels wide"), ("ids", "labels")),
    "queue_ids": Factor((False, True), ("queue",)),
    "guide": Factor(("none", "random", "lattice", "self", "own"), ("guide",)),
    "margin": Factor(
        (None, ("absolute", 0.25), ("relative", 0.1), ("relative", 0.5), ("absolute", -0.2)), ("guide",)
    ),
    "negatives": Factor(
        ("none", "shared", "own", "shared ids", "own ids", "shared guided", "own guided"), ("negatives",)
    ),
    "weights": Factor((None, "of the queue", "of negatives", "all, wide"), ("queue", "negatives")),
    "index": Factor((None,), ("positive_index",)),  # the layout says
    "hardness": Factor((None, (2.0, "in_batch"), (0.5, "own"), (3.0, "all")), ("hardness", "hardness_on")),
    "in_batch": Factor((True, False), ("in_batch_negatives",)),
    "positives": Factor((None, 1, 3), ("positives",)),
    "operand_dtype": Factor((None, torch.float16, torch.bfloat16, "fp16x3", "bf16x3"), ("operand_dtype",)),
    "group": Factor((False, True), ("group",)),  # of one rank: more are tests/batch/test_distributed.py
    "positive_weight": Factor((False, True), ("positive_weight",)),
    "tau_plus": Factor((None, 0.0, 0.02, 0.5, "pairs", "rows"), ("tau_plus",)),
    "beta": Factor((None, 0.0, 0.3, 1.0), ("beta",)),
    "detach_weights": Factor((None, True), ("detach_weights",)),
    "alpha": Factor((None, 0.5, 0.7), ("alpha",)),
    "eps": Factor((None, 0.0), ("eps",)),
    "ranks": Factor((None, ("exact", None), ("histogram", None), ("histogram", 7)), ("ranks", "bins")),
    **COMMON,
}  # fmt: skip


def _spoken(case: Mapping) -> list[str]:
    return [name for name in case if name != "loss" and PAIR_FACTORS[name].keywords]


def pair_rules(case: Mapping) -> bool:
    """Whether the factors that a partial case decides can go together."""
    get = case.get
    layout, loss, queue, negatives = (get(x) for x in ("layout", "loss", "queue", "negatives"))
    takes = parameters_of(PAIR_LOSSES[loss][0])
    if any(case[x] != PAIR_FACTORS[x].levels[0] and not takes & set(PAIR_FACTORS[x].keywords) for x in _spoken(case)):
        return False
    forbidden = [
        layout is not None and layout.startswith("symmetric") and queue not in (None, "none"),
        layout == "two_view" and negatives not in (None, "none"),
        layout not in (None, "one_way") and get("in_batch") is False,
        layout is not None and "2" in layout and loss not in ("infonce", "decoupled"),
        layout is not None and "2" in layout and get("positives") is not None,
        layout is not None and not layout.startswith("one_way") and (get("scale") or "").endswith("rows"),
        (get("scale") or "").endswith("rows") and get("dtype") not in (None, "float32", "float64"),
        (get("scale") or "").endswith("rows") and get("operand_dtype") is not None,
        get("hardness") is not None and (layout or "one_way").split("_")[0].split()[0] in ("two", "symmetric"),
        get("hardness") is not None and (get("scale") or "").endswith("rows"),
        "ids" in (negatives or "") and get("ids") == "none",
        "guided" in (negatives or "") and get("guide") in ("none", "own"),
        get("guide") == "own" and get("shape") is not None and get("shape")[1] < 5,
        get("guide") == "own" and get("kind") not in (None, "random"),
        get("weights") is not None and loss == "bayesian",
        "queue" in (get("weights") or "") and (queue == "none" or (layout or "").startswith("symmetric")),
        "negatives" in (get("weights") or "") and (negatives == "none" or layout == "two_view"),
        "all" in (get("weights") or "") and queue == "none" and negatives == "none",
        "all" in (get("weights") or "") and queue == "none" and layout == "two_view",
        "all" in (get("weights") or "") and negatives == "none" and (layout or "").startswith("symmetric"),
        get("weights") is not None and get("kind") == "lattice",  # its logits are exact no more
        get("in_batch") is False and queue == "none" and negatives == "none",
        get("queue_ids") is True and (queue not in (None, "tensor", "float32") or get("ids") == "none"),
        get("queue_ids") is True and (layout or "").startswith("symmetric"),
        get("margin") is not None and get("guide") == "none",
        get("guide") == "self" and get("kind") not in (None, "random"),
        get("guide") == "self" and get("shape") is not None and get("shape")[1] < 5,
        get("operand_dtype") is not None and get("dtype") not in (None, "float32"),
        get("tau_plus") == "rows" and layout not in ("two_view", "symmetric", None),
        get("tau_plus") == "rows" and (get("in_batch") is False or (get("scale") or "").endswith("rows")),
        loss == "bayesian" and (negatives or "").startswith("own"),
        loss == "bayesian" and negatives in ("shared", "shared ids") and get("margin") is not None,
        loss == "bayesian" and negatives in ("shared", "shared ids") and get("guide") not in (None, "none", "own"),
        loss == "bayesian" and get("kind") == "crowded" and get("dtype") not in (None, "float64"),
        loss == "bayesian" and get("kind") == "crowded" and get("operand_dtype") is not None,
        loss == "bayesian" and get("kind") == "lattice" and get("t") not in (None, 1.0),  # t = .3 rounds its logits
        loss == "bayesian" and get("kind") == "lattice" and (get("scale") or "").endswith("rows"),
        get("ranks") not in (None, ("exact", None)) and get("kind") == "lattice",
        get("ranks") is not None and get("ranks")[0] == "histogram" and get("kind") == "crowded",
    ]  # fmt: skip
    return common_rules(case) and not any(forbidden)


def pair_call(case: Mapping, seed: int) -> Call:
    dtype, (b, d) = DTYPES[case["dtype"]], case["shape"]
    operands = dtype if isinstance(case["operand_dtype"], str) else case["operand_dtype"] or dtype
    function, module, fixed = PAIR_LOSSES[case["loss"]]
    draw = Draw(case["kind"], case["memory"], dtype, operands, case["normalize"], seed, case["loss"] != "bayesian")
    words = case["layout"].split()
    layout = tuple(word for word in words if "2" in word) or words[0]
    inputs, constants, overwrite = {}, {**fixed, **plain_arguments(case)}, []
    say = truth.Cancelling()
    both = draw.views(2, b, d)
    second = both[1]
    index = None
    if "more" in words or words[-1] == "index":
        second = torch.cat([second, draw.others(draw.number(1, 7), d)])
    if "fewer" in words:
        second = second[: max(1, b // 2)]
    m = len(second)
    if "index" in words:
        index = constants["positive_index"] = torch.randint(0, m, (b,), generator=draw.generator)
    inputs["z1"], inputs["z2"] = draw.tensor(both[0]), draw.tensor(second)
    wanted = {"all": {"z1", "z2"}, "z1": {"z1"}, "z2": {"z2"}}[case["grad"]]
    if layout != "two_view":
        constants["layout"] = layout
    if not case["in_batch"]:
        constants["in_batch_negatives"] = False

    size = draw.number(1, 12)
    number = (draw.number(1, 9),) if case["negatives"].startswith("shared") else (b, draw.number(1, 4))
    ids = queue_ids = negative_ids = None
    if case["ids"] != "none":
        ids, queue_ids, negative_ids = draw.integers(case["ids"].split()[-1], m, size, torch.Size(number).numel())
        constants["labels" if case["ids"].startswith("labels") else "ids"] = ids
        say.ids = ids.long()
    keys = filled = None
    if case["queue"].startswith("held"):
        held_ids = draw.integers("few", size)[0] if "ids" in case["queue"] else None
        held, filled, of_rows = draw.queue(case["queue"], size, d, held_ids)
        constants["queue"], keys = held, held.data.clone()
        say.queue_ids = of_rows if held_ids is not None else None
        overwrite.append(held.data)
    elif case["queue"] != "none":
        other = torch.float32 if case["queue"] == "float32" else None
        if case["memory"] == "shared" and case["loss"] != "bayesian":
            queue = inputs["z2"].detach()[:size]  # the very rows that are positives, in their memory
            size = len(queue)
            if queue_ids is not None:
                queue_ids = queue_ids[:size]
        else:
            queue = draw.tensor(draw.others(size, d), other, normalized=False)
            overwrite.append(queue)
        constants["queue"], keys = queue, queue.clone()
        if case["queue_ids"]:
            constants["queue"], say.queue_ids = ce.Columns(queue, ids=queue_ids), queue_ids.long()

    weights = case["weights"] or ""
    of_columns: dict = {}

    def weighted(shape: tuple[int, ...]) -> torch.Tensor:
        width = 30.0 if "wide" in weights else 2.0
        return draw.place((draw.randn(*shape, 1) * width).to(computed))[..., 0]

    computed = torch.float64 if dtype == torch.float64 else torch.float32
    if keys is not None and ("queue" in weights or "all" in weights):
        of_columns["queue_weight"] = weighted((len(keys),))
        columns = ce.Columns.of(constants["queue"])
        constants["queue"] = replace(columns, log_weight=of_columns["queue_weight"])
    if case["guide"] != "none":
        _guide(case, draw, inputs, constants, say, b, m, None if keys is None else len(keys), keys)
    beside: dict = {}
    if case["negatives"] != "none":
        inputs["negatives"] = draw.tensor(draw.others(*number, d))
        wanted |= {"negatives"}
        if "ids" in case["negatives"] and negative_ids is not None:
            beside["ids"] = negative_ids.reshape(number)
            say.negative_ids = beside["ids"].long()
        if "guided" in case["negatives"]:
            features = draw.randn(*number, say.guide[0].shape[1]).to(say.guide[0].dtype)
            beside["guide"] = say.guide_negatives = draw.place(features)
        if "negatives" in weights or "all" in weights:
            beside["log_weight"] = of_columns["negatives_weight"] = weighted(number)
    if case["positives"] is not None:
        inputs["positives"] = draw.tensor(draw.views(case["positives"], b, d))
        wanted |= {"positives"}
    if case["operand_dtype"] is not None:
        constants["operand_dtype"] = case["operand_dtype"]
    scale = scale_of(case, 0.5, inputs, wanted, constants, b)
    hardness = {}
    if case["hardness"] is not None:
        hardness = dict(zip(("hardness", "hardness_on"), case["hardness"], strict=True))
        constants |= hardness
    parameters = _parameters(case, draw, b, constants)

    def true(how: truth.Arithmetic, x: dict) -> truth.Outcome:
        p = truth.problem(
            how, x["z1"], x["z2"], scale(x, how.compute), layout, say, queue=keys, queue_filled=filled,
            negatives=x.get("negatives"), in_batch=case["in_batch"], positives=x.get("positives"),
            positive_index=index, **hardness, **of_columns,
        )  # fmt: skip
        formula = truth.hinge if case["loss"] == "row_loss" else getattr(truth, case["loss"])
        losses = formula(how, p, **parameters)
        first = parameters.get("beta", 1.0) or 1.0 if case["loss"] == "hard" else 1.0
        return truth.pair_outcome(how, p, losses, first, of_empty=case["loss"] == "infonce")

    called = how_called(case, operands)
    around = {"negatives": partial(ce.Columns, **beside)} if beside else {}
    return Call(
        function,
        module,
        inputs,
        wanted,
        constants,
        true,
        overwrite=may_overwrite(case, overwrite),
        around=around,
        **called,
    )


def _guide(case, draw: Draw, inputs, constants, say: truth.Cancelling, b, m, size, keys) -> None:
    if case["guide"] == "own":
        say.guide = "own"
        g1 = g2 = None
    elif case["guide"] == "self":
        g1, g2, held = inputs["z1"].detach(), inputs["z2"].detach(), keys
    elif case["guide"] == "lattice":  # unit rows of halves: similarities are multiples of 1/4, ties are exact
        signs = torch.randint(0, 2, (2, max(b, m), 4), generator=draw.generator).double() * 2 - 1
        g1, g2 = signs[0, :b], signs[1, :m]
        held = torch.randint(0, 2, (size or 1, 4), generator=draw.generator).double() * 2 - 1
    else:  # features of another width, views of an image agree somewhat, some disagree
        image = draw.randn(max(b, m), 3)
        g1, g2, held = image[:b] + 0.6 * draw.randn(b, 3), image[:m] + 0.6 * draw.randn(m, 3), draw.randn(size or 1, 3)
    if case["guide"] not in ("self", "own"):
        dtype = draw.dtype if draw.dtype != torch.float64 else torch.float64
        g1, g2, held = (draw.place(g.to(dtype)) for g in (g1, g2, held))
    if case["guide"] != "own":
        constants["guide"] = say.guide = (g1, g2)
    if size is not None and case["guide"] != "own":
        columns = ce.Columns.of(constants["queue"])
        constants["queue"], say.guide_queue = replace(columns, guide=held), held
    if case["margin"] is not None:
        strategy, say.margin = case["margin"]
        say.relative = strategy == "relative"
    if case["margin"] is not None or case["guide"] == "own":
        constants["guide"] = ce.Guide(g1, g2, say.margin, say.relative)


def _parameters(case, draw: Draw, b: int, constants: dict) -> dict:
    """The loss's own parameters, put into the arguments; the result is what the formula takes."""
    own = {}
    for name in ("tau_plus", "beta", "detach_weights", "alpha", "eps"):
        if case[name] in ("pairs", "rows"):
            prior = torch.rand(b if case[name] == "pairs" else 2 * b, generator=draw.generator) * 0.2
            prior[::3] = 0.0
            constants[name] = own[name] = draw.place(prior[:, None])[:, 0]
        elif case[name] is not None:
            constants[name] = own[name] = case[name]
    if case["ranks"] is not None:
        ranks, bins = case["ranks"]
        constants["ranks"] = ranks
        if bins is not None:
            constants["bins"] = bins
        if ranks == "histogram":
            own["bins"] = bins or 256
    if case["positive_weight"]:
        weight = draw.place((draw.randn(b, 1).abs() + 0.5).float())[:, 0]
        constants["positive_weight"] = own["positive_weight"] = weight
    if case["loss"] == "row_loss":
        own["margin"] = HINGE_MARGIN
    return own


def _family(name: str, losses: tuple[str, ...]) -> Family:
    functions = {loss: PAIR_LOSSES[loss] for loss in losses}
    takes = set().union(*(parameters_of(function) for function, _, _ in functions.values()))
    factors = {n: f for n, f in PAIR_FACTORS.items() if n == "loss" or not f.keywords or takes & set(f.keywords)}
    factors["loss"] = Factor(losses, ("row_loss",) if "row_loss" in losses else ())

    def allowed(case: Mapping) -> bool:
        return any(pair_rules({"loss": loss, **case}) for loss in losses)

    def call(case: Mapping, seed: int) -> Call:
        return pair_call({**{n: factor.levels[0] for n, factor in PAIR_FACTORS.items()}, **case}, seed)

    for n, factor in factors.items():
        factors[n] = Factor(tuple(level for level in factor.levels if allowed({n: level})), factor.keywords)
    return Family(name, functions, ("z1", "z2"), factors, allowed, call)


# ranks have so many parameters that, in one array with the others, most cases would be theirs
PAIRS = _family("pairs", tuple(loss for loss in PAIR_LOSSES if loss != "bayesian"))
RANKED = _family("ranked", ("bayesian",))
