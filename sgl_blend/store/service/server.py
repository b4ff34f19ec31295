"""The store process: one thread that owns all state, and sockets around ``StoreCore``.

A ROUTER socket for each endpoint, the side socket that hands out shared memory, the connections
of its clients (whose closing frees their leases), and the job queue's wake-up all end in one poll
loop. Nothing in it blocks on a disk or a network.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable

import zmq

from sgl_blend.store.config import StoreConfig
from sgl_blend.store.errors import ProtocolError, VersionMismatch
from sgl_blend.store.placement.jobs import Jobs
from sgl_blend.store.placement.residency import Residency
from sgl_blend.store.service.core import StoreCore
from sgl_blend.store.service.lending import Client
from sgl_blend.store.service.listen import listen, lock_address, side_path
from sgl_blend.store.throttle import Throttle
from sgl_blend.store.tiers.factory import make_tiers
from sgl_blend.store.wire import protocol as p
from sgl_blend.store.wire.security import check_endpoints
from sgl_blend.store.wire.shm import Arena, SideSocket

log = logging.getLogger("sgl_blend.store")
_TICK_MS = 20
_BURST = 64


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
        self._sessions: dict[int, tuple[socket.socket, bytes]] = {}
        self._tokens: dict[int, bytes] = {}
        self._identities: dict[tuple[int, bytes], Client] = {}
        self._trackers: list[tuple[zmq.MessageTracker, Callable[[], None]]] = []
        self.snapshot: dict = {}
        self._signals = 0
        self._log = Throttle(log)
        side = side_path(config)
        self._lock_fd = lock_address(side)
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
        began = time.monotonic()
        chunks = self.core.res.restore()
        if chunks:
            log.info("found %d chunks on disk in %.2f s", chunks, time.monotonic() - began)
        if self.disk is not None:
            self.jobs.submit("sweep", self.disk.sweep, lambda *_: None)
        self.side = SideSocket(side)
        self.context = zmq.Context()
        self._poller = zmq.Poller()
        self._gate, self._doors = listen(self.context, config)
        self.addresses = [door.address for door in self._doors]
        for door in self._doors:
            self._poller.register(door.router, zmq.POLLIN)
        self._poller.register(self.side.fileno(), zmq.POLLIN)
        self._poller.register(self.jobs.fileno(), zmq.POLLIN)
        if parent_fd is not None:
            self._poller.register(parent_fd, zmq.POLLIN)

    # The loop.

    def run(self) -> int:
        """Serve until stopped; returns the process's exit code."""
        next_tick = next_snapshot = 0.0
        try:
            while not self.core.stopping:
                soon = self._trackers or self.jobs.restless
                ready = dict(self._poller.poll(2 if soon else _TICK_MS))
                for n, door in enumerate(self._doors):
                    if door.router in ready:
                        self._guarded(self._serve, n, door.router)
                if self.jobs.fileno() in ready or self.jobs.restless:
                    self.jobs.drain(self._failed)
                if self.side.fileno() in ready:
                    self._guarded(self._greet)
                for fd in ready:
                    if fd in self._sessions:
                        self._guarded(self._hear, fd)
                if self._parent_fd is not None and self._parent_fd in ready:
                    self._poller.unregister(self._parent_fd)
                    self._parent_fd = None
                    self._drain_and_stop()
                if self._trackers:
                    self._release_sent()
                now = time.monotonic()
                if now >= next_tick:
                    for chore in self.core.chores:
                        self._guarded(chore)
                    next_tick = now + _TICK_MS / 1000
                    if self._signals:
                        self._on_signal()
                if now >= next_snapshot:
                    self._guarded(self._take_snapshot)
                    next_snapshot = now + 1.0
                    gc.collect(0)
        finally:
            self.close()
        return 0

    def _guarded(self, step: Callable[..., None], *args: object) -> None:
        """The loop's steps serve everyone: what goes wrong in one of them must not end the
        store."""
        try:
            step(*args)
        except Exception as e:
            self._failed(e)

    def _failed(self, error: Exception) -> None:
        self.core.res.counters["internal_errors"] += 1
        self._log.warning(
            f"{type(error).__name__}", "a step of the store's loop failed: %s", error, error=error
        )

    def _drain_and_stop(self) -> None:
        try:
            self.core.begin_drain(True, lambda *_: None)
        except Exception as e:
            self._failed(e)
            self.core.stopping = True

    def _take_snapshot(self) -> None:
        self.snapshot = self.stats()

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
        elif not self.core.mode.refuse_stores:
            log.info("draining")
            self._drain_and_stop()

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
                # It is gone, or reads nothing.
                self._drop(client, message)

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
        self.core.lending.client_gone(client)

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
            try:
                if not parts:
                    router.send_multipart(out, zmq.NOBLOCK)
                    return
                tracker = router.send_multipart(
                    [*out, *map(memoryview, parts)], zmq.NOBLOCK, copy=False, track=True
                )
            except zmq.ZMQError:
                # It is gone, or its queue is full.
                known = self._identities.get((n, identity))
                self._drop(known.id if known else b"net%d:" % n + identity, message)
                if sent is not None:
                    sent()
                return
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
                admin = self._doors[n].all_admins
                admin = admin or (self._gate is not None and self._gate.is_admin(frames[0]))
                client = Client(b"net%d:" % n + identity, False, admin)
            self.core.handle(client, request, [f.buffer for f in frames[3:]], reply)

        self._answer(serve, reply)

    def _drop(self, client: bytes, reply: p.Reply) -> None:
        self.core.res.counters["replies_dropped"] += 1
        self.core.lending.take_back(client, reply)

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
            read_only=self.core.mode.read_only,
            limits=p.Limits(
                p.MAX_BATCH,
                self.config.max_chunk_bytes,
                self.config.lease_s,
                self.core.lending.quota,
            ),
        )

    def _release_sent(self) -> None:
        waiting = []
        for tracker, sent in self._trackers:
            if tracker.done:
                if sent is not None:
                    self._guarded(sent)
            else:
                waiting.append((tracker, sent))
        self._trackers = waiting

    def close(self) -> None:
        """Stop listening and let go of everything. Idempotent."""
        if self._lock_fd < 0:
            return
        self.jobs.close()
        for door in self._doors:
            # The last replies (a drain's among them) get a moment to leave.
            door.router.close(200)
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
