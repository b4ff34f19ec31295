"""Blending without a command line: ``sgl_blend.Engine`` and ``sglang.Engine``. Needs: CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sgl_blend.errors import ConfigError, UnsupportedError

SCRIPT = """
import json, os, random, sys

def main():
    if sys.argv[2] == "sgl_blend":
        import sgl_blend
        make, extra = sgl_blend.Engine, {"blend_policy": "hkvd", "blend_recompute_ratio": 0.25}
    else:
        import sglang
        make, extra = sglang.Engine, {}
    engine = make(
        model_path=sys.argv[1], **extra,
    )
    rng = random.Random(0)
    docs = [[rng.randint(300, 2047) for _ in range(100)] for _ in range(4)]
    greedy = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    for d in docs:
        engine.generate(input_ids=[1, *d, 3, *range(400, 440)], sampling_params=greedy)
    prompt = [1, *range(500, 520), *docs[2], *docs[0], *docs[3], 3, *range(600, 640)]
    out = engine.generate(input_ids=prompt, sampling_params=greedy)
    bad = None
    try:
        engine.generate(
            input_ids=prompt, sampling_params={**greedy, "custom_params": {"blend_ratio": 3}}
        )
    except ValueError as e:
        bad = str(e)
    engine.shutdown()
    print("\\nRESULT " + json.dumps([out["meta_info"]["prompt_tokens"],
    out["meta_info"].get("blend"), bad]))

if __name__ == "__main__":
    main()
"""


def run(tmp_path, model, kind, env):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(model), kind],
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(lines[0][7:])


def test_engine_with_blend_keywords(tmp_path, model, child_env):
    n, b, bad = run(tmp_path, model, "sgl_blend", child_env)
    assert b["prefix"] + b["reused"] + b["recomputed"] + b["computed"] == n
    assert b["policy"] == "hkvd" and b["ratio"] == 0.25
    assert b["reused"] + b["recomputed"] >= 270
    assert "custom_params.blend_ratio is 3" in bad


def test_sglangs_own_engine_under_the_environment_variable(tmp_path, model, child_env):
    env = child_env | {"SGL_BLEND_ENABLE": "1", "SGL_BLEND_POLICY": "leading"}
    n, b, bad = run(tmp_path, model, "sglang", env)
    assert b["prefix"] + b["reused"] + b["recomputed"] + b["computed"] == n
    assert b["policy"] == "leading" and b["reused"] + b["recomputed"] >= 270
    assert "custom_params.blend_ratio is 3" in bad


@pytest.mark.parametrize(
    ("keywords", "error", "said"),
    [
        ({"blend_polcy": "hkvd"}, ConfigError, "did you mean 'blend_policy'"),
        ({"blend_policy": "hkvdd"}, ConfigError, "did you mean 'hkvd'"),
        ({"blend_recompute_ratio": 7.0}, ConfigError, "recompute_ratio is 7.0"),
        ({"blend_config": "/none.yaml"}, ConfigError, "cannot be read"),
        ({"enable_blend": False, "blend_policy": "hkvd"}, ConfigError, "enable_blend=False"),
        ({"radix_cache_backend": "lmcache"}, ConfigError, "brings its own radix cache"),
        ({"server_args": None}, ConfigError, "builds server_args itself"),
        ({"disable_radix_cache": True}, UnsupportedError, "--disable-radix-cache"),
        ({"blend_check_layers": (7,)}, ConfigError, "the model has 4 layers"),
    ],
)
def test_wrong_keywords_raise_before_anything_is_started(model, keywords, error, said):
    import sgl_blend

    with pytest.raises(error, match=said):
        sgl_blend.Engine(model_path=str(model), **keywords)
