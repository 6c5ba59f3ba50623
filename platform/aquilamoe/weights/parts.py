"""What a process holds of a tensor that several share, and where that lies in the whole."""

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
