"Settings, config, flags: round trips, refusals, digests."

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_reward.core.config import (
    ConfigError,
    digest,
    from_dict,
    load_config,
    override,
    read_yaml,
    save_config,
    to_dict,
    to_yaml,
)
from vlm_reward.core.flags import add_flags, take_overrides
from vlm_reward.core.settings import describe_fields, field_names, setting


@dataclass(frozen=True)
class Inner:
    steps: int = setting(40, "steps", low=1)
    lr: float = setting(1e-4, "learning rate", low=0, high=1)
    kind: Literal["grpo", "dapo"] = setting("grpo", "loss")
    freeze: bool = setting(False, "freeze")


@dataclass(frozen=True)
class Arm:
    reward: str = setting(help="name of the reward")
    weight: float = setting(1.0, "weight")


@dataclass(frozen=True)
class Outer:
    name: str = setting("demo", "name")
    seeds: tuple[int, ...] = setting((0, 1), "seeds")
    size: tuple[int, int] = setting((64, 64), "width, height")
    tags: list[str] = setting(["a"], "tags")
    weights: dict[str, float] = setting({"format": 0.5}, "weights", low=0)
    local: Path | None = setting(None, "folder")
    limit: int | float | None = setting(None, "limit")
    names: str | tuple[str, ...] = setting("all", "names")
    inner: Inner = setting(Inner(steps=80), "inner")
    maybe: Inner | None = setting(None, "inner or nothing")
    arms: tuple[Arm, ...] = setting((Arm("format"), Arm("accuracy")), "arms")
    by_name: dict[str, Arm] = setting({"one": Arm("format")}, "arms by name")


text = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029\ufeff"), max_size=12)
number = st.floats(allow_nan=False, width=64)
inner = st.builds(
    Inner,
    steps=st.integers(1, 10**9),
    lr=st.floats(0, 1),
    kind=st.sampled_from(["grpo", "dapo"]),
    freeze=st.booleans(),
)
arm = st.builds(Arm, reward=text, weight=number)
# A path is compared as pathlib normalises it, so the empty text and dots stay out.
path = st.text("abc_-/", min_size=1, max_size=8).map(Path)
outer = st.builds(
    Outer,
    name=text,
    seeds=st.lists(st.integers(), max_size=3).map(tuple),
    size=st.tuples(st.integers(), st.integers()),
    tags=st.lists(text, max_size=3),
    weights=st.dictionaries(text, st.floats(0, allow_nan=False), max_size=3),
    local=st.none() | path,
    limit=st.none() | st.integers() | number.filter(lambda x: x != int(x) if abs(x) < 1e300 else False),
    names=text | st.lists(text, max_size=2).map(tuple),
    inner=inner,
    maybe=st.none() | inner,
    arms=st.lists(arm, max_size=2).map(tuple),
    by_name=st.dictionaries(text, arm, max_size=2),
)
tree = st.recursive(
    st.none() | st.booleans() | st.integers() | number | text,
    lambda leaf: st.lists(leaf, max_size=3) | st.dictionaries(text, leaf, max_size=3),
    max_leaves=8,
)


@given(outer)
@settings(max_examples=80, deadline=None)
def test_a_config_survives_its_file(tmp_path_factory, cfg):
    file = tmp_path_factory.mktemp("config") / "cfg.yaml"
    again = load_config(Outer, save_config(cfg, file))
    assert again == cfg
    assert digest(again) == digest(cfg)


@given(tree)
@settings(max_examples=150, deadline=None)
def test_our_yaml_means_the_same_to_a_plain_reader(value):
    written = to_yaml(value)
    assert read_yaml(written) == value
    assert yaml.safe_load(written) == value


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text("ab:é-#'\" 1"),
        lambda leaf: st.lists(leaf, max_size=3) | st.dictionaries(st.text("ab: #", max_size=3), leaf, max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=80, deadline=None)
def test_json_is_yaml(value):
    assert read_yaml(json.dumps(value)) == value


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused_in_one_line(words):
    try:
        value = read_yaml(words)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        json.dumps(value)


@pytest.mark.parametrize(
    "words",
    [
        "a: &a [*a]",
        "[" * 2000,
        "!!python/object/apply:os.system [ls]",
        "!!binary aGk=",
        "!!timestamp 2026-01-01",
        "? [1, 2]\n: 3",
        "a: 1\na: 2",
        "{a: {b: 1, b: 2}}",
        "a: b: c",
        "\tx: 1",
        "a: \x00",
        "a: *nobody",
    ],
)
def test_hostile_yaml_is_refused_in_one_line(words):
    with pytest.raises(ConfigError) as error:
        read_yaml(words, "study.yaml")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("study.yaml")


def test_merge_keys_still_work():
    words = "base: &base {lr: 1e-3, steps: 4}\na: &a {<<: *base, steps: 5}\nb: {<<: *a, lr: 2}"
    assert read_yaml(words)["b"] == {"steps": 5, "lr": 2}


@pytest.mark.parametrize(
    ("mapping", "parts"),
    [
        ({"inner": {"step": 4}}, ["inner.step", "4", "did you mean steps"]),
        ({"steps": 4}, ["steps", "did you mean inner.steps or maybe.steps"]),
        ({"inner": {"steps": "many"}}, ["inner.steps", "'many'", "whole number"]),
        ({"inner": {"steps": 4.0}}, ["inner.steps", "4.0", "whole number"]),
        ({"inner": {"steps": True}}, ["inner.steps", "True"]),
        ({"inner": {"lr": "1e-4"}}, ["inner.lr", "'1e-4'", "number"]),
        ({"inner": {"lr": float("nan")}}, ["inner.lr", "NaN"]),
        ({"inner": {"lr": -1}}, ["inner.lr", "at least 0", "-1"]),
        ({"inner": {"lr": 2}}, ["inner.lr", "at most 1", "2"]),
        ({"inner": {"kind": "gpro"}}, ["inner.kind", "'gpro'", "did you mean grpo"]),
        ({"inner": {"freeze": 1}}, ["inner.freeze", "true or false"]),
        ({"inner": 3}, ["inner", "3"]),
        ({"inner": None}, ["inner", "None"]),
        ({"seeds": 3}, ["seeds", "3", "list"]),
        ({"seeds": "01"}, ["seeds", "'01'", "list"]),
        ({"seeds": [0, "x"]}, ["seeds.1", "'x'"]),
        ({"size": [1, 2, 3]}, ["size", "exactly 2"]),
        ({"tags": {"a": 1}}, ["tags", "list"]),
        ({"weights": ["format"]}, ["weights", "mapping"]),
        ({"weights": {"format": "high"}}, ["weights.format", "'high'"]),
        ({"weights": {"format": -1}}, ["weights", "at least 0", "-1"]),
        ({"weights": {3: 1.0}}, ["weights.3", "quotes"]),
        ({"name": 3}, ["name", "3", "quotes"]),
        ({"local": 3}, ["local", "3"]),
        ({"limit": "x"}, ["limit", "'x'", "whole number or number"]),
        ({"arms": [{"weight": 1}]}, ["arms.0.reward", "missing", "name of the reward"]),
        ({"by_name": {"two": {"reward": "x", "wieght": 1}}}, ["by_name.two.wieght", "weight"]),
        ([1], ["config", "[1]"]),
        (None, ["config", "None"]),
    ],
)
def test_refusals_name_field_value_and_remedy(mapping, parts):
    with pytest.raises(ConfigError) as error:
        from_dict(Outer, mapping)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@given(st.sampled_from(field_names(Inner)), st.integers(0, 20))
def test_a_dropped_letter_is_refused_and_the_field_suggested(name, place):
    misspelt = name[: place % len(name)] + name[place % len(name) + 1 :]
    if misspelt in field_names(Inner):
        return
    with pytest.raises(ConfigError, match="unknown field") as error:
        from_dict(Inner, {misspelt: 1})
    assert name in str(error.value)


def test_long_values_do_not_flood_the_error():
    with pytest.raises(ConfigError) as error:
        from_dict(Outer, {"seeds": "x" * 10**6})
    assert len(str(error.value)) < 300


def test_a_check_of_the_dataclass_is_told_with_its_place():
    @dataclass(frozen=True)
    class Even:
        n: int = 2

        def __post_init__(self):
            if self.n % 2:
                raise ValueError(f"n must be even, got {self.n}")

    @dataclass(frozen=True)
    class Holder:
        part: Even = field(default_factory=Even)

    with pytest.raises(ConfigError, match=r"part: n must be even, got 3"):
        from_dict(Holder, {"part": {"n": 3}})


def test_a_partial_mapping_changes_the_default_of_the_field_and_not_of_the_class():
    assert from_dict(Outer, {"inner": {"lr": 0.5}}).inner == Inner(steps=80, lr=0.5)
    assert from_dict(Outer, {"maybe": {"lr": 0.5}}).maybe == Inner(steps=40, lr=0.5)


# --- digest ---


def _another(info, value):
    "A value of the same type that differs from the default."
    other = {"name": "x", "seeds": [7], "size": [1, 1], "tags": [], "weights": {}, "local": "data", "limit": 2}
    other |= {"names": ["x"], "maybe": {}, "arms": [], "by_name": {}, "kind": "dapo", "freeze": True, "lr": 0.3}
    return other.get(info.name.split(".")[-1], 3)


def test_a_change_of_any_field_changes_the_digest():
    base, seen = {"maybe": {}}, {digest(from_dict(Outer, {"maybe": {}}))}
    infos = [i for i in describe_fields(Outer) if i.name != "maybe"]
    for info in infos:
        mapping, node = json.loads(json.dumps(base)), None
        node = mapping
        for part in info.name.split(".")[:-1]:
            node = node.setdefault(part, {})
        node[info.name.split(".")[-1]] = _another(info, info.default)
        seen.add(digest(from_dict(Outer, mapping)))
    assert len(seen) == len(infos) + 1


def test_digest_is_the_same_in_another_process_and_in_any_order(tmp_path):
    code = "from vlm_reward.core.config import digest; print(digest({'b': [1, None, 'é'], 'a': {'y': .1, 'x': True}}))"
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert prints == {digest({"a": {"x": True, "y": 0.1}, "b": [1, None, "é"]}) + "\n"}


def test_digest_does_not_see_how_a_number_is_written():
    assert digest(Inner(lr=0)) == digest(Inner(lr=0.0)) == digest(Inner(lr=-0.0))


def test_digest_leaves_out_by_dotted_name_and_refuses_a_misspelt_one():
    a, b = Outer(inner=Inner(steps=1)), Outer(inner=Inner(steps=2))
    assert digest(a, ["inner.steps"]) == digest(b, ["inner.steps"]) != digest(b)
    with pytest.raises(ConfigError, match="did you mean steps"):
        digest(a, ["inner.stps"])


# --- overrides and flags ---


def test_overrides_win_in_order_and_over_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("inner: {steps: 3, lr: 1e-2}\narms: [{reward: x}]\n")
    cfg = load_config(Outer, file, ["inner.steps=4", "inner.steps=5", "arms.0.weight=2", "name=a=b"])
    assert (cfg.inner, cfg.arms, cfg.name) == (Inner(steps=5, lr=0.01), (Arm("x", 2.0),), "a=b")


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ("name=12", "name", "12"),
        ("name=true", "name", "true"),
        ("name=a # b", "name", "a # b"),
        ("seeds=3", "seeds", (3,)),
        ("seeds=3,4", "seeds", (3, 4)),
        ("seeds=[3, 4]", "seeds", (3, 4)),
        ("seeds=", "seeds", ()),
        ("tags=1,b", "tags", ["1", "b"]),
        ("local=null", "local", None),
        ("local=12", "local", Path("12")),
        ("limit=2.5", "limit", 2.5),
        ("names=a", "names", "a"),
        ("names=[a, b]", "names", ("a", "b")),
        ("weights={a: 1}", "weights", {"a": 1.0}),
        ("weights.a=1", "weights", {"format": 0.5, "a": 1.0}),
        ("maybe.steps=7", "maybe", Inner(steps=7)),
        ("maybe=null", "maybe", None),
        ("arms.1.weight=3", "arms", (Arm("format"), Arm("accuracy", 3.0))),
        ("by_name.two.reward=r", "by_name", {"one": Arm("format"), "two": Arm("r")}),
    ],
)
def test_the_text_of_an_override_is_read_with_its_type_in_view(change, name, value):
    assert load_config(Outer, None, [change]) == replace(Outer(), **{name: value})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("steps", "want field=value"),
        ("=3", "want field=value"),
        ("inner..steps=3", "want field=value"),
        ("iner.steps=3", "did you mean inner"),
        ("inner.stepz=3", "inner.stepz"),
        ("inner.steps.more=3", "inner.steps"),
        ("arms.7.weight=3", "arms.7"),
        ("arms.x.weight=3", "arms.x"),
        ("inner.steps=[", "'['"),
        ("seeds={", "seeds"),
    ],
)
def test_overrides_that_name_nothing_are_refused(change, part):
    with pytest.raises(ConfigError) as error:
        load_config(Outer, None, [change])
    assert part in str(error.value)


def test_override_leaves_its_input_alone():
    mapping = {"inner": {"steps": 3}, "arms": [{"reward": "x"}]}
    before = json.dumps(mapping)
    override(Outer, mapping, "arms.0.reward=y")
    override(Outer, mapping, "inner.steps=9")
    assert json.dumps(mapping) == before


@given(inner, st.booleans(), st.permutations(field_names(Inner)))
@settings(max_examples=40, deadline=None)
def test_every_field_can_be_given_as_a_flag(cfg, joined, order):
    values = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in to_dict(cfg).items()}
    words = [w for k in order for w in ([f"--{k}={values[k]}"] if joined else [f"--{k}", values[k]])]
    overrides, left = take_overrides(["study", *words, "--dry-run"], Inner)
    assert left == ["study", "--dry-run"]
    assert load_config(Inner, None, overrides) == cfg


def test_flags_keep_their_order_and_leave_the_rest_alone():
    words = [
        "a.yaml",
        "--by-name.two.reward",
        "x",
        "--inner.freeze",
        "b",
        "--inner.lr",
        "1",
        "--inner.lr=0.5",
        "--root",
        "r",
    ]
    overrides, left = take_overrides(words, Outer)
    assert overrides == ["by_name.two.reward=x", "inner.freeze=true", "inner.lr=1", "inner.lr=0.5"]
    assert left == ["a.yaml", "b", "--root", "r"]


def test_a_negative_value_is_a_value_and_a_flag_is_not():
    assert take_overrides(["--limit", "-1"], Outer) == (["limit=-1"], [])
    for words in (["--limit"], ["--limit", "--name", "x"], ["--arms.0.weight"]):
        with pytest.raises(ConfigError, match="wants a value"):
            take_overrides(words, Outer)


def test_help_shows_meaning_type_and_the_default_in_this_place():
    parser = argparse.ArgumentParser()
    add_flags(parser, Outer)
    shown = " ".join(parser.format_help().split())
    for name in field_names(Outer):
        assert f"--{name} " in shown
    assert "steps (whole number; default 80)" in shown
    assert "steps (whole number; default 40)" in shown


# --- files ---


def test_files_that_cannot_be_read_are_told_in_one_line(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("name: x")
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    for name, part in [
        ("quikstart.yaml", "quickstart.yaml"),
        ("list.yaml", "fields"),
        ("picture.yaml", "text"),
        (".", "read"),
    ]:
        with pytest.raises(ConfigError) as error:
            load_config(Outer, tmp_path / name)
        assert part in str(error.value)
        assert "\n" not in str(error.value)


def test_an_empty_file_is_a_config_of_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert load_config(Outer, tmp_path / "a.yaml") == Outer()


def test_core_settings_import_nothing_heavy():
    code = "import sys, vlm_reward.core.config, vlm_reward.core.flags; print([m for m in ('torch', 'pandas', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
