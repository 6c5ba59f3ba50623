"""EfficientScale: train a small language model, grow it, upcycle it, and find out which way of growing is best."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aquilamoe.api import GrownCheckpoint, GrowthPlan, Store, certify, grow, plan_growth, shrink, upcycle

__version__ = "0.1.0"
__all__ = ["GrownCheckpoint", "GrowthPlan", "Store", "certify", "grow", "plan_growth", "shrink", "upcycle"]


def __getattr__(name: str) -> Any:
    """Import the public names on first access: importing a part of the package stays cheap."""
    if name in __all__:
        from aquilamoe import api

        return getattr(api, name)
    raise AttributeError(f"module 'aquilamoe' has no attribute '{name}'")
