"""What a CPU server with ``--enable-blend`` runs with where the operator states nothing.

Only on the portable CPU platform (``engine/platform.py``). SGLang's own defaults are made for
accelerators: 16-bit floats, a KV pool of nearly all memory, a scheduler that polls, threads that
spin. Seams (SGLang 0.5.23): ``ServerArgs`` before its resolution (:func:`choose_early`);
``SRTPlatform.apply_server_args_defaults``, which runs in the launching process once the model's
path is known (:func:`choose`); the environment of that process, which its children inherit.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_blend import attach
from sgl_blend.engine.launch.say import say

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


#: the KV pool takes this share of the memory that is free at launch
POOL_SHARE = 4
#: ... and holds no more tokens than this: a CPU computes for minutes to fill it, and SGLang's
#: allocator copies its list of free slots whenever a request ends
POOL_TOKENS = 1 << 18
#: what weights and pool may take together
STATIC_SHARE = 0.9
#: tokens of a prefill piece. SGLang goes by the machine's memory (16,384 from 90 GB on): on a CPU
#: other requests would wait minutes for one such piece
PIECE = 2048
#: requests that run at once. SGLang's least is 2,048, and it keeps a row of the context's length
#: for each: gigabytes for a long context, for more requests than a CPU decodes in a day
RUNNING = 64
#: turns that a thread waits awake, tens of microseconds: about what going to sleep and being woken
#: costs. A blend of 1,372 tokens of a 135M model on two cores (alone, beside one busy thread,
#: beside two): 0.48, 7.3 and 2.7 s with OpenMP's own count, 0.74, 0.78 and 0.82 s without any,
#: 0.53, 1.1 and 0.95 s with this one
SPINS = "2000"
#: each rank's processors. Without it SGLang refuses more ranks than NUMA nodes
BIND = "SGLANG_CPU_OMP_THREADS_BIND"


def choose_early(server_args: ServerArgs) -> None:
    """The dtype, before anything reads the model's configuration. ``server_args`` is unresolved."""
    if applies(server_args) and server_args.dtype == "auto" and not has_amx():
        server_args.dtype = "float32"


def choose(defaults: Any, environ: MutableMapping[str, str] = os.environ) -> None:
    """The rest. ``defaults``: SGLang's resolving view, whose fields may be assigned."""
    if attach.CONFIG.get(defaults) is None:
        return
    said = [f"--dtype {defaults.dtype}"]

    def default(name: str, unset: Any, value: Any) -> None:
        if getattr(defaults, name) == unset:
            setattr(defaults, name, value)
            flag = "--" + name.replace("_", "-")
            said.append(flag if value is True else f"{flag} {value}")

    if defaults.mem_fraction_static is None:
        default("max_total_tokens", None, pool_tokens(defaults))
        default("mem_fraction_static", None, STATIC_SHARE)
    default("chunked_prefill_size", None, PIECE)
    default("max_running_requests", None, RUNNING)
    default("sleep_on_idle", False, True)
    said += [f"{name}={value}" for name, value in set_threads(environ, ranks(defaults)).items()]
    line = (
        f"no accelerator was found: serving on the CPU with {' '.join(said)} (state any of these "
        "yourself to change it)"
    )
    say(line, defaults)


def applies(server_args: ServerArgs) -> bool:
    """Does this server run on the portable CPU platform?"""
    from sglang.srt.platforms import current_platform

    from sgl_blend.engine.platform import PORTABLE_CPU

    device = (server_args.device or "cpu").split(":")[0]
    kind = type(current_platform)
    return device == "cpu" and f"{kind.__module__}.{kind.__qualname__}" == PORTABLE_CPU


def ranks(server_args: ServerArgs) -> int:
    """Scheduler processes on this machine."""
    return max(1, server_args.tp_size * server_args.dp_size // server_args.nnodes)


def has_amx() -> bool:
    """Has the CPU tiles for bfloat16? Without them float32 is the faster one."""
    import torch

    return torch.cpu._is_amx_tile_supported()


def pool_tokens(server_args: ServerArgs) -> int:
    """Slots of the KV pool: a share of the memory that is free now, a cgroup's limit included."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.configs.model_config import AttentionArch

    from sgl_blend.host_memory import available_memory

    model = model_config_of(server_args)
    if model.attention_arch == AttentionArch.MLA:  # one vector a token, on each rank
        numbers = model.kv_lora_rank + model.qk_rope_head_dim
    else:
        numbers = 2 * model.get_num_kv_heads(server_args.tp_size) * model.head_dim
    token = model.num_hidden_layers * numbers * model.dtype.itemsize
    tokens = available_memory() // POOL_SHARE // (token * ranks(server_args))
    # A rounded number is easier to read and to state.
    return max(1024, min(POOL_TOKENS, tokens // 1024 * 1024))


# -- threads -----------------------------------------------------------------------------------


def set_threads(environ: MutableMapping[str, str], ranks: int) -> dict[str, str]:
    """Set what the children's OpenMP reads when it is loaded, where ``environ`` says nothing;
    returns what was set.

    torch brings GNU's OpenMP, and our kernels run in its threads. By default a thread that waits
    at a barrier spins for milliseconds, while the thread that it waits for may wait for this very
    core: beside another busy program each of thousands of barriers costs a time slice.
    """
    chosen = {}
    if not environ.get("OMP_NUM_THREADS"):
        chosen["OMP_NUM_THREADS"] = str(max(1, usable_cpus() // ranks))
    if not environ.get("OMP_WAIT_POLICY") and not environ.get("GOMP_SPINCOUNT"):
        chosen["GOMP_SPINCOUNT"] = SPINS
    if ranks > 1 and not environ.get(BIND):
        chosen[BIND] = "|".join(_shares(sorted(os.sched_getaffinity(0)), ranks))
    environ.update(chosen)
    return chosen


def _shares(cpus: list[int], ranks: int) -> list[str]:
    """Each rank's processors, as SGLang writes them; ranks that are too many share them."""
    each = max(1, len(cpus) // ranks)
    at = [[cpus[(rank * each + i) % len(cpus)] for i in range(each)] for rank in range(ranks)]
    return [",".join(map(str, share)) for share in at]


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and the quota of its cgroups."""
    cpus = len(os.sched_getaffinity(0))
    quota = _cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, math.ceil(min(cpus, quota)))


def _cgroup_quota(membership: Path, root: Path) -> float:
    """The smallest CPU quota on the way from this process's cgroup (v2, or v1's cpu controller) to
    the root, in CPUs; infinite where there is none."""
    least = math.inf
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return least
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root
        elif "cpu" in controllers.split(","):
            base = root / controllers
        else:
            continue
        here = base / path.lstrip("/")
        # In a container the path may be the host's; its own limit then stands at the mount's root.
        for folder in {here, *here.parents, base}:
            if folder == base or base in folder.parents:
                least = min(least, _quota_of(folder))
    return least


def _quota_of(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
        if limit in ("max", "-1"):
            return math.inf
        return int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
