"""What a CPU server runs with where nothing is stated. Needs: CPU; no server.

That a server starts with them is in ``tests/server/test_readme_line.py``."""

from __future__ import annotations

import types

import pytest
import torch
from sglang.srt.configs.model_config import AttentionArch

from sgl_blend import attach, host_memory
from sgl_blend.config import BlendConfig
from sgl_blend.engine.launch import cpu

GB = 1 << 30


def arguments(**said) -> types.SimpleNamespace:
    """SGLang's arguments, as far as they are looked at; ``said`` is what the operator states."""
    fields = {
        "device": None, "dtype": "auto", "tp_size": 1, "dp_size": 1, "nnodes": 1,
        "mem_fraction_static": None, "max_total_tokens": None, "chunked_prefill_size": None,
        "max_running_requests": None, "sleep_on_idle": False,
        attach.CONFIG.name: BlendConfig(),
    }  # fmt: skip
    return types.SimpleNamespace(**{**fields, **said})


@pytest.fixture
def machine(monkeypatch):
    """A machine with 20 GB free, and a model of 16 layers, 8 KV heads of 64, float32: 65,536 bytes
    a token. Returns ``(arguments) -> environment of the launching process``."""
    model = types.SimpleNamespace(
        num_hidden_layers=16,
        head_dim=64,
        dtype=torch.float32,
        get_num_kv_heads=lambda tp: 8 // tp,
        attention_arch=AttentionArch.MHA,
    )
    monkeypatch.setattr(
        "sglang.srt.arg_groups.model_override_base.model_config_of", lambda _: model
    )
    monkeypatch.setattr(host_memory, "available_memory", lambda: 20 * GB)
    monkeypatch.setattr(cpu, "usable_cpus", lambda: 6)

    def choose(args, **environ: str) -> dict[str, str]:
        cpu.choose(args, environ)
        return environ

    return choose


def test_a_quarter_of_the_free_memory_goes_to_the_pool(machine, capsys):
    args = arguments(**{attach.COMMAND_LINE.name: True})
    environ = machine(args)
    assert args.max_total_tokens == 5 * GB // 65536
    assert args.mem_fraction_static == 0.9 and args.chunked_prefill_size == 2048
    assert args.max_running_requests == 64 and args.sleep_on_idle is True
    assert environ == {"OMP_NUM_THREADS": "6", "GOMP_SPINCOUNT": "2000"}
    [line] = capsys.readouterr().err.splitlines()
    for part in ("--max-total-tokens 81920 ", "--sleep-on-idle ", "GOMP_SPINCOUNT=2000"):
        assert part in line
    assert "to change it" in line


def test_a_latent_cache_is_one_vector_a_token_on_each_rank(machine, monkeypatch):
    latents = types.SimpleNamespace(
        num_hidden_layers=16,
        kv_lora_rank=448,
        qk_rope_head_dim=64,
        dtype=torch.float32,
        attention_arch=AttentionArch.MLA,
    )
    monkeypatch.setattr(
        "sglang.srt.arg_groups.model_override_base.model_config_of", lambda _: latents
    )
    for ranks in (1, 2):
        args = arguments(tp_size=ranks)
        machine(args)
        assert args.max_total_tokens == 5 * GB // 32768 // ranks // 1024 * 1024


def test_ranks_share_memory_and_processors(machine):
    args = arguments(tp_size=2)
    environ = machine(args)
    # Half the heads, and half the memory: the same tokens on each rank.
    assert args.max_total_tokens == 81920 and environ["OMP_NUM_THREADS"] == "3"
    assert environ[cpu.BIND].count("|") == 1
    assert machine(arguments(tp_size=2), **{cpu.BIND: "7|8"})[cpu.BIND] == "7|8"


@pytest.mark.parametrize(
    ("cpus", "ranks", "bound"),
    [(4, 2, "0,1|2,3"), (2, 2, "0|1"), (5, 2, "0,1|2,3"), (2, 3, "0|1|0"), (1, 2, "0|0")],
)
def test_each_rank_gets_processors_of_its_own(cpus, ranks, bound):
    assert "|".join(cpu._shares(list(range(cpus)), ranks)) == bound


def test_a_small_model_gets_no_more_tokens_than_a_cpu_fills(machine, monkeypatch):
    monkeypatch.setattr(host_memory, "available_memory", lambda: 2000 * GB)
    args = arguments()
    machine(args)
    assert args.max_total_tokens == cpu.POOL_TOKENS


def test_what_is_stated_stays(machine):
    stated = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "5"}
    said = {
        "dtype": "bfloat16", "mem_fraction_static": 0.5, "chunked_prefill_size": 512,
        "max_running_requests": 3, "sleep_on_idle": True,
    }  # fmt: skip
    args = arguments(**said)
    assert machine(args, **stated) == stated
    assert args == arguments(**said)
    stated = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"}
    assert machine(args, **stated) == stated
    args = arguments(max_total_tokens=4096)
    machine(args)
    assert args.max_total_tokens == 4096


def test_without_blending_nothing_is_chosen(machine):
    off = {attach.CONFIG.name: None}
    args = arguments(**off)
    assert machine(args) == {}
    assert args == arguments(**off)


@pytest.mark.parametrize(
    ("device", "amx", "dtype", "becomes"),
    [
        (None, False, "auto", "float32"),
        ("cpu", False, "auto", "float32"),
        ("cpu", True, "auto", "auto"),
        ("cpu", False, "bfloat16", "bfloat16"),
        ("cuda", False, "auto", "auto"),
    ],
)
def test_float32_where_the_processor_has_no_tiles(monkeypatch, device, amx, dtype, becomes):
    from sgl_blend.engine.platform_cpu import PortableCpuPlatform

    monkeypatch.setattr(cpu, "has_amx", lambda: amx)
    monkeypatch.setattr("sglang.srt.platforms.current_platform", PortableCpuPlatform())
    args = arguments(device=device, dtype=dtype)
    cpu.choose_early(args)
    assert args.dtype == becomes


def test_another_platform_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "has_amx", lambda: False)
    monkeypatch.setattr("sglang.srt.platforms.current_platform", object())
    args = arguments()
    cpu.choose_early(args)
    assert args == arguments()


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {}, float("inf")),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000"}, float("inf")),
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 0.5),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000"}, 2.0),
        (
            "4:cpu,cpuacct:/x\n0::/\n",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        (
            "4:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "-1", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            float("inf"),
        ),
        ("0::/a\n", {"a/cpu.max": "no numbers"}, float("inf")),
    ],
)  # fmt: skip
def test_a_cgroups_quota_bounds_the_threads(tmp_path, membership, files, quota):
    (tmp_path / "self").write_text(membership)
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert cpu._cgroup_quota(tmp_path / "self", root) == quota


def test_a_process_without_a_cgroup_has_no_quota(tmp_path):
    assert cpu._cgroup_quota(tmp_path / "none", tmp_path) == float("inf")
