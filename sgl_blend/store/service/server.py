"""The store process: one thread that owns all state, and sockets around ``StoreCore``.

A ROUTER socket for each endpoint, the side socket that hands out shared memory, the connections
of its clients (whose closing frees their leases), and the job queue's wake-up all end in one poll
loop. Nothing in it blocks on a disk or a network.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from sgl_blend.errors import ConfigError
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.errors import ProtocolError, VersionMismatch
from sgl_blend.store.placement.jobs import Jobs
from sgl_blend.store.placement.residency import Residency
from sgl_blend.store.service.core import Client, StoreCore
from sgl_blend.store.tiers.base import Tier
from sgl_blend.store.wire import protocol as p
from sgl_blend.store.wire.security import Gate, check_endpoints, split_endpoint
from sgl_blend.store.wire.shm import Arena, SideSocket

log = logging.getLogger("sgl_blend.store")
_TICK_MS = 20
_BURST = 64


def make_tiers(config: StoreConfig) -> tuple[Tier | None, Tier | None]:
    """Disk tier and shared tier as configured. Raises ConfigError."""
    disk = remote = None
    if config.disk_path is not None:
        from sgl_blend.store.tiers.disk import DiskTier

        disk = DiskTier(config.disk_path, config.disk_serde, config.disk_fsync)
    if config.remote is not None:
        from sgl_blend.store.tiers.factory import make_shared_tier

        remote = make_shared_tier(
            config.remote,
            dict(config.remote_options),
            config.remote_serde,
            config.remote_deadline_s,
        )
    return disk, remote


class StoreServer:
    """``run()`` serves until drained or stopped. Raises ConfigError before it listens.

    parent_fd: a pipe's read end; when its writer is gone (the parent process ended, however),
    the store drains and stops.
    """

    def __init__(self, config: StoreConfig, parent_fd: int | None = None):
        self.config = config
        check_endpoints(config.endpoints, config.curve_secret is not None, config.insecure_tcp)
        self.id = secrets.token_bytes(16)
        self._parent_fd = parent_fd
        self._lock_fd = -1
        self._gate: Gate | None = None
        # For each endpoint: whether all of its clients are administrators.
        self._open_to_admins: list[bool] = []
        self._routers: list[zmq.Socket] = []
        self._sessions: dict[int, tuple[socket.socket, bytes]] = {}
        self._tokens: dict[int, bytes] = {}
        self._identities: dict[tuple[int, bytes], Client] = {}
        self._trackers: list[tuple[zmq.MessageTracker, Callable[[], None]]] = []
        self.snapshot: dict = {}
        self._signals = 0
        side = self._side_path()
        self._lock(side)
        self.jobs = Jobs(
            {
                "disk": 1,
                "read": config.disk_readers,
                "copy": 1,
                "remote": 2,
                "remote-put": 1,
                "sweep": 1,
            }
        )
        self.disk, self.remote = make_tiers(config)
        self.arena = Arena(config.memory_bytes)
        self.core = StoreCore(Residency(config, self.arena, self.jobs, self.disk, self.remote))
        # A collection over a million entries would stall lookups; entries hold no cycles.
        gc.disable()
        began = time.monotonic()
        chunks = self.core.res.restore()
        if chunks:
            log.info("found %d chunks on disk in %.2f s", chunks, time.monotonic() - began)
        if self.disk is not None:
            self.jobs.submit("sweep", self.disk.sweep, lambda *_: None)
        self.side = SideSocket(side)
        self.context = zmq.Context()
        self._poller = zmq.Poller()
        self._bind()
        self._poller.register(self.side.fileno(), zmq.POLLIN)
        self._poller.register(self.jobs.fileno(), zmq.POLLIN)
        if parent_fd is not None:
            self._poller.register(parent_fd, zmq.POLLIN)

    def _side_path(self) -> str:
        """Next to the first ipc:// endpoint, else in the runtime directory by port."""
        for endpoint in self.config.endpoints:
            scheme, rest = split_endpoint(endpoint)
            if scheme == "ipc":
                return rest + ".shm"
        port = self.config.endpoints[0].rpartition(":")[2]
        base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/sgl-blend-{os.getuid()}"
        name = port if port.isdigit() and port != "0" else secrets.token_hex(8)
        return f"{base}/sgl-blend-store-{name}.shm"

    def _lock(self, side: str) -> None:
        """One server for each address: a socket file alone does not tell a live one from a dead."""
        try:
            Path(side).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_fd = os.open(side + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ConfigError(f"a store already serves at {side!r}, or it cannot be: {e}") from e

    def _bind(self) -> None:
        config = self.config
        if config.curve_secret is not None:
            self._gate = Gate(
                self.context, config.curve_secret, config.curve_clients, config.curve_admins
            )
        self.addresses = []
        for endpoint in self.config.endpoints:
            router = self.context.socket(zmq.ROUTER)
            router.linger = 0
            # Bounds what libzmq will allocate for one frame before we have seen it.
            router.maxmsgsize = max(self.config.max_chunk_bytes, p.MAX_BODY) + 4096
            router.sndhwm = router.rcvhwm = 1000
            scheme, rest = split_endpoint(endpoint)
            if scheme == "tcp" and self._gate is not None:
                self._gate.guard(router)
            before = os.umask(0o177)
            try:
                router.bind(endpoint)
            except zmq.ZMQError as e:
                raise ConfigError(f"cannot listen on {endpoint}: {e}") from e
            finally:
                os.umask(before)
            self._routers.append(router)
            self._open_to_admins.append(scheme == "ipc" or self.config.insecure_admin)
            self._poller.register(router, zmq.POLLIN)
            self.addresses.append(router.last_endpoint.decode())

    # The loop.

    def run(self) -> int:
        """Serve until stopped; returns the process's exit code."""
        gc.freeze()
        sys.setswitchinterval(0.0005)
        next_tick = next_snapshot = 0.0
        try:
            while not self.core.stopping:
                ready = dict(self._poller.poll(2 if self._trackers else _TICK_MS))
                for n, router in enumerate(self._routers):
                    if router in ready:
                        self._serve(n, router)
                if self.jobs.fileno() in ready:
                    self.jobs.drain()
                if self.side.fileno() in ready:
                    self._greet()
                for fd in ready:
                    if fd in self._sessions:
                        self._hear(fd)
                if self._parent_fd is not None and self._parent_fd in ready:
                    self._poller.unregister(self._parent_fd)
                    self._parent_fd = None
                    self.core.begin_drain(True, lambda *_: None)
                if self._trackers:
                    self._release_sent()
                now = time.monotonic()
                if now >= next_tick:
                    self.core.tick()
                    next_tick = now + _TICK_MS / 1000
                    if self._signals:
                        self._on_signal()
                if now >= next_snapshot:
                    self.snapshot = self.stats()
                    next_snapshot = now + 1.0
                    gc.collect(0)
        finally:
            self.close()
        return 0

    def stats(self) -> dict:
        return {
            **self.core.operations.stats(),
            "shm_clients": len(self._sessions),
        }

    def install_signals(self) -> None:
        """SIGTERM and SIGINT drain; a second one stops at once. Main thread only."""
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, self._signalled)

    def _signalled(self, *_args) -> None:
        self._signals += 1

    def _on_signal(self) -> None:
        if self._signals > 1:
            self.core.stopping = True
        elif not self.core.refuse_stores:
            log.info("draining")
            self.core.begin_drain(True, lambda *_: None)

    def _greet(self) -> None:
        token = secrets.randbits(62) | 1
        conn = self.side.accept(self.id, token, self.arena)
        if conn is not None:
            client = b"shm" + token.to_bytes(8, "little")
            self._sessions[conn.fileno()] = (conn, client)
            self._tokens[token] = client
            self._poller.register(conn.fileno(), zmq.POLLIN)

    def _hear(self, fd: int) -> None:
        """Packets of a client that shares memory, or its end."""
        conn, client = self._sessions[fd]
        for _ in range(_BURST):
            try:
                packet = conn.recv(p.MAX_PACKET)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._ended(fd, conn, client)
                return
            self._serve_packet(conn, client, packet)

    def _serve_packet(self, conn: socket.socket, client: bytes, packet: bytes) -> None:
        request_id = packet[len(p.PREAMBLE) :][: p.REQUEST_ID_BYTES]
        request_id = request_id.ljust(p.REQUEST_ID_BYTES, b"\0")

        def reply(message, parts=(), sent=None) -> None:
            try:
                conn.send(p.pack(request_id, message))
            except OSError:
                # It is gone, or reads nothing: as a ROUTER does, we drop what it does not take.
                self.core.res.counters["replies_dropped"] += 1

        def serve() -> None:
            _, body = p.unpack(packet)
            request = p.decode_request(body)
            if not p.fits_packet(request):
                raise ProtocolError(f"{type(request).__name__} does not go over the side socket")
            self.core.handle(Client(client, True, admin=True), request, (), reply)

        self._answer(serve, reply)

    def _ended(self, fd: int, conn: socket.socket, client: bytes) -> None:
        self._poller.unregister(fd)
        del self._sessions[fd]
        conn.close()
        self._tokens = {t: c for t, c in self._tokens.items() if c != client}
        self._identities = {i: c for i, c in self._identities.items() if c.id != client}
        self.core.client_gone(client)

    def _serve(self, n: int, router: zmq.Socket) -> None:
        for _ in range(_BURST):
            try:
                identity = router.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            frames, dropped = [], False
            while router.getsockopt(zmq.RCVMORE):
                frame = router.recv(zmq.NOBLOCK, copy=False)
                if len(frames) < p.MAX_FRAMES:
                    frames.append(frame)
                else:
                    dropped = True
            self._one(n, router, identity, frames, dropped)

    def _one(self, n: int, router, identity: bytes, frames: list, dropped: bool) -> None:
        request_id = b""
        if len(frames) > 1 and len(frames[1]) == p.REQUEST_ID_BYTES:
            request_id = frames[1].bytes

        def reply(message, parts=(), sent=None) -> None:
            out = [identity, p.PREAMBLE, request_id, p.encode(message)]
            if not parts:
                router.send_multipart(out, zmq.NOBLOCK)
                return
            tracker = router.send_multipart(
                [*out, *map(memoryview, parts)], zmq.NOBLOCK, copy=False, track=True
            )
            self._trackers.append((tracker, sent))

        def serve() -> None:
            if len(frames) < 3 or dropped or not request_id:
                raise ProtocolError("a message is preamble, request id, body, and payload frames")
            if len(frames[0]) > 64:
                raise ProtocolError("not a message of the chunk store")
            p.check_preamble(frames[0].bytes)
            request = p.decode_request(frames[2].buffer)
            if isinstance(request, p.Hello):
                reply(self._hello(n, identity, request))
                return
            client = self._identities.get((n, identity))
            if client is None:
                admin = self._open_to_admins[n]
                admin = admin or (self._gate is not None and self._gate.is_admin(frames[0]))
                client = Client(b"net%d:" % n + identity, False, admin)
            self.core.handle(client, request, [f.buffer for f in frames[3:]], reply)

        self._answer(serve, reply)

    def _answer(self, serve: Callable[[], None], reply: Callable[..., None]) -> None:
        """Run ``serve``, which replies, now or later; whatever it raises becomes the reply."""
        try:
            serve()
        except ProtocolError as e:
            self.core.res.counters["malformed"] += 1
            code = "version" if isinstance(e, VersionMismatch) else "malformed"
            reply(p.Failure(code, str(e)[:1000]))
        except Exception as e:
            # The last line of defence: one request's bug must not end everyone's store.
            log.exception("request failed")
            self.core.res.counters["internal_errors"] += 1
            reply(p.Failure("internal", f"{type(e).__name__}: {e}"[:1000]))

    def _hello(self, n: int, identity: bytes, request: p.Hello) -> p.Welcome:
        client = self._tokens.get(request.session)
        if client is not None:
            # The token came over the side socket, which only this user can connect to.
            self._identities[(n, identity)] = Client(client, True, admin=True)
        return p.Welcome(
            server=self.id,
            version=p.VERSION,
            shm=self.side.path,
            arena_bytes=self.arena.capacity,
            read_only=self.core.read_only,
            limits=p.Limits(
                p.MAX_BATCH,
                self.config.max_chunk_bytes,
                self.config.lease_s,
                self.core.lease_quota,
            ),
        )

    def _release_sent(self) -> None:
        waiting = []
        for tracker, sent in self._trackers:
            if tracker.done:
                if sent is not None:
                    sent()
            else:
                waiting.append((tracker, sent))
        self._trackers = waiting

    def close(self) -> None:
        """Stop listening and let go of everything. Idempotent."""
        if self._lock_fd < 0:
            return
        self.jobs.close()
        for router in self._routers:
            # The last replies (a drain's among them) get a moment to leave.
            router.close(200)
        if self._gate is not None:
            self._gate.stop()
        self.context.term()
        for conn, _ in self._sessions.values():
            conn.close()
        self.side.close()
        for tier in (self.disk, self.remote):
            if tier is not None:
                tier.close()
        self.arena.close()
        os.close(self._lock_fd)
        self._lock_fd = -1
