"""Every SGLang symbol that sgl-blend hooks, and the check at launch of all that it relies on.

SGLang logs and swallows exceptions that plugins raise, and skips hooks whose target is gone.
A silent no-op would serve wrong expectations, so :func:`verify` resolves each target itself, and
what ``sglang_symbols.py`` lists beside them.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from sgl_blend.engine.sglang_symbols import OVERRIDDEN, USED
from sgl_blend.errors import SeamError

SGLANG_VERSION = "0.5.23"

SERVER_ARGS_ADD = "sglang.srt.server_args.ServerArgs.add_cli_args"
SERVER_ARGS_FROM = "sglang.srt.server_args.ServerArgs.from_cli_args"
SERVER_ARGS_RESOLVE = "sglang.srt.server_args.ServerArgs.resolve_once"
VALIDATE_REQUEST = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
UPDATE_META_INFO = "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info"
WAIT_ONE_RESPONSE = "sglang.srt.managers.tokenizer_manager.TokenizerManager._wait_one_response"
FORWARD_BATCH_INIT = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
PREFILL_ADD_ONE = "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req"
REQUEST_CREATED = "sglang.srt.managers.scheduler.Scheduler._create_generation_req"
REQUEST_ARRIVES = "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue"
SCHEDULER_IDLE = "sglang.srt.managers.scheduler.Scheduler.on_idle"
PREFILL_BOOTSTRAPPED = "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.finalize_bootstrap"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
FLUSH_AFTER_UPDATE = _UPDATER + ".flush_cache_after_weight_update"
UPDATE_FROM_DISK = _UPDATER + ".update_weights_from_disk"
UPDATE_FROM_DISTRIBUTED = _UPDATER + ".update_weights_from_distributed"
UPDATE_FROM_TENSOR = _UPDATER + ".update_weights_from_tensor"
UPDATE_FROM_IPC = _UPDATER + ".update_weights_from_ipc"
END_UPDATE = _UPDATER + ".end_weight_update"
EAGER_LOAD_BATCH = "sglang.srt.model_executor.runner.eager_runner.EagerRunner.load_batch"
PREFILL_GRAPH_CAN_RUN = (
    "sglang.srt.model_executor.runner.prefill_cuda_graph_runner"
    ".PrefillCudaGraphRunner.can_run_graph"
)
ROPE_OF_LATENTS = "sglang.srt.layers.rotary_embedding.factory.get_rope_cpu"
INTERNAL_STATE = (
    "sglang.srt.managers.scheduler_components.internal_state"
    ".SchedulerInternalStateController.get_internal_state"
)
REQUEST_LEVEL_INFO = (
    "sglang.srt.managers.scheduler_components.output_streamer"
    ".SchedulerOutputStreamer.is_request_level_customized_info_key"
)

#: every hooked symbol, named above; the model's own ``forward`` is hooked on its concrete class
HOOKS = tuple(
    value
    for name, value in list(globals().items())
    if name.isupper() and not name.startswith("_") and str(value).startswith("sglang.")
)


def verify() -> None:
    """Raise :class:`SeamError` naming the SGLang version or the symbol that does not fit."""
    for problem in problems():
        raise SeamError(problem)


def problems() -> Iterator[str]:
    """What of the installed SGLang does not fit, one after another. Imports it."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        yield f"sglang is not installed; sgl-blend needs sglang=={SGLANG_VERSION}"
        return
    if found != SGLANG_VERSION:
        yield (
            f"sgl-blend is built for sglang {SGLANG_VERSION}, found {found}: install "
            f"sglang=={SGLANG_VERSION} or a matching sgl-blend"
        )
    for target in (*HOOKS, *USED, *OVERRIDDEN):
        try:
            symbol = pkgutil.resolve_name(target)
        except (ImportError, AttributeError, ValueError) as e:
            yield f"sglang {found} lacks {target} ({e}); sgl-blend cannot work with it"
            continue
        expected = OVERRIDDEN.get(target)
        if expected is None:
            continue
        takes = f"({', '.join(inspect.signature(symbol).parameters)})"
        if takes != expected:
            yield f"sglang {found}: {target} takes {takes}, but sgl-blend overrides {expected}"


def install(target: str, hook, kind: str) -> None:
    """Register and apply one hook; raise :class:`SeamError` when SGLang did not apply it.

    ``kind``: ``"before"``, ``"after"`` or ``"around"`` (``plugins/hook_registry.py``, 0.5.23).
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # The registry skips targets it has patched before; a second hook there would be lost.
    if target in HookRegistry._patched:
        raise SeamError(f"{target} is already hooked; another plugin holds it")
    HookRegistry.register(target, hook, HookType(kind))
    HookRegistry.apply_hooks()
    if target not in HookRegistry._patched:
        raise SeamError(f"SGLang could not apply the hook on {target}; its log says why")
