"""The pretended device sees what would wait, and nothing else. Needs: CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from on_device import CUDA, OnDevice, on_device, on_host, watching

from sgl_blend.ops import upload, upload_together

CPU = torch.device("cpu")


def _put(x, index, value):
    x[index] = value


#: (what, what is done with fp32 [6], a host's int64 index, the device's, and a mask of the device)
WAITS = [
    ("reads a value", lambda x, host, index, mask: x[1].item()),
    ("reads a value", lambda x, host, index, mask: float(x.sum())),
    ("reads a value", lambda x, host, index, mask: bool((x > 0).all())),
    ("reads a value", lambda x, host, index, mask: x.tolist()),
    ("reads a value", lambda x, host, index, mask: x[: index[1]]),
    ("reads a value", lambda x, host, index, mask: x[index[1]]),
    ("reads a value", lambda x, host, index, mask: range(index[1])),
    ("nonzero", lambda x, host, index, mask: torch.nonzero(mask)),
    ("nonzero", lambda x, host, index, mask: torch.where(mask)),
    ("a mask as an index", lambda x, host, index, mask: x[mask]),
    ("a mask as an index", lambda x, host, index, mask: _put(x, mask, x[index[:1]].expand(6)[:3])),
    ("masked_select", lambda x, host, index, mask: x.masked_select(mask)),
    ("unique", lambda x, host, index, mask: torch.unique(index)),
    ("bincount", lambda x, host, index, mask: torch.bincount(index)),
    ("equal", lambda x, host, index, mask: torch.equal(x, x)),
    ("repeat_interleave by a tensor", lambda x, host, index, mask: x[:3].repeat_interleave(index)),
    ("an index of the host", lambda x, host, index, mask: x[host]),
    ("an index of the host", lambda x, host, index, mask: x[[1, 2]]),
    ("a number of the host by index", lambda x, host, index, mask: _put(x, index, 1.0)),
    ("a copy from pageable memory", lambda x, host, index, mask: host.to(x.device)),
    ("a copy from pageable memory", lambda x, host, index, mask: torch.tensor([1], device=CUDA)),
    ("a copy from pageable memory", lambda x, host, index, mask: x[:3].copy_(host.float())),
    (
        "a non-blocking copy from pageable memory",
        lambda x, host, index, mask: host.to("cuda", non_blocking=True),
    ),
    ("a copy that is waited for", lambda x, host, index, mask: host.pin_memory().to(CUDA)),
    ("a copy to the host", lambda x, host, index, mask: x.cpu()),
    ("a copy to the host", lambda x, host, index, mask: host.float().copy_(x[:3])),
    ("waits for the device", lambda x, host, index, mask: torch.cuda.synchronize()),
    ("waits for a stream", lambda x, host, index, mask: torch.cuda.Stream().synchronize()),
    ("waits for an event", lambda x, host, index, mask: torch.cuda.Event().synchronize()),
]

QUIET = [
    lambda x, host, index, mask: host.pin_memory()[1:].to(CUDA, non_blocking=True),
    lambda x, host, index, mask: x[index] + x[1:4],
    lambda x, host, index, mask: _put(x, index, x[:3] * 2),
    lambda x, host, index, mask: _put(x, slice(2), 0.0),
    lambda x, host, index, mask: _put(x, mask, 0.0),
    lambda x, host, index, mask: x.index_fill_(0, index, float("nan")),
    lambda x, host, index, mask: torch.where(mask, x, 0.0) * torch.tensor(2.0),
    lambda x, host, index, mask: torch.sort(x, stable=True).indices[:3],
    lambda x, host, index, mask: torch.zeros(3, device=x.device) + torch.arange(3, device="cuda"),
    lambda x, host, index, mask: torch.cat([x, x.new_zeros(2)]).view(2, 4).repeat_interleave(2, 0),
    lambda x, host, index, mask: host.tolist(),
    lambda x, host, index, mask: host[host > 1],
    lambda x, host, index, mask: x.to(torch.float64).to(x.device),
    lambda x, host, index, mask: torch.cuda.Stream().wait_event(torch.cuda.Event()),
]


def _do(what):
    with watching() as watch:
        x = on_device(torch.randn(6))
        host = torch.tensor([1, 2, 4])
        mask = on_device(torch.tensor([True, False] * 3))
        what(x, host, on_device(host.clone()), mask)
    return watch


@pytest.mark.parametrize(("kind", "what"), WAITS)
def test_what_waits_is_seen_once_and_where(kind, what):
    (found,) = _do(what).waits
    assert found[:2] == (kind, "test_on_device.py")
    assert found[2] > 0


@pytest.mark.parametrize("what", QUIET)
def test_what_does_not_wait_is_not(what):
    assert _do(what).waits == []


def test_tensors_of_two_places_do_not_meet():
    with watching():
        x = torch.ones(3, device="cuda")
        assert isinstance(x, OnDevice) and x.is_cuda and x.device == CUDA
        assert isinstance(x * 2, OnDevice) and isinstance(x.unsqueeze(0).mT, OnDevice)
        assert not isinstance(x.cpu(), OnDevice)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([x, torch.ones(3)])


def test_streams_and_events_are_logged_in_order():
    with watching() as watch:
        event, side = torch.cuda.Event(), torch.cuda.Stream()
        event.record()
        side.wait_event(event)
        with torch.cuda.stream(side):
            event.record()
        torch.cuda.current_stream().wait_stream(side)
    assert watch.log == [
        ("stream", "stream 1"),
        ("record", "forward"),
        ("wait", "stream 1", "forward"),
        ("record", "stream 1"),
        ("wait", "forward", "stream 1"),
    ]


PARTS = {
    "a": np.arange(5),
    "b": torch.tensor([True, False, True]),
    "none": np.zeros(0, dtype=np.int64),
    "c": torch.arange(6, dtype=torch.int32).view(2, 3),
    "d": np.linspace(0, 1, 7, dtype=np.float32),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_host_has_made_arrives_in_one_copy(device):
    with watching() as watch:
        there = upload_together(PARTS, torch.device(device, 0) if device == "cuda" else CPU)
        alone = upload(PARTS["a"], torch.device(device))
    assert watch.waits == []
    assert len(watch.copies) == (2 if device == "cuda" else 0)
    for name, made in PARTS.items():
        want = torch.as_tensor(made)
        assert isinstance(there[name], OnDevice) == (device == "cuda")
        got = on_host(there[name])
        assert got.dtype == want.dtype and got.shape == want.shape and torch.equal(got, want)
    assert torch.equal(on_host(alone), torch.arange(5))
