"""Which reused tokens are recomputed: one file a policy, one registry.

A policy turns scores into rows and says which pass it needs (:class:`Need`). To add one, write
a file here with a :class:`Policy` subclass, and name it in ``POLICIES`` below.
"""

from sgl_blend.config import BlendConfig
from sgl_blend.selection.anchors import HEAD_APART, anchors, head_tokens, head_weights
from sgl_blend.selection.base import (
    Need,
    Policy,
    ReusedTokens,
    budget_of,
    highest,
    highest_of,
    select_together,
)
from sgl_blend.selection.fixed import All, Leading, None_, Random
from sgl_blend.selection.hkvd import Hkvd
from sgl_blend.selection.query import Query
from sgl_blend.selection.registry import Registry
from sgl_blend.selection.stored import Stored

POLICIES: Registry[Policy] = Registry("blend policy")
for _policy in (Query(), Hkvd(), Stored(), Leading(), Random(), All(), None_()):
    POLICIES.register(_policy.name, _policy)


def keeps_scores(config: BlendConfig) -> bool:
    """Does a server with ``config`` measure what ``Need.STORED`` reads?"""
    return config.stored_scores or POLICIES.get(config.policy).need is Need.STORED


__all__ = [
    "HEAD_APART",
    "POLICIES",
    "Need",
    "Policy",
    "ReusedTokens",
    "anchors",
    "budget_of",
    "head_tokens",
    "head_weights",
    "highest",
    "highest_of",
    "keeps_scores",
    "select_together",
]
