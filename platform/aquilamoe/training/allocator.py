"""How training keeps its memory: as growth does, see `aquilamoe.weights.allocator`."""

from aquilamoe.weights.allocator import keep_large_buffers

__all__ = ["keep_large_buffers"]
