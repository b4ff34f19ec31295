"""What one request carries about blending, from its first prefill piece to its response."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.counts import Counts
from sgl_blend.engine.request.detail import Detail
from sgl_blend.engine.request.options import RequestOptions, check_options, parse_options
from sgl_blend.engine.request.ways import Ways
from sgl_blend.errors import RequestError
from sgl_blend.gate.state import GateState
from sgl_blend.plan import BlendRecord, ReuseSpan
from sgl_blend.selection import POLICIES, Need, Policy

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import MultimodalInputs, Req


class StateMark(NamedTuple):
    """A request's state before a piece was planned (``RequestState.reset_to``)."""

    generation: int
    record: BlendRecord | None
    labels: np.ndarray | None
    tail_label: int


@dataclass
class Probe:
    """Marks a request of the gate's own: blended whatever the gate's state and the thresholds
    are, and not counted. spans: reuse these and look nothing up."""

    spans: list[ReuseSpan] | None = None


@dataclass
class RequestState:
    """Lives on SGLang's ``Req`` as ``_blend_state``; ``record`` also as ``_blend``."""

    options: RequestOptions
    policy: Policy
    ratio: float
    #: every reused token will be recomputed: nothing approximate comes of it
    exact: bool
    gate: GateState
    #: share of the summed score to cover (0: a fixed number of tokens)
    coverage: float = 0.0
    #: how it is blended beside that
    ways: Ways = Ways()  # noqa: RUF009 - immutable
    fallback: str | None = None
    next_begin: int | None = None
    #: how often the request had been retracted when its prefill began
    retractions: int = 0
    generation: int = 0
    decided: bool = False
    counts: Counts = field(default_factory=Counts)
    #: the prompt's prefill has been complete, and was counted; what is prefilled again is not
    counted: bool = False
    record: BlendRecord | None = None
    prompt_tokens: int = 0
    suffix_start: int = 0
    #: int64, where the chunks of all its tokens are cut; None before they were first looked up
    cuts: np.ndarray | None = None
    #: (start, end, digest) of the chunks between those cuts; None before they were asked for
    #: (``underway``)
    chunks: list[tuple[int, int, bytes]] | None = None
    #: how often it had to wait for a prefill batch of its own (``admission``)
    passed_over: int = 0
    #: how many batches it has waited for documents that others compute (``admission``)
    awaited: int = 0
    #: the ratio under which it was last taken into a batch whole though it is longer than a piece;
    #: None: it was not (``whole``)
    whole: float | None = None
    #: whether it found anything to reuse when it was last considered for a batch (``admission``)
    reuses: bool = False
    probe: Probe | None = None
    #: the ratio that was applied: ``ratio``, or more where loading left time for it
    used_ratio: float = -1.0
    #: how much may be recomputed while chunks are loading without taking longer
    free_ratio: float = 0.0
    #: what is told of single tokens; None: nobody asked (``blend_explain``), and it is not kept
    #: for those who ask later (``kept``)
    detail: Detail | None = None
    #: seconds of ``time.perf_counter``
    arrived: float = field(default_factory=time.perf_counter)
    #: how it takes part in measuring what blending saves (``measuring``); None: not at all
    measured: str | None = None
    #: since when, and how many seconds before that, it was left in the queue for blending's sake
    held_since: float | None = None
    held: float = 0.0
    #: highest estimated risk that it is answered with; 0: no bound
    max_risk: float = 0.0
    #: summed over its pieces so far; None before the first estimate
    risk: float | None = None
    #: position of its first image (or sound); None: the prompt is text
    media_start: int | None = None

    def __post_init__(self) -> None:
        self.used_ratio = self.ratio
        if self.options.explain:
            self.detail = Detail(self.arrived)

    @property
    def wants_blend(self) -> bool:
        return self.options.enabled and not self.exact and (self.gate.on or self.probe is not None)

    @property
    def by_default(self) -> bool:
        """Blended as the server is set: the request says nothing of how."""
        o = self.options
        said = (o.policy, o.ratio, o.coverage, o.max_risk)
        return all(wish is None for wish in said) and not Ways.stated(o)

    def mark(self) -> StateMark:
        record = self.record
        if record is None:
            return StateMark(self.generation, None, None, 0)
        return StateMark(self.generation, record, record.labels, record.tail_label)

    def reset_to(self, mark: StateMark, req: Req) -> None:
        """Forget the labels given since ``mark``. Labels are replaced, never written into."""
        self.generation = mark.generation
        self.record = mark.record
        attach.RECORD.set(req, mark.record)
        if mark.record is not None and mark.labels is not None:
            mark.record.labels, mark.record.tail_label = mark.labels, mark.tail_label


def state_of(req: Req, config: BlendConfig, gate: GateState) -> RequestState:
    """The request's state, made at first sight, which has to be its arrival (``read_options``): for
    beam search SGLang puts other sampling parameters in place of the request's own. Never raises:
    what the HTTP process let through and is malformed all the same falls back to full prefill."""
    state = attach.STATE.get(req)
    if state is None:
        fallback = None
        try:
            options = parse_options(
                req.sampling_params.custom_params,
                len(req.origin_input_ids),
                default=config.default == "on",
            )
            check_options(options, config)
        except RequestError:
            options, fallback = RequestOptions(enabled=False), "malformed blend options"
        policy = POLICIES.get(options.policy or config.policy)
        ratio = gate.ratio if options.ratio is None else options.ratio
        coverage = config.coverage if options.coverage is None else options.coverage
        if policy.need is Need.NOTHING:
            coverage = 0.0  # there is no score to cover
        exact = recomputes_all(policy, min(ratio, config.min_ratio) if coverage else ratio, config)
        state = RequestState(
            options,
            policy,
            ratio,
            exact,
            gate,
            coverage,
            Ways.of(config, options),
            fallback,
        )
        state.max_risk = config.max_risk if options.max_risk is None else options.max_risk
        attach.STATE.set(req, state)
        if fallback is None and not options.enabled:
            state.fallback = "disabled by the request"
            if options.off_by_default:
                state.fallback = "off by default"
    if state.media_start is None and req.multimodal_inputs is not None:
        # SGLang adds them after the request was made, and takes them away when it has finished.
        state.media_start = _media_start(req.multimodal_inputs)
    return state


def _media_start(inputs: MultimodalInputs) -> int:
    """Where in the prompt what is no text begins. From there on a token's position, on the three
    axes of a rotary embedding, need not be its index; before it nothing is known of it."""
    starts = [item.offsets[0][0] if item.offsets else 0 for item in inputs.mm_items]
    return min(starts, default=0)


def read_options(config: BlendConfig, gate: GateState):
    """AFTER ``Scheduler._create_generation_req``, "extension point for request-local state" (SGLang
    0.5.23)."""

    def created(req: Req, *args: Any, **kw: Any) -> None:
        state_of(req, config, gate)

    return created


def recomputes_all(policy: Policy, ratio: float, config: BlendConfig) -> bool:
    """Certain before any score: KV that is called exact by mistake would spread."""
    if policy.exact or ratio < 1.0:
        return policy.exact
    if policy.need is Need.NOTHING and config.leading_tokens:
        return False  # a fixed number of tokens, whatever the ratio
    return policy.budget(1, ratio) == 1


def namespace_of(req: Req, upto: int, config: BlendConfig, gate: GateState) -> str | None:
    """What the approximate KV of the prompt's first ``upto`` tokens is filed under, or None when
    the request must never see approximate KV.

    A digest over tenant, policy, what else says how it is blended, and tokens: KV repaired for
    another question, in another way or for another tenant has another name.
    """
    state = state_of(req, config, gate)
    if not state.wants_blend or unservable(req) is not None:
        return None
    tokens = np.frombuffer(req.origin_input_ids, dtype=np.int64)[:upto]
    h = hashlib.blake2b(digest_size=16)
    numbers = (state.ratio, state.coverage, state.max_risk, *state.ways)
    how = (state.policy.name, *(round(x, 9) for x in numbers))
    head = (req.extra_key, req.cache_salt, *how, upto)
    h.update(repr(head).encode())
    h.update(tokens.tobytes())
    return h.hexdigest()


def unservable(req: Req) -> str | None:
    """Why this request needs full prefill, or None. Attributes are ``Req``'s (SGLang 0.5.23)."""
    if req.multimodal_inputs is not None:
        return "multimodal input"
    if req.input_embeds is not None or req.positional_embed_overrides is not None:
        return "input embeddings"
    if req.session is not None:
        return "session"
    if req.return_hidden_states:
        return "hidden states requested"
    if req.return_routed_experts or req.return_indexer_topk:
        return "routed experts requested"
    if req.token_type_ids is not None:
        return "token types"
    if req.multi_item_delimiter_indices is not None or req.token_indices_to_pool is not None:
        return "scoring request"
    if (
        req.sampling_params.max_new_tokens == 0
        and req.return_logprob
        and req.logprob_start_len < len(req.origin_input_ids)
    ):
        # One that asks for no input logprobs is what n > 1 sends first to fill the cache: it is
        # blended like its siblings.
        return "scoring request"
    return None
