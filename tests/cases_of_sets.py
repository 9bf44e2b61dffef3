"""Factors and calls, as in cases.py, of losses that take no pairs: views (FNC), labels (SupCon), keys (SANE, SEED)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

import contrastive_ext as ce
import truth
import truth_of_sets
from cases import (
    COMMON,
    DTYPES,
    SCALE,
    SCALE_WITHOUT_LOGIT_SCALE,
    Factor,
    Family,
    common_rules,
    how_called,
    may_overwrite,
    plain_arguments,
    scale_of,
)
from draw import Draw
from truth_check import Call

SHAPES = ((9, 16), (2, 3), (4, 1), (17, 12), (33, 24))


def _queue(draw: Draw, how: str, size: int, d: int, ids=None) -> tuple:
    """(what the call takes, its rows, which are filled, their ids) for "none", "tensor", "held ..."."""
    if how == "none":
        return None, None, None, None
    if how == "tensor":
        queue = draw.tensor(draw.others(size, d), normalized=False)
        return queue, queue.clone(), None, None
    held, filled, of_rows = draw.queue(how, size, d, ids)
    return held, held.data.clone(), filled, of_rows


# FNC

FNC = {"fnc": (ce.fused_false_negative_loss, ce.FalseNegativeLoss, {})}
FNC_FACTORS = {
    "number_of_views": Factor((2, 3)),
    "shape": Factor(SHAPES),
    "scale": SCALE,
    "support": Factor((None, 1, 2), ("support",)),
    "mode": Factor((None, "attract", "eliminate"), ("mode",)),
    "top_k": Factor((10, None, 1, 3, 100), ("top_k",)),
    "threshold": Factor((0.7, None, 0.2, -9.0, 9.0), ("threshold",)),
    "aggregate": Factor((None, "max", "mean"), ("aggregate",)),
    "keys": Factor((False, True), ("keys",)),
    "queue": Factor(("none", "tensor", "held", "held part", "held part ids half", "held ids"), ("queue",)),
    "labels": Factor((None, "few", "wide", "int32", "distinct"), ("labels",)),
    "group": Factor((False, True), ("group",)),
    **COMMON,
}


def fnc_rules(case: Mapping) -> bool:
    get = case.get
    mean_of_three = get("number_of_views") == 3 and get("support") is None and "support" in case
    forbidden = [
        "top_k" in case and "threshold" in case and get("top_k") is None and get("threshold") is None,
        get("kind") == "lattice" and get("aggregate") == "mean" and mean_of_three,  # a mean of three is not exact
    ]
    return common_rules(case) and not any(forbidden)


def fnc_call(case: Mapping, seed: int) -> Call:
    dtype, (b, d), v = DTYPES[case["dtype"]], case["shape"], case["number_of_views"]
    draw = Draw(case["kind"], case["memory"], dtype, dtype, case["normalize"], seed, identical=False)
    inputs, constants, own = {}, plain_arguments(case), {}
    inputs["views"] = draw.tensor(draw.views(v, b, d))
    if case["support"] is not None:
        constants["support"] = own["support"] = draw.tensor(draw.views(case["support"], b, d))
    if case["keys"]:
        constants["keys"] = own["keys"] = draw.tensor(draw.views(v, b, d))
    for name in ("mode", "aggregate"):
        if case[name] is not None:
            constants[name] = own[name] = case[name]
    for name in ("top_k", "threshold"):
        if case[name] != FNC_FACTORS[name].levels[0]:
            constants[name] = case[name]
        own[name] = case[name]
    size, labels, ids = draw.number(1, 12), None, None
    if case["labels"] is not None:
        labels, ids = draw.integers(case["labels"], b, size)
        constants["labels"], own["labels"] = labels, labels.long()
    if "ids" in case["queue"] and ids is None:
        ids = draw.integers("few", size)[0]
    queue, rows, filled, of_rows = _queue(draw, case["queue"], size, d, ids if "ids" in case["queue"] else None)
    if queue is not None:
        constants["queue"] = queue
        own |= {"queue": rows, "queue_filled": filled, "queue_labels": of_rows if "ids" in case["queue"] else None}
    wanted = {"views"}
    scale = scale_of(case, 0.1, inputs, wanted, constants)

    def true(how: truth.Arithmetic, x: dict) -> truth.Outcome:
        return truth_of_sets.false_negative(how, x["views"], scale(x, how.compute), **own)

    return Call(*FNC["fnc"][:2], inputs, wanted, constants, true, **how_called(case))


# SupCon

SUPCON = {"supcon": (ce.fused_supcon_loss, ce.SupConLoss, {})}
SUPCON_FACTORS = {
    "number_of_views": Factor((None, 1, 2, 3)),
    "shape": Factor((*SHAPES, (1, 8))),
    "scale": SCALE,
    "labels": Factor(("few", "one", "distinct", "wide", "int32", "uint8")),
    "positives": Factor((None, "out", "in"), ("positives",)),
    "queue": Factor(("none", "tensor", "held", "held part", "held part half"), ("queue",)),
    "group": Factor((False, True), ("group",)),
    **COMMON,
}


def labelled_call(of: dict, truth_of: Callable, case: Mapping, seed: int) -> Call:
    """A call of the one loss of a family whose rows have labels."""
    ((function, module, _),) = of.values()
    dtype, (b, d), v = DTYPES[case["dtype"]], case["shape"], case["number_of_views"]
    draw = Draw(case["kind"], case["memory"], dtype, dtype, case["normalize"], seed)
    features = draw.views(v or 1, b, d)
    inputs, constants, own = {}, plain_arguments(case), {}
    inputs["features"] = draw.tensor(features[0] if v is None else features)
    (labels,) = draw.integers(case["labels"], b)
    constants["labels"] = labels
    if case.get("positives") is not None:
        constants["positives"] = own["positives"] = case["positives"]
    overwrite = []
    if case["queue"] != "none":
        size = draw.number(1, 12)
        of_keys = torch.cat([labels.long(), labels.long()[:1] + 1])[torch.randint(0, b + 1, (size,))]
        queue, keys, filled, of_rows = _queue(draw, case["queue"], size, d, of_keys)
        overwrite.append(queue.data if isinstance(queue, ce.NegativeQueue) else queue)
        if of_rows is None:
            queue, of_rows = ce.Columns(queue, ids=of_keys), of_keys
        own |= {"queue": keys, "queue_filled": filled, "queue_labels": of_rows}
        constants["queue"] = queue
    wanted = {"features"}
    scale = scale_of(case, 0.1, inputs, wanted, constants)

    def true(how: truth.Arithmetic, x: dict) -> truth.Outcome:
        return truth_of(how, x["features"], scale(x, how.compute), labels.long(), **own)

    overwrite = may_overwrite(case, overwrite)
    return Call(function, module, inputs, wanted, constants, true, overwrite=overwrite, **how_called(case))


# InfoNCE of labelled rows

LABELLED = {"labelled_infonce": (ce.fused_labelled_infonce_loss, ce.LabelledInfoNCELoss, {})}
LABELLED_FACTORS = {name: factor for name, factor in SUPCON_FACTORS.items() if name != "positives"}


# Sigmoid

SIGMOID = {"sigmoid": (ce.fused_sigmoid_loss, ce.SigmoidLoss, {})}
SIGMOID_FACTORS = {
    "shape": Factor((*SHAPES, (1, 8), (2, 1))),
    "more": Factor((False, True)),
    "grad": Factor(("all", "z1", "z2")),
    "scale": Factor(("default", "logit_scale", "learned_scale"), ("logit_scale",)),
    "bias": Factor((None, 0.0, -3.5, "learned", "learned [1]"), ("logit_bias",)),
    "ids": Factor(("none", "few", "wide", "int32", "one"), ("ids",)),
    "operand_dtype": Factor((None, torch.float16, torch.bfloat16), ("operand_dtype",)),
    "group": Factor((False, True), ("group",)),
    **COMMON,
}  # fmt: skip


def sigmoid_rules(case: Mapping) -> bool:
    return common_rules(case) and not (
        case.get("operand_dtype") is not None and case.get("dtype") not in (None, "float32")
    )


def sigmoid_call(case: Mapping, seed: int) -> Call:
    dtype, (b, d) = DTYPES[case["dtype"]], case["shape"]
    operands = case["operand_dtype"] or dtype
    draw = Draw(case["kind"], case["memory"], dtype, operands, case["normalize"], seed)
    both = draw.views(2, b, d)
    second = torch.cat([both[1], draw.others(draw.number(1, 7), d)]) if case["more"] else both[1]
    inputs = {"z1": draw.tensor(both[0]), "z2": draw.tensor(second)}
    wanted = {"all": {"z1", "z2"}, "z1": {"z1"}, "z2": {"z2"}}[case["grad"]]
    constants, ids = plain_arguments(case), None
    if case["ids"] != "none":
        ids = draw.integers(case["ids"], len(second))[0]
        constants["ids"] = ids
    if case["operand_dtype"] is not None:
        constants["operand_dtype"] = case["operand_dtype"]
    learned = isinstance(case["bias"], str)
    value = -4.25 if learned else -10.0 if case["bias"] is None else case["bias"]
    if learned:
        inputs["logit_bias"] = torch.full((1,) if "[1]" in case["bias"] else (), value, dtype=torch.float64)
        inputs["logit_bias"] = inputs["logit_bias"].to(torch.float64 if case["dtype"] == "float64" else torch.float32)
        wanted = wanted | {"logit_bias"}
    elif case["bias"] is not None:
        constants["logit_bias"] = value
    scale = scale_of(case, 0.1, inputs, wanted, constants)

    def true(how: truth.Arithmetic, x: dict) -> truth.Outcome:
        bias = x["logit_bias"].reshape(()) if learned else torch.tensor(value, dtype=how.compute)
        of = None if ids is None else ids.long()
        return truth_of_sets.sigmoid(how, x["z1"], x["z2"], scale(x, how.compute), bias, of)

    return Call(*SIGMOID["sigmoid"][:2], inputs, wanted, constants, true, **how_called(case, operands))


# SANE

SANE = {"sane": (ce.fused_self_labeling_loss, ce.SelfLabelingLoss, {})}
SANE_FACTORS = {
    "shape": Factor(SHAPES),
    "scale": SCALE_WITHOUT_LOGIT_SCALE,
    "queue": Factor(("none", "tensor", "held", "held part", "held part half")),
    "mixed": Factor(("none", "vector", "number", "0-d"), ("q_mix", "perm", "theta")),
    "label_temperature": Factor((None, 0.3, 1.0), ("label_temperature",)),
    "mu": Factor((None, 0.0, 0.4, 6.0), ("mu",)),
    "lam": Factor((None, 0.0, 0.8, 1.0), ("lam",)),
    "group": Factor((False, True), ("group",)),
    **COMMON,
}


def sane_call(case: Mapping, seed: int) -> Call:
    dtype, (b, d) = DTYPES[case["dtype"]], case["shape"]
    draw = Draw(case["kind"], case["memory"], dtype, dtype, case["normalize"], seed)
    views = draw.views(3, b, d)
    inputs, constants, own = {"q": draw.tensor(views[0])}, plain_arguments(case), {}
    k = draw.tensor(views[1])
    queue, rows, filled, _ = _queue(draw, case["queue"], draw.number(1, 12), d)
    constants |= {"k": k, "queue": queue}
    wanted = {"q"}
    if case["mixed"] != "none":
        inputs["q_mix"] = draw.tensor(views[2])
        wanted |= {"q_mix"}
        perm = torch.randperm(b, generator=draw.generator)
        theta = torch.rand(b, generator=draw.generator)
        theta[::4] = torch.tensor([0.0, 1.0])[torch.arange(len(theta[::4])) % 2]
        theta = {"vector": theta, "number": theta[-1].item(), "0-d": theta[-1]}[case["mixed"]]
        constants |= {"perm": perm, "theta": theta}
        own |= {"perm": perm, "theta": theta}
    for name in ("label_temperature", "mu", "lam"):
        if case[name] is not None:
            constants[name] = own[name] = case[name]
    scale = scale_of(case, 0.2, inputs, wanted, constants)

    def true(how: truth.Arithmetic, x: dict) -> truth.Outcome:
        return truth_of_sets.self_labeling(
            how, x["q"], scale(x, how.compute), k, rows, filled, q_mix=x.get("q_mix"), **own
        )

    held = queue.data if isinstance(queue, ce.NegativeQueue) else queue
    overwrite = [] if held is None else [held]
    return Call(
        *SANE["sane"][:2], inputs, wanted, constants, true, overwrite=may_overwrite(case, overwrite), **how_called(case)
    )


# soft targets

SOFT = {"soft": (ce.fused_soft_target_loss, ce.SoftTargetLoss, {})}
SOFT_FACTORS = {
    "shape": Factor((*SHAPES, (1, 8))),
    "scale": SCALE_WITHOUT_LOGIT_SCALE,
    "keys": Factor(("tensor", "held", "held part", "held part half")),
    "queue": Factor(("none", "tensor", "held", "held part"), ("queue",)),
    "teacher_temperature": Factor((0.1, 0.03, 1.0), ("teacher_temperature",)),
    "group": Factor((False, True), ("group",)),
    **COMMON,
}


def soft_call(case: Mapping, seed: int) -> Call:
    dtype, (b, d) = DTYPES[case["dtype"]], case["shape"]
    draw = Draw(case["kind"], case["memory"], dtype, dtype, case["normalize"], seed)
    views = draw.views(2, b, d)
    inputs, constants = {"queries": draw.tensor(views[0])}, plain_arguments(case)
    teacher, given = draw.tensor(views[1]), case["keys"] != "tensor"
    if given:
        keys, key_rows, keys_filled, _ = _queue(draw, case["keys"], draw.number(1, 12), d)
    else:
        keys = draw.tensor(draw.others(draw.number(1, 30), d))
        key_rows, keys_filled = keys.clone(), None
    queue, rows, filled, _ = _queue(draw, case["queue"], draw.number(1, 12), d)
    constants |= {"keys": keys, "teacher": teacher, "teacher_temperature": case["teacher_temperature"]}
    if queue is not None:
        constants["queue"] = queue
    wanted = {"queries"}
    scale = scale_of(case, 0.1, inputs, wanted, constants)

    def true(how: truth.Arithmetic, x: dict) -> truth.Outcome:
        return truth_of_sets.soft_target(
            how, x["queries"], scale(x, how.compute), key_rows, keys_filled, teacher, keys_given=given,
            teacher_temperature=case["teacher_temperature"], queue=rows, queue_filled=filled,
        )  # fmt: skip

    overwrite = [x.data if isinstance(x, ce.NegativeQueue) else x for x in (keys, queue) if x is not None]
    return Call(
        *SOFT["soft"][:2], inputs, wanted, constants, true, overwrite=may_overwrite(case, overwrite), **how_called(case)
    )


VIEWS = Family("views", FNC, ("views",), FNC_FACTORS, fnc_rules, fnc_call)
_OF_LABELS = ("features", "labels")
LABELS = Family(
    "labels", SUPCON, _OF_LABELS, SUPCON_FACTORS, common_rules, partial(labelled_call, SUPCON, truth_of_sets.supcon)
)
POSITIVES = Family(
    "positives", LABELLED, _OF_LABELS, LABELLED_FACTORS, common_rules,
    partial(labelled_call, LABELLED, truth_of_sets.labelled_infonce),
)  # fmt: skip
BINARY = Family("binary", SIGMOID, ("z1", "z2"), SIGMOID_FACTORS, sigmoid_rules, sigmoid_call)
KEYS = Family("keys", SANE, ("q", "k", "queue"), SANE_FACTORS, common_rules, sane_call)
TARGETS = Family("targets", SOFT, ("queries", "keys", "teacher"), SOFT_FACTORS, common_rules, soft_call)
