"""Configuration: precedence, refusals, types, ranges. Needs: CPU, neither torch nor SGLang."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from sgl_blend.config import MAX_GENERATION, BlendConfig, load_config, option_fields, parse_text
from sgl_blend.errors import BlendError, ConfigError


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "blend.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_precedence_flag_over_environment_over_file_over_default(yaml_file):
    path = yaml_file("recompute_ratio: 0.3\npolicy: hkvd\nmin_span_tokens: 20\n")
    environ = {"SGL_BLEND_RECOMPUTE_RATIO": "0.4", "SGL_BLEND_POLICY": "leading"}
    flags = {"recompute_ratio": 0.5, "policy": None}
    c = load_config(flags, path=path, environ=environ)
    assert c.recompute_ratio == 0.5  # flag
    assert c.policy == "leading"  # environment; a flag that was not given is no value
    assert c.min_span_tokens == 20  # file
    assert c.max_copies == BlendConfig().max_copies  # default


def test_file_may_come_from_the_environment_and_the_flag_wins(yaml_file, tmp_path):
    path = yaml_file("max_copies: 7\n")
    assert load_config(environ={"SGL_BLEND_CONFIG": path}).max_copies == 7
    other = tmp_path / "other.yaml"
    other.write_text("max_copies: 9\n")
    assert load_config(path=str(other), environ={"SGL_BLEND_CONFIG": path}).max_copies == 9


def test_switch_and_path_variables_are_no_options():
    assert load_config(environ={"SGL_BLEND_ENABLE": "1", "HOME": "/"}) == BlendConfig()


def test_sglangs_spelling_of_the_prefix_is_heard_and_ours_goes_first():
    assert load_config(environ={"SGLANG_BLEND_MAX_COPIES": "5"}).max_copies == 5
    for order in (1, -1):
        both = [("SGLANG_BLEND_MAX_COPIES", "5"), ("SGL_BLEND_MAX_COPIES", "6")][::order]
        assert load_config(environ=dict(both)).max_copies == 6
    with pytest.raises(ConfigError, match="SGLANG_BLEND_MAX_COPY: unknown"):
        load_config(environ={"SGLANG_BLEND_MAX_COPY": "5", "SGLANG_BLEND_ENABLE": "1"})


def test_empty_file_is_all_defaults(yaml_file):
    assert load_config(path=yaml_file(""), environ={}) == BlendConfig()


@pytest.mark.parametrize(
    ("flags", "environ", "file"),
    [
        ({"recompute_ration": 0.2}, {}, None),
        (None, {"SGL_BLEND_RECOMPUTE_RATION": "0.2"}, None),
        (None, {}, "recompute_ration: 0.2\n"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_name(flags, environ, file, yaml_file):
    path = None if file is None else yaml_file(file)
    with pytest.raises(ConfigError) as e:
        load_config(flags, path=path, environ=environ)
    assert "'recompute_ration'" in str(e.value)
    assert "did you mean 'recompute_ratio'?" in str(e.value)
    if path:
        assert path in str(e.value)
    if environ:
        assert "SGL_BLEND_RECOMPUTE_RATION" in str(e.value)


@pytest.mark.parametrize(
    "line",
    [
        "recompute_ratio: lots",
        "recompute_ratio: true",
        "min_span_tokens: 1.5",
        "min_span_tokens: true",
        "report: 1",
        "report: 'yes'",
        "policy: 3",
        "check_layers: [1, two]",
        "check_layers: [1.5]",
        "separators: [1]",
        "policy: [query]",
        "max_copies: null",
    ],
)
def test_wrong_type_in_the_file_names_option_and_file(line, yaml_file):
    path = yaml_file(line + "\n")
    with pytest.raises(ConfigError) as e:
        load_config(path=path, environ={})
    assert line.split(":")[0] in str(e.value) and path in str(e.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recompute_ratio", "lots"),
        ("min_span_tokens", "1.5"),
        ("report", "maybe"),
        ("check_layers", "1,two"),
        ("check_multipliers", "1.0;2"),
    ],
)
def test_wrong_text_in_the_environment_names_option_and_value(name, text):
    with pytest.raises(ConfigError) as e:
        load_config(environ={f"SGL_BLEND_{name.upper()}": text})
    assert name in str(e.value) and repr(text) in str(e.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"policy": ""}, "policy"),
        ({"recompute_ratio": 1.01}, "recompute_ratio"),
        ({"recompute_ratio": -0.1}, "recompute_ratio"),
        ({"recompute_ratio": float("nan")}, "recompute_ratio"),
        ({"coverage": 1.01}, "coverage"),
        ({"min_ratio": -0.1}, "min_ratio"),
        ({"max_risk": -0.1}, "max_risk"),
        ({"max_risk": 0.1, "policy": "none"}, "max_risk"),
        ({"query_smoothing": -1}, "query_smoothing"),
        ({"stored_depth": 0.0}, "stored_depth"),
        ({"check_layers": ()}, "check_layers"),
        ({"check_layers": (2, 1)}, "check_layers"),
        ({"check_layers": (-1,)}, "check_layers"),
        ({"check_multipliers": (1.5,)}, "check_multipliers"),
        ({"check_layers": (1, 2), "check_multipliers": (1.0,)}, "check_multipliers"),
        ({"check_layers": (1, 2), "check_multipliers": (1.0, 2.0)}, "check_multipliers"),
        ({"query_layers": 0.0}, "query_layers"),
        ({"query_layers": 1.1}, "query_layers"),
        ({"leading_tokens": -1}, "leading_tokens"),
        ({"min_reused_tokens": -1}, "min_reused_tokens"),
        ({"min_span_tokens": 0}, "min_span_tokens"),
        ({"min_suffix_tokens": 0}, "min_suffix_tokens"),
        ({"min_suffix_tokens": 40, "max_suffix_tokens": 39}, "max_suffix_tokens"),
        ({"chunk_min_tokens": 0}, "chunk_min_tokens"),
        ({"chunk_mean_tokens": 14}, "chunk_mean_tokens"),
        ({"chunk_max_tokens": 16}, "chunk_max_tokens"),
        ({"separators": ("",)}, "separators"),
        ({"continuation": "both"}, "continuation"),
        ({"max_generation": -1}, "max_generation"),
        ({"max_copies": 0}, "max_copies"),
        ({"tiers": ()}, "tiers"),
        ({"tiers": ("disk",)}, "tiers"),
        # Of a store that is not there, or is set up elsewhere: nothing would come of them.
        ({"store_endpoint": "tcp://a:1", "store_config": "store.yaml"}, "store_config"),
        ({"store_endpoint": "tcp://a:1", "store_memory": "2GiB"}, "store_memory"),
        ({"store_endpoint": "tcp://a:1", "store_disk_path": "/d"}, "store_disk_path"),
        ({"store_endpoint": "tcp://a:1", "store_disk": "1GiB"}, "store_disk"),
        ({"store_endpoint": "ipc:///s", "store_keys": "keys"}, "store_keys"),
        ({"store_keys": "keys"}, "store_keys"),
        ({"tiers": ("device",), "store_endpoint": "tcp://a:1"}, "store_endpoint"),
        ({"tiers": ("device",), "store_memory": "2GiB"}, "store_memory"),
        ({"tiers": ("device",), "store_disk_path": "/d"}, "store_disk_path"),
        ({"tiers": ("device",), "store_config": "store.yaml"}, "store_config"),
    ],
)
def test_out_of_range_value_is_refused_by_name(values, named):
    with pytest.raises(ConfigError, match=f"blend option {named} is "):
        BlendConfig(**values)


def test_max_generation_is_bounded_by_what_labels_can_hold():
    assert -128 < MAX_GENERATION < 127  # labels are int8
    assert BlendConfig(max_generation=MAX_GENERATION).max_generation == MAX_GENERATION
    with pytest.raises(ConfigError, match="max_generation"):
        BlendConfig(max_generation=MAX_GENERATION + 1)


def test_unreadable_and_malformed_files(tmp_path, yaml_file):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path=str(tmp_path / "none.yaml"), environ={})
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path=str(tmp_path), environ={})
    with pytest.raises(ConfigError, match="not valid YAML") as e:
        load_config(path=yaml_file("a: [1\n"), environ={})
    assert "\n" not in str(e.value) and "line 2" in str(e.value)
    with pytest.raises(ConfigError, match="must be a mapping, not list"):
        load_config(path=yaml_file("- policy\n"), environ={})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00policy")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path=str(binary), environ={})


def test_text_of_flags_and_variables_becomes_the_options_type():
    assert parse_text("recompute_ratio", "0.25") == 0.25
    assert parse_text("max_copies", "3") == 3
    assert parse_text("report", "off") is False and parse_text("report", "True") is True
    assert parse_text("check_layers", "1, 3") == (1, 3)
    assert parse_text("check_multipliers", "1.5,1") == (1.5, 1.0)
    assert parse_text("separators", r"\n\n,###") == ("\n\n", "###")
    assert parse_text("policy", "hkvd") == "hkvd"


def test_separators_keep_letters_beyond_ascii():
    assert parse_text("separators", "§§,\\t,第") == ("§§", "\t", "第")


def test_one_value_stands_for_a_list_and_whole_numbers_for_floats(yaml_file):
    c = load_config(path=yaml_file("check_layers: 2\nrecompute_ratio: 1\n"), environ={})
    assert c.check_layers == (2,)
    assert c.recompute_ratio == 1.0 and isinstance(c.recompute_ratio, float)


def test_multipliers_default_to_a_falling_row_that_ends_in_one():
    assert BlendConfig().multipliers() == (1.0,)
    assert BlendConfig(check_layers=(1, 2, 3)).multipliers() == (1.5, 1.25, 1.0)
    given = BlendConfig(check_layers=(1, 2), check_multipliers=(1.2, 1.0))
    assert given.multipliers() == (1.2, 1.0)


def test_configuration_is_frozen_and_describes_every_option():
    c = BlendConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.policy = "all"
    line = c.describe()
    assert "\n" not in line
    for f in option_fields():
        assert f"{f.name}={f.default!r}" in line
        assert f.metadata["help"]


def test_config_error_is_a_blend_error_and_a_value_error():
    assert issubclass(ConfigError, BlendError) and issubclass(ConfigError, ValueError)


def test_importing_the_package_and_its_config_imports_nothing_heavy():
    code = (
        "import sys, sgl_blend, sgl_blend.config, sgl_blend.errors\n"
        "heavy = {'torch', 'sglang', 'zmq', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_package_offers_engine_and_nothing_else_by_magic():
    import sgl_blend

    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = sgl_blend.Engin
