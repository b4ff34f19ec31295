"""Every attribute that sgl-blend puts on SGLang's objects, and the one way to read and write it.

SGLang's objects carry what belongs to a request or a batch from one hook to the next. Their
classes have no room for it, so it is set as an attribute. The names begin with an underscore:
``ServerArgs`` is sealed against new public names, and pickles private ones to its child processes.
"""

from __future__ import annotations

from typing import Any


class Attachment:
    """One attribute. ``get`` gives None where it was never set."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def get(self, owner: Any) -> Any:
        return getattr(owner, self.name, None)

    def set(self, owner: Any, value: Any) -> None:
        setattr(owner, self.name, value)


# On ``ServerArgs``; they travel to the scheduler processes.
#: ``config.BlendConfig``: blending is switched on
CONFIG = Attachment("_blend_config")
#: bool: a command line is behind the arguments. An error is then one line and an exit status;
#: where a program called, it is an exception
COMMAND_LINE = Attachment("_blend_command_line")
#: str: random, the same in all processes of one launch of a server
LAUNCH = Attachment("_blend_launch")
#: str: address of the store that this server started for itself
STORE = Attachment("_blend_store")

# On ``Req``, in the scheduler process.
#: ``plan.BlendRecord``: which of its KV is exact
RECORD = Attachment("_blend")
#: ``engine.request.state.RequestState``
STATE = Attachment("_blend_state")
#: (start, length) of the approximate prefix that the last match gave, in tokens
PREFIX = Attachment("_blend_prefix")
#: ``tiering.loader.Load``: what the chunk store is bringing
LOAD = Attachment("_blend_load")

# On ``PrefillAdder``.
#: int: requests that it has looked at and passed over (``engine.request.admission``)
PASSED = Attachment("_blend_passed")
#: ``engine.request.whole.WholeBatch``: may its batch hold prompts longer than a piece, does it?
WHOLE = Attachment("_blend_whole")
#: set of bytes: chunks that prefill is computing just now (``engine.request.underway``)
UNDERWAY = Attachment("_blend_underway")

# On ``ForwardBatch``.
#: ``engine.request.planner.PlannedBatch``
PIECES = Attachment("_blend_pieces")
#: bool: runs without prefill graphs, which would leave our attention out
EAGER = Attachment("_blend_eager")

# On ``ReqState``, in the HTTP process.
#: dict: the report of ``engine.request.report``
REPORT = Attachment("_blend_report")

# On ``GenerateReqInput``, in the HTTP process.
#: str: the id of the request whose prompt was checked; its copies for several answers share it
PROMPT = Attachment("_blend_prompt")
