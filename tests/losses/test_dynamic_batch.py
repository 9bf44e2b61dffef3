"""Every loss under torch.compile and torch.export with a batch whose size stays open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim
from torch.utils._pytree import tree_flatten, tree_map

import contrastive_ext as ce
from rows import LOSSES, RANKED, USAGES, random_pairs

D = 4
TRACED, OTHERS = 12, (3, 29)  # batch sizes: the one that is traced, others that the graph has to take
EXACT = RANKED[0].parameters | {"ranks": "exact"}  # "auto" depends on the batch


def _parts(options: dict) -> dict:
    """The tensors of `Columns` and `Guide` beside the others, by the name of the field: what a graph takes."""
    found = {}
    for name, x in options.items():
        whole = is_dataclass(x)
        inside = {f"{name}.{f.name}": getattr(x, f.name) for f in fields(x)} if whole else {name: x}
        found |= {n: v for n, v in inside.items() if not whole or isinstance(v, Tensor)}
    return found


def _whole(arguments: dict) -> dict:
    """`_parts` put back into the objects of another batch size, which are there too."""
    made = {name: x for name, x in arguments.items() if "." not in name}
    for name in arguments.keys() - made.keys():
        outer, _, field = name.partition(".")
        made[outer] = replace(made[outer], **{field: arguments[name]})
    return made


@dataclass(frozen=True)
class Call:
    """A public loss, the tensors it takes for a batch size, and what is the same for all sizes."""

    function: Callable
    tensors: Callable[[int], dict]
    constants: dict


def _over_pairs(loss, usage, parameters=None) -> Call:
    def options(b: int) -> dict:
        torch.manual_seed(b)
        z1, z2 = random_pairs(b, D)
        z2, options = usage.options(z1, z2)
        return {"z1": z1, "z2": z2} | loss.vectors(z1) | options

    def tensors(b: int) -> dict:
        return {name: x for name, x in _parts(options(b)).items() if is_tensor(x)}

    def is_tensor(x) -> bool:
        return all(isinstance(leaf, Tensor) for leaf in tree_flatten(x)[0])

    constants = {name: x for name, x in options(TRACED).items() if not is_tensor(x)}
    constants |= loss.parameters if parameters is None else parameters

    @wraps(loss.function)
    def function(**arguments):
        return loss.function(**_whole(arguments))

    return Call(function, tensors, constants)


def _vectors(*names: str, **more: Callable[[int], Tensor]) -> Callable[[int], dict[str, Tensor]]:
    return lambda b: {name: torch.randn(b, D) for name in names} | {name: make(b) for name, make in more.items()}


def _with_keys(function: Callable) -> Callable:
    @wraps(function)
    def call(keys: Tensor, key_labels: Tensor, **arguments):
        return function(queue=ce.Columns(keys, ids=key_labels), **arguments)

    return call


def _calls() -> dict[str, Call]:
    calls = {loss.name: _over_pairs(loss, USAGES[0]) for loss in LOSSES + RANKED[1:]}
    calls["bayesian"] = _over_pairs(RANKED[0], USAGES[0], EXACT)
    for criteria in ((10, 0.7), (2, None), (None, 0.2)):
        for mode in ("attract", "eliminate"):
            rule = dict(zip(("top_k", "threshold"), criteria, strict=True)) | {"mode": mode}
            views = _vectors(views=lambda b: torch.randn(2, b, D))
            calls["fnc_{mode}_{top_k}_{threshold}".format(**rule)] = Call(ce.fused_false_negative_loss, views, rule)
    labelled = _vectors("features", labels=lambda b: torch.arange(b) % 3)
    keys = {"keys": lambda b: F.normalize(torch.randn(7, D)), "key_labels": lambda b: torch.arange(7) % 4}
    held = _vectors("features", labels=lambda b: torch.arange(b) % 3, **keys)
    for positives in ("out", "in"):
        calls[f"supcon_{positives}"] = Call(ce.fused_supcon_loss, labelled, {"positives": positives})
        calls[f"supcon_{positives}_with_keys"] = Call(_with_keys(ce.fused_supcon_loss), held, {"positives": positives})
    calls["labelled_infonce"] = Call(ce.fused_labelled_infonce_loss, labelled, {})
    calls["labelled_infonce_with_keys"] = Call(_with_keys(ce.fused_labelled_infonce_loss), held, {})
    pairs = _vectors("z1", "z2")
    calls["sigmoid"] = Call(ce.fused_sigmoid_loss, pairs, {})
    calls["sigmoid_ids"] = Call(ce.fused_sigmoid_loss, _vectors("z1", "z2", ids=lambda b: torch.arange(b) % 3), {})
    keys = {"keys": lambda b: torch.randn(9, D)}
    soft = Call(ce.fused_soft_target_loss, _vectors("queries", "teacher", **keys), {"teacher_temperature": 0.05})
    mixed = _vectors("q", "k", "q_mix", perm=torch.randperm, theta=torch.rand, queue=lambda b: torch.randn(7, D))
    return calls | {"soft_target": soft, "self_labeling": Call(ce.fused_self_labeling_loss, mixed, {})}


CALLS = _calls()
DIFFERENTIABLE = ("z1", "z2", "views", "q", "features", "queries")
# what a batch is arranged into, by the loss of two exponents; both ways of tracing see the same code
ARRANGED = {usage.name: _over_pairs(LOSSES[5], usage) for usage in USAGES[1:]}
EXPORTS = {f"{name}-strict": (call, True) for name, call in CALLS.items()}
EXPORTS |= {f"{name}-non_strict": (call, False) for name, call in (CALLS | ARRANGED).items()}


def test_the_table_holds_every_loss():
    public = {name for name in ce.__all__ if name.startswith("fused_") and name != "fused_row_loss"}
    assert {call.function.__name__ for call in CALLS.values()} == public


class Step(torch.nn.Module):
    """What torch.export takes."""

    def __init__(self, call: Call):
        super().__init__()
        self.call = call
        self.queue = call.constants.get("queue")  # a module: its buffers are the program's

    def forward(self, tensors: dict) -> Tensor:
        return self.call.function(**tensors, **self.call.constants)


@pytest.mark.parametrize("call, strict", EXPORTS.values(), ids=EXPORTS)
def test_exports(call, strict):
    batch = Dim("batch", min=min(OTHERS), max=4096)
    traced = call.tensors(TRACED)

    def open_sizes(x: Tensor, larger: Tensor) -> dict:
        return {i: batch + (n - TRACED) for i, (n, m) in enumerate(zip(x.shape, larger.shape, strict=True)) if n != m}

    torch._dynamo.reset()
    shapes = tree_map(open_sizes, traced, call.tensors(TRACED + 1))
    program = torch.export.export(Step(call), (traced,), dynamic_shapes=(shapes,), strict=strict).module()
    for tensors in (traced, *map(call.tensors, OTHERS)):
        expected = call.function(**tensors, **call.constants)
        torch.testing.assert_close(program(tensors), expected)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_compiles_for_every_batch_size(call):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **tensors: call.function(**tensors, **call.constants), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for b in (TRACED, *OTHERS):
        tensors = call.tensors(b)
        results = []
        for function in (call.function, compiled):
            leaves = {k: x.clone().requires_grad_() for k, x in tensors.items() if k in DIFFERENTIABLE}
            constants = call.constants if function is call.function else {}
            value = function(**(tensors | leaves), **constants)
            grads = torch.autograd.grad(value, list(leaves.values())) if leaves else ()
            results.append([value.detach(), *grads])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)


def test_a_threshold_may_be_symbolic():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda views, top_k, threshold: ce.fused_false_negative_loss(views, top_k=top_k, threshold=threshold),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    views = torch.randn(2, 9, D)
    for top_k, threshold in ((3, 0.2), (4, 0.6), (None, 0.3)):
        expected = ce.fused_false_negative_loss(views, top_k=top_k, threshold=threshold)
        torch.testing.assert_close(compiled(views, top_k, threshold), expected)


@pytest.mark.parametrize("name", ["infonce", "bayesian", "bayesian_histogram"])
def test_the_reference_exports(name):
    call = CALLS[name]
    dense = Call(call.function, call.tensors, call.constants | {"backend": "reference"})
    test_exports(dense, strict=False)
