"""`ClipLoss` and `SigLipLoss` of open_clip, without the matrices of logits: `from contrastive_ext.adapters.open_clip
import ClipLoss`.

What differs. Across ranks the gradient is always exact: DistributedDataParallel averages it to that of the whole batch,
as open_clip's does with `gather_with_grad=True`. `local_loss` decides only which value is reported. With
`gather_with_grad=False`, the default there, open_clip's gradient is 1/world_size of it (`local_loss=False`) or points
elsewhere (`local_loss=True`); that is refused, as is horovod. A bias on every logit changes neither value nor gradient
of a softmax: `logit_bias` of `ClipLoss` gets a gradient of zero. 16-bit features are computed and returned in float32.
`SigLipLoss` gathers the columns of all ranks whatever `dist_impl` says; values and gradients are those of all of them.

Classes derived from open_clip's own (`CoCaLoss`, `DistillClipLoss`) do not use this one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..batch.distributed import AllRanks
from ..checks import check_choice
from ..losses.infonce import fused_infonce_loss
from ..losses.sigmoid import fused_sigmoid_loss
from .hosts import alone

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """(CE(s I T') + CE(s T I'))/2 for features that the caller has normalised.

    local_loss        across ranks: report the loss of this rank's rows; False: its mean over ranks
    gather_with_grad  must be True with world_size > 1
    cache_labels      accepted; there are no labels to cache
    rank, world_size  this process among all of torch.distributed
    use_horovod       must be False
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError(
                "use_horovod=True: ranks are gathered by torch.distributed alone; start with torchrun and leave "
                "use_horovod=False."
            )
        if world_size > 1 and not gather_with_grad:
            raise ValueError(
                f"gather_with_grad=False with world_size={world_size}: the gradient would be 1/{world_size} of that of "
                "the whole batch, or point elsewhere with local_loss=True; give gather_with_grad=True "
                "(--gather-with-grad), whose gradient is exact."
            )
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of image_features, text_features [B, D], row i of each a pair; with `output_dict` by its name.

        logit_scale  > 0, already exponentiated, a float or a 0-d tensor that may need a gradient
        Raises       ValueError or TypeError on shapes, dtypes, ranges; RuntimeError across ranks without
                     torch.distributed
        Memory       O(B D); across ranks O(world_size B D); time O(B^2 D) world_size; once differentiable
        """
        group = _ranks(self.world_size)
        found = fused_infonce_loss(
            image_features, text_features, logit_scale=logit_scale, layout="symmetric", normalize=False, group=group
        )
        loss = alone(found)
        if isinstance(logit_bias, Tensor):  # in the graph: DistributedDataParallel waits for every parameter
            loss = loss + 0.0 * logit_bias.sum()
        if group is not None and not self.local_loss:
            loss = _with_value(loss, _mean_over_ranks(loss))
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return (
            f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}, "
            f"cache_labels={self.cache_labels}, rank={self.rank}, world_size={self.world_size}"
        )


class SigLipLoss(nn.Module):
    """Sum over all pairs of -log sigmoid(+-(s I T' + b)), by the number of images, for features of unit length.

    cache_labels      accepted; there are no labels to cache
    rank, world_size  this process among all of torch.distributed
    dist_impl         accepted: "bidir", "shift", "reduce", "gather" or None
    """

    def __init__(self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None):
        super().__init__()
        if dist_impl is not None:
            check_choice("dist_impl", dist_impl, DIST_IMPLS)
        self.cache_labels, self.rank, self.world_size, self.dist_impl = cache_labels, rank, world_size, dist_impl

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of image_features, text_features [B, D], row i of each a pair; with `output_dict` by its name.

        logit_scale, logit_bias  > 0, and any number (None: 0), floats or 0-d tensors that may need a gradient
        Raises       as `ClipLoss`
        Memory       O(B D); across ranks O(world_size B D); time O(B^2 D) world_size; once differentiable
        """
        bias = 0.0 if logit_bias is None else logit_bias
        group = _ranks(self.world_size)
        loss = alone(fused_sigmoid_loss(image_features, text_features, logit_scale, bias, normalize=False, group=group))
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return (
            f"cache_labels={self.cache_labels}, rank={self.rank}, world_size={self.world_size}, "
            f"dist_impl={self.dist_impl!r}"
        )


def _ranks(world_size: int) -> AllRanks | None:
    """All ranks, if there are more than one; ValueError if there are not so many."""
    if world_size == 1:
        return None
    if dist.is_initialized() and dist.get_world_size() != world_size:
        raise ValueError(
            f"world_size={world_size}, but torch.distributed has {dist.get_world_size()} ranks; give "
            "world_size=torch.distributed.get_world_size()."
        )
    return AllRanks()


def _mean_over_ranks(loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _with_value(loss: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `loss`."""
    return _WithValue.apply(loss, value)
