"""One mechanism of options for two configurations: flags, variables, files, bounds, tables. CPU."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from sgl_blend.config import BLEND, BlendConfig
from sgl_blend.engine.launch.own_store import store_options
from sgl_blend.errors import ConfigError
from sgl_blend.option_kinds import parse_size, size_text
from sgl_blend.options import OptionSet, check_bounds, option
from sgl_blend.store.config import EVICTION, FORMS, STORE, StoreConfig, load_config

BOTH = pytest.mark.parametrize("options", [BLEND, STORE], ids=["blend", "store"])
#: for each set: an option, and four values of it as text and as value
VALUES = {
    BLEND.what: ("max_copies", ("5", 5), ("6", 6), ("7", 7), ("8", 8)),
    STORE.what: (
        "memory_bytes", ("5MiB", 5 << 20), ("6MiB", 6 << 20), ("7MiB", 7 << 20), ("8MiB", 8 << 20)),
}  # fmt: skip


@BOTH
def test_flag_goes_before_variable_before_file_before_default(options, tmp_path):
    name, flag, variable, file, default = VALUES[options.what]
    path = tmp_path / "options.yaml"
    path.write_text(f"{name}: {file[0]}\n")
    environ = {options.prefixes[-1] + name.upper(): variable[0]}

    def got(given=None, path=None, environ=None) -> int:
        loaded = options.load(given, path=path, environ=environ or {}, defaults={name: default[1]})
        return getattr(loaded, name)

    assert got({name: flag[1]}, path, environ) == flag[1]
    assert got({name: None}, path, environ) == variable[1]
    assert got(None, path) == file[1]
    assert got() == default[1]
    assert got(environ={options.prefixes[-1] + "CONFIG": str(path)}) == file[1]


@BOTH
def test_a_misspelt_name_is_refused_with_the_nearest_wherever_it_stands(options, tmp_path):
    name = VALUES[options.what][0]
    wrong, near = name + "s", f"did you mean {name!r}?"
    path = tmp_path / "options.yaml"
    path.write_text(f"{wrong}: 5\n")
    variable = options.prefixes[-1] + wrong.upper()
    for place, arguments in (
        (str(path), {"path": path}),
        (variable, {"environ": {variable: "5"}}),
        (options.what, {"given": {wrong: 5}}),
    ):
        with pytest.raises(ConfigError) as e:
            options.load(**{"environ": {}, **arguments})
        assert place in str(e.value) and near in str(e.value)


@BOTH
def test_every_option_has_a_flag_a_variable_and_a_key(options, tmp_path):
    """What the default says as text comes back as the default, each way."""
    for o in options.options:
        text = ",".join(map(str, o.default)) if isinstance(o.default, tuple) else str(o.default)
        if o.default is None or o.kind.name == "mapping":
            text = {"mapping": "{}"}.get(o.kind.name, "")
        text = text.replace("\n", "\\n")
        parser = argparse.ArgumentParser()
        options.add_flags(parser)
        got = options.given(parser.parse_args([options.flag_of(o), text]))
        assert got.pop(o.name) == o.default and set(got.values()) == {None}, o.name
        variable = options.prefixes[-1] + o.name.upper()
        assert getattr(options.load(environ={variable: text}), o.name) == o.default
        assert o.help and o.told.help[0] != " "


@BOTH
def test_defaults_lie_within_their_bounds_and_the_table_has_a_row_each(options):
    check_bounds(options.cls(), options.what)
    rows = options.markdown().splitlines()
    assert len(rows) == 2 + len(options.options)
    for o, row in zip(options.options, rows[2:], strict=True):
        assert row.startswith(f"| `{o.name}` | ") and row.replace(r"\|", "").count("|") == 4


@dataclass(frozen=True)
class Sample:
    on: bool = option(True, "a switch")
    off: bool = option(False, "another switch")
    level: int = option(3, "bounded", least=1, most=5)
    rate: float = option(0.5, "bounded below", above=0.0)
    names: tuple[str, ...] = option((), "several", flag="--name")
    kind: str | None = option(None, "one of two", choices=("left", "right"))

    def __post_init__(self) -> None:
        check_bounds(self, SAMPLE.what)


SAMPLE: OptionSet[Sample] = OptionSet(
    Sample, what="sample option", flag="--", prefixes=("SAMPLE_",), others={}, switches=True
)


def parsed(*words: str) -> Sample:
    parser = argparse.ArgumentParser(prog="sample")
    SAMPLE.add_flags(parser)
    return SAMPLE.load(SAMPLE.given(parser.parse_args(words)), environ={})


def test_switches_stand_alone_take_a_value_or_are_negated():
    assert parsed() == Sample()
    assert parsed("--off").off and not parsed("--no-on").on and not parsed("--on", "no").on
    assert parsed("--no-on", "--on").on  # the last one counts


def test_a_repeated_flag_collects():
    assert parsed("--name", "a", "--name", "b").names == ("a", "b")


def test_none_is_an_optional_value_in_a_file_and_an_empty_text(tmp_path):
    (tmp_path / "s.yaml").write_text("kind: null\n")
    assert SAMPLE.load(path=tmp_path / "s.yaml", environ={"SAMPLE_KIND": ""}).kind is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"level": 0}, "sample option level is 0: must lie in 1..5"),
        ({"level": 6}, "sample option level is 6: must lie in 1..5"),
        ({"rate": 0.0}, "sample option rate is 0.0: must be more than 0"),
        ({"rate": float("nan")}, "sample option rate is nan: must be more than 0"),
        ({"kind": "lift"}, "must be one of 'left', 'right'; did you mean 'left'?"),
    ],
)
def test_bounds_hold_however_the_value_came(values, message):
    for make in (lambda: Sample(**values), lambda: SAMPLE.load(values, environ={})):
        with pytest.raises(ConfigError) as e:
            make()
        assert message in str(e.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--level", "few"], "--level: sample option level: cannot read 'few' as int"),
        (["--on", "perhaps"], "--on: sample option on: cannot read 'perhaps' as bool"),
        (["--no-on", "yes"], "--no-on: takes no value, but 'yes' is given"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as e:
        parsed(*words)
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and err.count("\n") == 1


def test_names_that_the_stores_options_choose_from_are_those_of_the_code():
    from sgl_blend.store.placement.eviction import POLICIES
    from sgl_blend.store.serde import SERDES

    assert set(EVICTION) == set(POLICIES) and set(FORMS) == set(SERDES)


def test_store_options_of_other_kinds(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("remote_options: {rpc_port: 5, host: a}\ndisk_fsync: off\n")
    config = load_config(path, environ={"SGL_CHUNK_STORE_ENDPOINTS": "ipc:///a,tcp://h:1"})
    assert config.remote_options == (("host", "a"), ("rpc_port", 5)) and not config.disk_fsync
    assert config.endpoints == ("ipc:///a", "tcp://h:1")
    for text in ("[1]", "{"):
        with pytest.raises(ConfigError, match="remote_options"):
            load_config(environ={"SGL_CHUNK_STORE_REMOTE_OPTIONS": text})
    with pytest.raises(ConfigError, match="low_watermark is 0.99"):
        StoreConfig(low_watermark=0.99)


def test_a_child_store_takes_what_its_parent_resolved_and_no_variable(monkeypatch):
    from sgl_blend.store.embedded import decode_config, encode_config

    config = StoreConfig(memory_bytes=1 << 30, remote_options=(("host", "a"),))
    monkeypatch.setenv("SGL_CHUNK_STORE_DISK_PATH", "/elsewhere")
    assert decode_config(encode_config(config)) == config


@pytest.fixture
def store_file(tmp_path):
    path = tmp_path / "store.yaml"
    path.write_text(f"memory_bytes: 3GiB\ndisk_path: {tmp_path}\ndisk_bytes: 5GiB\n")
    return str(path)


def test_the_own_stores_file_is_not_overruled_by_what_the_server_leaves_open(store_file):
    """``store_memory: auto`` and the default of ``store_disk`` took its place."""
    options = store_options(BlendConfig(store_config=store_file))
    assert (options.memory_bytes, options.disk_bytes) == (3 << 30, 5 << 30)
    stated = BlendConfig(store_config=store_file, store_memory="2GiB", store_disk="1GiB")
    options = store_options(stated)
    assert (options.memory_bytes, options.disk_bytes) == (2 << 30, 1 << 30)


def test_the_own_stores_memory_goes_by_what_is_free(monkeypatch):
    for free, memory in ((1 << 30, 256 << 20), (64 << 30, 4 << 30), (1 << 40, 16 << 30)):
        monkeypatch.setattr("sgl_blend.host_memory.available_memory", lambda free=free: free)
        assert store_options(BlendConfig()).memory_bytes == memory


def test_a_disks_bound_without_a_disk_is_refused():
    with pytest.raises(ConfigError, match="store_disk is '1GiB', but the store has no disk"):
        store_options(BlendConfig(store_disk="1GiB"))


def test_sizes_in_text():
    for size in (0, 7, 1 << 10, 3 << 29, 64 << 30):
        assert parse_size(size_text(size)) == size
    assert size_text(4 << 30) == "4GiB" and parse_size("1.5 GiB") == 3 << 29
    for wrong in ("4 GiBit", "iB", "-1", True):
        with pytest.raises(ConfigError, match="is not a number of bytes"):
            parse_size(wrong)
