"""A store of one's own: started as a child process, and gone with its parent however that ends.

The child holds the read end of a pipe whose other end only the parent has: when the parent exits,
or is killed, the kernel closes it, and the child drains, stops and removes the folder it listened
in. Where both are killed, the next store that is started so removes it.
"""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import msgspec

from sgl_blend.folders import OwnedFolder
from sgl_blend.store.config import StoreConfig, load_config
from sgl_blend.store.errors import StoreError

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 60.0


class EmbeddedStore:
    """``EmbeddedStore(config)`` returns once the store answers. Raises StoreError if it does not.

    Without endpoints in ``config`` that others should know, pass ``private=True``: the store then
    listens in a fresh directory that goes with it. log: file for the child's output. keep: start
    it again, at the same address, when it ends without having been asked to: after a second, then
    after ever longer pauses of up to a minute while it keeps ending.
    """

    def __init__(
        self,
        config: StoreConfig,
        *,
        private: bool = True,
        start_s: float = 20.0,
        log: str | Path | None = None,
        keep: bool = False,
    ):
        self._folder = OwnedFolder("sgl-blend-store-") if private else None
        if self._folder is not None:
            endpoint = f"ipc://{self._folder.path}/store"
            config = replace(config, endpoints=(endpoint,))
        self.config = config
        self.endpoint = config.endpoints[0]
        self._log, self._start_s = log, start_s
        self._stopping = threading.Event()
        #: guards ``process`` and ``_write_end`` while they are replaced
        self._lock = threading.Lock()
        try:
            self._start()
        except StoreError:
            self.stop()
            raise
        if keep:
            threading.Thread(target=self._keep, name="blend-store-keeper", daemon=True).start()

    def _start(self) -> None:
        read_end, self._write_end = os.pipe()
        env = dict(os.environ)
        root = str(Path(__file__).resolve().parents[2])
        env["PYTHONPATH"] = os.pathsep.join(p for p in (root, env.get("PYTHONPATH")) if p)
        folder = ["--folder", str(self._folder.path)] if self._folder is not None else []
        err = open(self._log, "ab") if self._log else None
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sgl_blend.store", "--parent-fd", str(read_end), *folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                pass_fds=(read_end,),
                env=env,
                # A Ctrl-C at the terminal is the parent's to handle; the pipe tells the child.
                start_new_session=True,
            )
        finally:
            os.close(read_end)
            if err is not None:
                err.close()
        self.process.stdin.write(encode_config(self.config))
        self.process.stdin.close()
        self._wait()

    def _keep(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            begun = time.monotonic()
            code = self.process.wait()
            if time.monotonic() - begun > _MAX_PAUSE_S:
                pause = _FIRST_PAUSE_S  # it had been well for a while
            if self._stopping.is_set():
                return
            logger.warning("sgl-blend: the chunk store ended (exit code %d); starting it", code)
            if self._stopping.wait(pause):
                return
            pause = min(_MAX_PAUSE_S, 2 * pause)
            with self._lock:
                if self._stopping.is_set():
                    return
                self._end(0.0)
                try:
                    self._start()
                except (StoreError, OSError) as e:
                    logger.warning("sgl-blend: the chunk store did not start: %s", e)

    def _wait(self) -> None:
        """Until the child says that it listens (an answer at its address could be another's)."""
        ready, _, _ = select.select([self.process.stdout], [], [], self._start_s)
        line = self.process.stdout.readline() if ready else b""
        if not line.startswith(b"ready "):
            if not ready:
                self.process.kill()
            code = self._end(self.config.drain_s + 5)
            failed, _, reason = line.decode(errors="replace").strip().partition(" ")
            reason = reason if failed == "failed" else f"it ended with exit code {code}"
            raise StoreError(f"the chunk store did not start: {reason}")
        self.addresses = line.decode().split()[1:]

    def stop(self, timeout_s: float | None = None) -> int:
        """Drain, stop, and wait; killed when that takes longer. Returns the exit code.
        Idempotent."""
        self._stopping.set()
        with self._lock:
            code = self._end(timeout_s or self.config.drain_s + 5)
        if self._folder is not None:
            self._folder.cleanup()
        return code

    def _end(self, timeout_s: float) -> int:
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.process.stdout.close()
        return code

    def __enter__(self) -> EmbeddedStore:
        return self

    def __exit__(self, *_exc) -> None:
        self.stop()


def encode_config(config: StoreConfig) -> bytes:
    """For a child's standard input: options never show in a process list."""
    return msgspec.json.encode(config)


def decode_config(raw: bytes) -> StoreConfig:
    """What the parent resolved; the environment has been heard there."""
    return load_config(None, environ={}, **msgspec.json.decode(raw))
