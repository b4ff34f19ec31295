"""Imported once by the fork server, so that each child starts within milliseconds."""

import sglang.benchmark.one_batch  # noqa: F401
import sglang.srt.mem_cache.kv_cache_builder  # noqa: F401
import sglang.srt.models.registry  # noqa: F401
import transformers  # noqa: F401

import sgl_blend.engine.wiring  # noqa: F401
