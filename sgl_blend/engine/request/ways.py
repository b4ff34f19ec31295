"""How a request is blended, beside its policy and how many tokens that recomputes."""

from __future__ import annotations

from typing import NamedTuple

from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.options import RequestOptions


class Ways(NamedTuple):
    """The configuration's options of these names, or the request's own."""

    correction: float = 0.0
    head_tokens: int = 0
    anchor_share: float = 0.0
    query_values: bool = False
    query_head_share: float = 0.0

    @classmethod
    def of(cls, config: BlendConfig, options: RequestOptions | None = None) -> Ways:
        wishes = {name: getattr(options, name, None) for name in cls._fields}
        return cls(*(getattr(config, n) if w is None else w for n, w in wishes.items()))

    @classmethod
    def stated(cls, options: RequestOptions) -> bool:
        """Does the request state any of them?"""
        return any(getattr(options, name) is not None for name in cls._fields)
