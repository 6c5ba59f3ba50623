"""What a process holds of a tensor that several share, and its position in the whole."""

from collections.abc import Sequence

import torch
from torch import Tensor


def own_part(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This process's part of a tensor, in the tensor's own memory, and the place of the part by dimension.

    Of a tensor that is not distributed, all of it. The part of one with more owners than rows can be empty.
    """
    if not hasattr(tensor, "device_mesh"):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def like(part: Tensor, whole: Tensor) -> Tensor:
    """A tensor of which this process has `part`, distributed as `whole` is; `part` itself if that is not."""
    if not hasattr(whole, "device_mesh"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(whole, DTensor)
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every process that has a part of it; all of them call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def unstack(whole: Tensor) -> tuple[Tensor, ...]:
    """The slices along the first dimension that this process has something of, in its memory, each cut as they are."""
    if not hasattr(whole, "device_mesh"):
        return whole.unbind()
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(whole, DTensor)
    part, _ = own_part(whole)
    # Processes that divide the first dimension have different slices: they share none.
    sharing = [index for index, placement in enumerate(whole.placements) if not placement.is_shard(0)]
    placements = [Shard(p.dim - 1) if isinstance(p, Shard) else p for p in (whole.placements[i] for i in sharing)]
    if not any(placement.is_shard() for placement in placements):
        return part.unbind()
    mesh, dimensions = whole.device_mesh, whole.device_mesh.mesh_dim_names
    assert dimensions is not None
    if len(sharing) < mesh.ndim:
        mesh = mesh[tuple(dimensions[index] for index in sharing)]
    return tuple(DTensor.from_local(piece, mesh, placements, run_check=False) for piece in part)


def stack(slices: Sequence[Tensor], whole: Tensor) -> Tensor:
    """What `unstack` gave of a tensor like `whole`, as a tensor that is cut like it; a matrix is its only slice."""
    parts = [own_part(piece)[0] for piece in slices]
    if whole.ndim == 2:
        return like(parts[0], whole)
    return like(torch.stack(parts) if parts else torch.empty_like(own_part(whole)[0]), whole)
