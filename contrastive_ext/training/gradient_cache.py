"""Batches larger than what an encoder's activations leave room for: gradient caching (Gao et al., arXiv:2101.06983).

A loss over N pairs needs all N embeddings at once, not all N sets of activations. So the encoder runs twice: chunk by
chunk to fill the embeddings, and, when the gradient of the loss in the embeddings is known, chunk by chunk again, each
with its backward. Nothing is approximated: the sum over chunks of a chain rule is the chain rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..checks import can_read, describe


class GradientCache(nn.Module):
    """Any loss over a batch of which the encoders see `chunk_size` rows at a time; value and gradient are the same.

        cache = GradientCache(InfoNCELoss(temperature=0.05), chunk_size=64)
        value = cache(encoder, x1, x2)                           # or (encoder1, encoder2); keywords go to the loss
        value.backward()

    loss           a loss of this package, function or module, or any callable of embeddings; it returns a tensor, or a
                   tuple that begins with one, such as (value, stats) under `return_stats=True`
    chunk_size     >= 1, rows that an encoder sees at once; the last chunk has what is left
    get_embedding  takes the embeddings [rows, ...] out of what an encoder returns; None: it returns them

    Called with an encoder for all inputs, or a tuple with one for each (the same one may stand in it twice), then the
    inputs, then keywords of the loss, which get to it whole (ids, a guide, a queue, a learned scale). An input is a
    tensor, and an encoder called with it; a tuple or list of positional arguments; or a dict of keyword arguments, as a
    tokenizer returns it (an encoder that takes the dict itself: `(features,)`). Its tensors, nested or not, have the
    rows of the batch in front and are cut; 0-d tensors and other values are handed on. Inputs may have other numbers of
    rows, where the loss takes that.

    Returns        what the loss returns. `value.backward()` encodes again and accumulates into `.grad`, once: scaled
                   (GradScaler), added to other losses or accumulated over calls like any loss. Gradients of inputs that
                   require one, and of the loss's own parameters, flow through it as usual.
    Raises         RuntimeError from `torch.autograd.grad`, `backward(inputs=)`, `create_graph=True` and from a second
                   backward; on a CPU also if the second encoding differs from the first. ValueError or TypeError on
                   inputs without common rows and on embeddings of another number of rows
    Cost           one more forward of each encoder that has a gradient; frozen ones run once. Memory: activations of
                   one chunk, the embeddings and their gradient, and what the loss needs
    Paper          Gao et al., RepL4NLP 2021, arXiv:2101.06983

    Both passes of a chunk run with the same random state of torch (CPU, and devices of its inputs and of the encoder's
    parameters) and in the autocast of the call, whatever `backward()` finds: dropout is the same in both. BatchNorm in
    training mode normalises by the chunk, and its running statistics move in both passes.

    DistributedDataParallel: give the wrapped encoders. Each synchronises once, in its very last chunk, and not at all
    in a call under `no_sync()`. Parameters of the loss that nothing wraps (LogitScale) are the caller's to average.
    """

    def __init__(
        self, loss: Callable[..., Any], chunk_size: int, get_embedding: Callable[[Any], Tensor] | None = None
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss must be callable on embeddings; got {describe(loss)}.")
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            raise TypeError(f"chunk_size must be an integer number of rows; got {describe(chunk_size)}.")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be >= 1; got {chunk_size}.")
        if get_embedding is not None and not callable(get_embedding):
            raise TypeError(f"get_embedding must be callable or None; got {describe(get_embedding)}.")
        self.loss, self.chunk_size, self.get_embedding = loss, chunk_size, get_embedding

    def forward(self, encoders: Callable | tuple[Callable, ...] | list[Callable], *inputs: Any, **keywords: Any) -> Any:
        """loss(*embeddings of the inputs, **keywords)."""
        of_each = list(encoders) if isinstance(encoders, (tuple, list)) else [encoders] * len(inputs)
        if not inputs or len(of_each) != len(inputs) or not all(map(callable, of_each)):
            raise TypeError(
                f"expected an encoder, or a tuple with one for each input, and then the inputs; got "
                f"{', '.join(map(describe, of_each)) or describe(encoders)} for {len(inputs)} inputs."
            )
        sides = [
            _Side(encoder, x, f"input {i + 1}", self.chunk_size, self.get_embedding)
            for i, (encoder, x) in enumerate(zip(of_each, inputs, strict=True))
        ]
        encoded = [side.encode() for side in sides]
        learning = [side for side in sides if side.has_gradient]
        if not learning:
            return self.loss(*encoded, **keywords)
        nodes = iter(_Encoded.apply(learning, torch.empty(0, requires_grad=True), *_reached(learning)))
        result = self.loss(
            *(next(nodes) if s.has_gradient else z for s, z in zip(sides, encoded, strict=True)), **keywords
        )
        value, *others = result if isinstance(result, tuple) else (result,)
        if not isinstance(value, Tensor):
            raise TypeError(f"the loss must return a tensor, or a tuple that begins with one; got {describe(value)}.")
        value = _Once.apply(value) if value.requires_grad else value
        return (value, *others) if isinstance(result, tuple) else value

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"


class _Side:
    """One input and its encoder: encoded once when it is called, and once more, with gradients, in the backward."""

    def __init__(self, encoder: Callable, x: Any, name: str, chunk_size: int, get_embedding: Callable | None) -> None:
        self.encoder, self.x, self.name, self.get_embedding = encoder, x, name, get_embedding
        self.tensors = list(_tensors(x))
        lengths = {len(t) for t in self.tensors}
        if len(lengths) != 1 or 0 in lengths:
            got = ", ".join(map(describe, self.tensors)) or describe(x)
            raise ValueError(f"{name} must hold tensors with the same number of rows in front, at least 1; got {got}.")
        self.starts = range(0, lengths.pop(), chunk_size)
        held = [*self.tensors, *(_held(encoder) if isinstance(encoder, nn.Module) else ())]
        self.one_per_device = list({t.device: t for t in held if t.device.type not in ("cpu", "meta")}.values())
        self.autocast = _Autocast()
        self.synchronises = getattr(encoder, "require_backward_grad_sync", True)
        self.random_states: list[_RandomState] = []
        self.parameters: list[Tensor] = []
        self.has_gradient = False

    def encode(self) -> Tensor:
        """[rows, ...] embeddings, detached.

        Graphs are built, of one chunk at a time, and dropped: encoders compute the same in both passes then (in
        inference they may take other kernels), and autocast caches no weights without their graph.
        """
        embeddings = None
        for start in self.starts:
            self.random_states.append(_RandomState(self.one_per_device))
            pieces = self._pieces(start)
            with self._no_sync():
                z = self._embed(pieces)
            if embeddings is None:
                embeddings = z.new_empty(self.starts.stop, *z.shape[1:], requires_grad=False)
                self.has_gradient = z.requires_grad
                # not those of a wrapper or with hooks: the engine calls these with None where a gradient is undefined
                behind = () if hasattr(self.encoder, "no_sync") else _leaves(z)
                self.parameters = [p for p in behind if not _has_hooks(p) and not any(p is t for t in pieces)]
            if z.shape[1:] != embeddings.shape[1:] or z.dtype != embeddings.dtype:
                raise ValueError(
                    f"embeddings of {self.name} differ between chunks: {describe(embeddings)}, {describe(z)}."
                )
            # a copy: the embedding may be a view of all that the encoder returned
            embeddings[start : start + len(z)].copy_(z.detach())
        assert embeddings is not None
        self.embeddings = embeddings
        return embeddings

    def backward(self, gradient: Tensor, synchronise: bool) -> list[Tensor | None]:
        """Accumulates into parameters; the gradients of the tensors of the input, None where none is required."""
        pieces_of_chunks = []
        before = _RandomState(self.one_per_device)
        try:
            for start, state in zip(self.starts, self.random_states, strict=True):
                is_last = start == self.starts[-1]
                pieces = self._pieces(start)
                state.restore()
                quiet = not (synchronise and is_last and self.synchronises)
                with self._no_sync() if quiet else nullcontext(), self.autocast.restored(), torch.enable_grad():
                    z = self._embed(pieces)
                    rows = slice(start, start + len(z))
                    self._check_same(z.detach(), self.embeddings[rows])
                torch.autograd.backward(z, gradient[rows])
                pieces_of_chunks.append(pieces)
        finally:
            before.restore()
        of_tensors = zip(*pieces_of_chunks, strict=True)
        return [
            _joined(pieces) if t.requires_grad else None for t, pieces in zip(self.tensors, of_tensors, strict=True)
        ]

    def _pieces(self, start: int) -> list[Tensor]:
        """Rows of a chunk, leaves of its graph: what made the input has its backward once, not in every chunk."""
        rows = slice(start, start + self.starts.step)
        return [t[rows].detach().requires_grad_(t.requires_grad) for t in self.tensors]

    def _embed(self, pieces: list[Tensor]) -> Tensor:
        x = _rebuilt(self.x, iter(pieces))
        if isinstance(x, Mapping):
            output = self.encoder(**x)
        else:
            output = self.encoder(*x) if isinstance(x, (tuple, list)) else self.encoder(x)
        z = output if self.get_embedding is None else self.get_embedding(output)
        expected = len(pieces[0])
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.dim() == 0 or len(z) != expected:
            raise ValueError(
                f"{self.name}: the embeddings of {expected} rows must be a floating-point tensor [{expected}, ...]; "
                f"got {describe(z)}. get_embedding takes them out of what an encoder returns."
            )
        return z

    def _no_sync(self) -> AbstractContextManager:
        """Of DistributedDataParallel and what is like it: gradients stay on this rank."""
        return self.encoder.no_sync() if hasattr(self.encoder, "no_sync") else nullcontext()

    def _check_same(self, again: Tensor, first: Tensor) -> None:
        # half the digits: rounding may differ with the alignment of memory, another dropout mask differs in all of them
        if can_read(again) and (again - first).norm() > torch.finfo(first.dtype).eps ** 0.5 * first.norm():
            raise RuntimeError(
                f"the encoder of {self.name} gave other embeddings in the second pass, gradients would be wrong: an "
                "encoder under GradientCache depends on its input, its parameters and torch's random state only, "
                "and parameters do not change between the call and backward()."
            )


class _Encoded(torch.autograd.Function):
    """The embeddings of all sides that have a gradient; its backward is the second pass."""

    @staticmethod
    def forward(ctx: Any, sides: list[_Side], anchor: Tensor, *reached: Tensor) -> tuple[Tensor, ...]:
        ctx.sides = sides
        ctx.set_materialize_grads(False)  # a side that the loss did not use has no second pass
        return tuple(side.embeddings.detach() for side in sides)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        sides, ctx.sides = ctx.sides, ()  # who keeps the value does not keep the batch
        last = {id(side.encoder): side for side, g in zip(sides, gradients, strict=True) if g is not None}
        returned: list[Tensor | None] = []
        for side, gradient in zip(sides, gradients, strict=True):
            of_tensors: list[Tensor | None] = [None] * len(side.tensors)
            if gradient is not None:
                of_tensors = side.backward(gradient, synchronise=last[id(side.encoder)] is side)
            returned += [None] * len(side.parameters) + of_tensors
        return None, None, *returned


def _reached(sides: list[_Side]) -> Iterator[Tensor]:
    """Where the backward of `_Encoded` leads: parameters, so that `torch.autograd.grad` finds a way to them, which
    `_Once` bars with the reason (no gradient goes that way), and the tensors of the inputs."""
    for side in sides:
        yield from side.parameters
        yield from side.tensors


class _Once(torch.autograd.Function):
    """The value; its backward runs before that of the loss and refuses what the second pass cannot give."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.done = False
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "GradientCache: torch.autograd.grad and backward(inputs=) cannot be had: the second pass accumulates "
                "the gradients of its chunks into .grad; call value.backward() and read .grad."
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                "GradientCache: create_graph=True cannot be had: gradients are of chunks whose graphs are gone; for "
                "second derivatives call the loss on embeddings of the whole batch, with backend='reference'."
            )
        if ctx.done:
            raise RuntimeError(
                "GradientCache: backward() runs once per call: a second one would encode and accumulate again; sum the "
                "losses first, or call the cache again."
            )
        ctx.done = True
        return gradient


class _RandomState:
    """The state of torch's generators, of the CPU and of the devices of some tensors."""

    def __init__(self, one_per_device: list[Tensor]) -> None:
        self.cpu = torch.get_rng_state()
        self.type = one_per_device[0].device.type if one_per_device else None
        self.devices, self.states = get_device_states(*one_per_device) if one_per_device else ([], [])

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.type:
            set_device_states(self.devices, self.states, device_type=self.type)


class _Autocast:
    """The autocast that is on now, of the CPU and of the accelerator."""

    def __init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        types = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
        self.arguments = [(t, torch.get_autocast_dtype(t), torch.is_autocast_enabled(t)) for t in types]
        self.cache_enabled = torch.is_autocast_cache_enabled()

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            for device_type, dtype, enabled in self.arguments:
                stack.enter_context(torch.autocast(device_type, dtype, enabled, self.cache_enabled))
            yield


def _tensors(x: Any) -> Iterator[Tensor]:
    """Tensors with rows, in the order in which `_rebuilt` asks for them."""
    if isinstance(x, Tensor) and x.dim() > 0:
        yield x
    elif isinstance(x, (Mapping, tuple, list)):
        for part in x.values() if isinstance(x, Mapping) else x:
            yield from _tensors(part)


def _rebuilt(x: Any, tensors: Iterator[Tensor]) -> Any:
    """x with other tensors in the place of its own."""
    if isinstance(x, Tensor):
        return next(tensors) if x.dim() > 0 else x
    if isinstance(x, Mapping):
        return {name: _rebuilt(part, tensors) for name, part in x.items()}
    if isinstance(x, (tuple, list)):
        parts = [_rebuilt(part, tensors) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in pieces])


def _held(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def _leaves(z: Tensor) -> Iterator[Tensor]:
    """The leaves of the graph of z."""
    seen, todo = set(), [z.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None) if type(node).__name__ == "AccumulateGrad" else None
        if leaf is not None:
            yield leaf
        todo += [after for after, _ in node.next_functions]
