from aquilamoe.tracking.lineage import comparison_url, lineage, ui_command
from aquilamoe.tracking.observer import Tracker

__all__ = ["Tracker", "comparison_url", "lineage", "ui_command"]
