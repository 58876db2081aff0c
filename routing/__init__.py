"""routing: decides who goes where. Knows only "E choices", be they experts, heads or exits."""

from routing.balance import updated_selection_bias
from routing.config import CapacityConfig, Config, RouterConfig, SelectionBiasConfig
from routing.losses import balance_loss, z_loss
from routing.router import Router
from routing.stats import RoutingReport, add_stats, load, max_over_mean, report, summarize
from routing.types import Routing, RoutingStats

__all__ = [
    "CapacityConfig",
    "Config",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingReport",
    "RoutingStats",
    "SelectionBiasConfig",
    "add_stats",
    "balance_loss",
    "load",
    "max_over_mean",
    "report",
    "summarize",
    "updated_selection_bias",
    "z_loss",
]
