"""Transfers of knowledge: each method is a factory of pure functions over parameter pytrees."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from merge_jax.transfers.adapters.adapter import adapter_transfer
    from merge_jax.transfers.adapters.lpka import LPKA, LPKAOptions, lpka_network
    from merge_jax.transfers.adapters.mergenet import lpka_transfer, published_transfer
    from merge_jax.transfers.adapters.mixing import mlp_transfer
    from merge_jax.transfers.adapters.parameter_generator import parameter_generator_transfer
    from merge_jax.transfers.adapters.published import (
        PublishedAdapter,
        export_published_adapter,
        load_published_adapter,
    )
    from merge_jax.transfers.alignment.aligned import align, aligned_transfer
    from merge_jax.transfers.base import RouteSummary, Transfer, identity_transfer
    from merge_jax.transfers.channels.axes import ChannelGraph
    from merge_jax.transfers.channels.graph import LayerMoments, channel_graph, input_moments, layer_moments
    from merge_jax.transfers.combinators import chain, scheduled, self_transfer, several_sources, without_source
    from merge_jax.transfers.describe import summarize
    from merge_jax.transfers.fitted.refit import FewRowsWarning, Refit, refit
    from merge_jax.transfers.linear_operators import linear_operator_transfer
    from merge_jax.transfers.low_rank import LowRankConv, LowRankDense, decode, encode, row_basis
    from merge_jax.transfers.matching import match
    from merge_jax.transfers.optimal_transport import optimal_transport_transfer
    from merge_jax.transfers.routes import Route
    from merge_jax.transfers.rows import Rows
    from merge_jax.transfers.sharing import share_transfer
    from merge_jax.transfers.vocabulary import match_vocabulary
    from merge_jax.transfers.weight_selection import weight_selection_transfer

__all__ = [
    "LPKA",
    "ChannelGraph",
    "FewRowsWarning",
    "LPKAOptions",
    "LayerMoments",
    "LowRankConv",
    "LowRankDense",
    "PublishedAdapter",
    "Refit",
    "Route",
    "RouteSummary",
    "Rows",
    "Transfer",
    "adapter_transfer",
    "align",
    "aligned_transfer",
    "chain",
    "channel_graph",
    "decode",
    "encode",
    "export_published_adapter",
    "identity_transfer",
    "input_moments",
    "layer_moments",
    "linear_operator_transfer",
    "load_published_adapter",
    "lpka_network",
    "lpka_transfer",
    "match",
    "match_vocabulary",
    "mlp_transfer",
    "optimal_transport_transfer",
    "parameter_generator_transfer",
    "published_transfer",
    "refit",
    "row_basis",
    "scheduled",
    "self_transfer",
    "several_sources",
    "share_transfer",
    "summarize",
    "weight_selection_transfer",
    "without_source",
]
