"""Weights that are replaced while the server runs, as far as stored chunks are concerned.

Seams (SGLang 0.5.23): AROUND the four ``update_weights_from_*`` of
``SchedulerWeightUpdaterManager`` and its ``end_weight_update``; BEFORE its
``flush_cache_after_weight_update``, which is called once the served model has new weights, whether
or not the cache can be flushed then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sgl_blend.engine import seams
from sgl_blend.engine.request.store_space import StoreSpace
from sgl_blend.tree.cache import BlendRadixCache


class WeightUpdates:
    """space: is told of each update. let_go: called after each, for what was loaded before it."""

    def __init__(
        self, space: StoreSpace, tree: BlendRadixCache, let_go: Callable[[], None]
    ) -> None:
        self._space, self._tree, self._let_go = space, tree, let_go
        self._reached = False
        self._mixed: int | None = None

    @property
    def mixed(self) -> bool:
        """The tree holds KV of other weights beside that of the present ones: it has not been
        emptied since an update. No chunk of it may be stored."""
        return self._mixed == self._tree.lives

    def hooks(self) -> Iterator[tuple[str, Callable[..., Any], str]]:
        """(target, hook, kind) for ``seams.install``."""
        yield seams.FLUSH_AFTER_UPDATE, self._before_flush, "before"
        yield seams.UPDATE_FROM_DISK, self._around(all_of_them=True), "around"
        yield seams.UPDATE_FROM_IPC, self._around(), "around"
        for target in (seams.UPDATE_FROM_DISTRIBUTED, seams.UPDATE_FROM_TENSOR):
            # Refused outside of a session, before anything is touched.
            yield target, self._around(lambda session: session is not None), "around"
        # Where the session loaded nothing, another machine has written into the weights.
        remote = self._around(lambda session: session is not None and not session.loaded_weights)
        yield seams.END_UPDATE, remote, "around"

    def _before_flush(self, *args: Any, **kw: Any) -> None:
        self._reached = True

    def _around(
        self, touches: Callable[[Any], bool] = lambda session: True, all_of_them: bool = False
    ) -> Callable[..., Any]:
        """A hook for one way to update. touches: tells from the updater's session whether the
        weights are written to at all."""

        def update(original: Any, updater: Any, *args: Any, **kw: Any) -> Any:
            if not touches(updater._session):
                return original(updater, *args, **kw)
            before, self._reached, succeeded = self._tree.lives, False, False
            try:
                result = original(updater, *args, **kw)
                succeeded = result.success or self._reached
            finally:
                self._space.weights_replaced(succeeded=succeeded, all_of_them=all_of_them)
                if self._tree.lives == before:
                    self._mixed = before
                self._let_go()
            return result

        return update
