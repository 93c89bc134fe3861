"""Recipes: merging, extending, overriding, and errors that name the valid keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import TOYS, ToyConfig

from cmbench.errors import UserError
from cmbench.plugin import hookimpl
from cmbench.plugin.discovery import PluginInfo
from cmbench.plugin.manager import PluginManager
from cmbench.plugin.specs import DatasetSpec, MethodSpec
from cmbench.records.options import parse_value
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_run
from cmbench.sweep.recipes import (
    default_recipe,
    merge,
    parse_overrides,
    read_recipe_file,
    recipe_names,
    recipe_table,
)
from cmbench.sweep.runs import TrainingKit, build_modules
from cmbench.sweep.validation import validate
from cmbench.training.distributed import World

FILE = """
[base]
optimizer = { name = "adam", lr = 1e-3 }
conditional = false

[ring.demo]
network = { name = "mlp", width = 16 }
duration_kimg = 1

[ring.long]
extends = "demo"
duration_kimg = 100
optimizer = { lr = 2e-3 }

[ring.longer]
extends = "long"
network = { width = 32 }

[ring.other-network]
extends = "long"
network = { name = "linear" }

[line.paper]
duration_kimg = 3

[line.another]
duration_kimg = 4

[odd.zeta]
duration_kimg = 5
"""


@pytest.fixture
def spec(tmp_path: Path) -> MethodSpec:
    return with_file(tmp_path, FILE)


def with_file(folder: Path, text: str) -> MethodSpec:
    path = folder / "m.toml"
    path.write_text(text)
    return MethodSpec("m", "package:M", "M", recipes=path)


def test_a_file_without_the_name_of_a_recipe_says_which_it_has(
    spec: MethodSpec, tmp_path: Path
) -> None:
    path = tmp_path / "own.toml"
    path.write_text("[toys.one]\nsteps = 1\n[other.two]\nsteps = 2\n")
    says = rf"'{path}' names a file, not a recipe in it.*toys\.one, other\.two; give {path}:one"
    with pytest.raises(UserError, match=says):
        recipe_table(spec, "toys", str(path))


# ---- merging ------------------------------------------------------------------------------------


def test_base_recipe_and_parents_merge_key_by_key(spec: MethodSpec) -> None:
    assert recipe_table(spec, "ring", "longer") == {
        "optimizer": {"name": "adam", "lr": 2e-3},
        "conditional": False,
        "network": {"name": "mlp", "width": 32},
        "duration_kimg": 100,
    }


def test_another_name_replaces_the_whole_table(spec: MethodSpec) -> None:
    assert recipe_table(spec, "ring", "other-network")["network"] == {"name": "linear"}
    assert merge({"a": {"name": "x", "k": 1}}, {"a": {"name": "x", "j": 2}}) == {
        "a": {"name": "x", "k": 1, "j": 2}
    }


TABLES = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)
TABLE = st.dictionaries(st.sampled_from("abcd"), TABLES, max_size=4)


@given(TABLE, TABLE, TABLE)
def test_merging_is_an_override(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    before = repr(a), repr(b)
    merged = merge(a, b)
    assert merge(a, {}) == a == merge({}, a) == merge(a, a)
    assert merged.keys() == a.keys() | b.keys()
    assert merge(merged, b) == merged, "overriding twice is overriding once"
    assert (repr(a), repr(b)) == before
    for key, value in b.items():
        if not isinstance(value, dict) or not isinstance(a.get(key), dict):
            assert merged[key] == value


# ---- finding ------------------------------------------------------------------------------------


def test_the_default_is_demo_then_paper_then_the_first(spec: MethodSpec) -> None:
    assert [default_recipe(spec, d) for d in ("ring", "line", "odd")] == ["demo", "paper", "zeta"]
    assert ("ring", "long") in recipe_names(spec)
    assert recipe_names(spec, "line") == [("line", "paper"), ("line", "another")]


def test_unknown_names_say_what_there_is(spec: MethodSpec) -> None:
    with pytest.raises(UserError) as raised:
        recipe_table(spec, "ring", "lnog")
    assert str(raised.value) == (
        "method 'm' on 'ring': unknown recipe 'lnog'; allowed: demo, long, longer, other-network; "
        "did you mean 'long'?"
    )
    with pytest.raises(UserError, match=r"no recipe for dataset 'sea'; allowed: line, odd, ring"):
        recipe_table(spec, "sea", "demo")
    with pytest.raises(UserError, match=r"no recipe for dataset 'sea'; .*--recipe FILE:NAME"):
        default_recipe(spec, "sea")


def test_a_colon_alone_names_no_file(spec: MethodSpec) -> None:
    with pytest.raises(UserError, match="unknown recipe 'folder:demo'"):
        recipe_table(spec, "ring", "folder:demo")


def test_a_file_of_yours_builds_on_the_methods_own(spec: MethodSpec, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[ring.mine]\nextends = "demo"\nduration_kimg = 9\n[sea.mine]\nx = 1\n')
    assert recipe_table(spec, "ring", f"{own}:mine")["duration_kimg"] == 9
    assert recipe_table(spec, "sea", f"{own}:mine")["optimizer"]["name"] == "adam"
    bare = MethodSpec("m", "package:M", "M")
    assert recipe_table(bare, "sea", f"{own}:mine") == {"x": 1}
    with pytest.raises(UserError, match="has no recipe file; give a recipe file with --recipe"):
        recipe_table(bare, "sea", "mine")
    assert recipe_names(bare) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("digits = 3", "'digits' is 3; allowed: [base] and [DATASET.RECIPE]"),
        ("[digits]\ndemo = 5", "digits.demo is 5; allowed: a table [digits.NAME]"),
        ("[digits.'../up']\nx = 1", "recipe name '../up'; allowed: up to 40 letters, digits"),
        ("[digits.'']\nx = 1", "recipe name ''"),
        ("[digits.demo]\nextends = 3", "digits.demo: extends is 3; allowed: the name of another"),
        ("[digits", "is not valid TOML: "),
        ("x = [" * 5000, "is not valid TOML: "),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path: Path, text: str, found: str) -> None:
    spec = with_file(tmp_path, text)
    for read in (lambda: recipe_table(spec, "digits", "demo"), lambda: recipe_names(spec)):
        with pytest.raises(UserError) as raised:
            read()
        assert str(raised.value).startswith(f"recipe file {spec.recipes}: {found}")
        assert "\n" not in str(raised.value)


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"bytes\.toml: is not valid TOML"):
        read_recipe_file(tmp_path / "bytes.toml")
    with pytest.raises(UserError, match=r"missing\.toml: cannot be read \(No such file"):
        read_recipe_file(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[r.a]\nextends = "a"', "recipe r.a: extends itself through 'a'"),
        ('[r.a]\nextends = "b"\n[r.b]\nextends = "a"', "recipe r.b: extends itself through 'a'"),
        ('[r.a]\nextends = "gone"', "method 'm' on 'r': unknown recipe 'gone'"),
    ],
)
def test_extending_in_circles_or_nothing_is_one_line(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(UserError) as raised:
        recipe_table(with_file(tmp_path, text), "r", "a")
    assert str(raised.value).startswith(found)


# ---- overrides ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-4", 1e-4),
        ("true", True),
        ('"1"', "1"),
        ("heun", "heun"),
        ("", ""),
        ("[1, 2.5]", [1, 2.5]),
        ("{a = 1}", {"a": 1}),
        ("none", None),
        ("a=b", "a=b"),
        ("1\nother = 2", "1\nother = 2"),
        ("[" * 5000, "[" * 5000),
    ],
)
def test_values_are_toml_or_plain_strings(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_overrides_nest_and_the_last_wins() -> None:
    pairs = ["a.b=1", "a.c=x=y", "a.b=2", " d = true "]
    assert parse_overrides(pairs) == {"a": {"b": 2, "c": "x=y"}, "d": True}


@pytest.mark.parametrize("pair", ["lr", "=1", "a..b=1", ".a=1", "a.=1", "", "="])
def test_what_is_no_override_is_one_line(pair: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_overrides([pair])
    assert str(raised.value) == (
        f"-o: {pair!r} is not key=value; allowed: for example -o optimizer.lr=1e-4"
    )


@given(st.text(max_size=20))
def test_any_text_is_an_override_or_one_line(text: str) -> None:
    try:
        table = parse_overrides([text])
    except UserError as error:
        table = {"line": str(error)}
    assert table
    assert "\n" not in table.get("line", "")


# ---- validation ---------------------------------------------------------------------------------

GOOD = {"network": {"name": "mlp"}, "duration_kimg": 1}


def refused(**changes: Any) -> str:
    with pytest.raises(UserError) as raised:
        validate(ToyConfig, merge(GOOD, changes), "recipe m/d.r")
    text = str(raised.value)
    assert text.startswith("recipe m/d.r: ")
    assert "\n" not in text
    return text


def test_a_good_table_is_validated() -> None:
    assert validate(ToyConfig, GOOD, "who").duration_kimg == 1


def test_an_unknown_key_names_the_valid_ones_where_it_stood() -> None:
    text = refused(learning_rate=1)
    assert "recipe m/d.r: learning_rate: unknown key; allowed: keys " in text
    assert "allowed: keys augment, batch_size, checkpoint_kimg" in text
    assert text.endswith("correct the recipe or the -o override of 'learning_rate'")
    text = refused(optimizer={"weight_dcay": 1e-3})
    assert "optimizer.weight_dcay: unknown key" in text
    assert text.endswith("did you mean 'weight_decay'?")
    assert "allowed: keys betas, decay, decay_ref_steps, eps, grad_clip, lr, name, " in text
    text = refused(ema=[{"half": 3}])
    assert "allowed: keys decay, halflife_kimg, rampup_ratio, sigma_rel" in text


def test_all_problems_are_named_at_once() -> None:
    text = refused(batch_size=0, duration_kimg="long", optimizer={"lr": -1})
    assert all(part in text for part in ("batch_size: ", "duration_kimg: ", "optimizer.lr: "))
    assert "got 'long'" in text


@pytest.mark.parametrize("key", ["duration_kimg", "sigma_data", "checkpoint_kimg", "augment"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_are_finite(key: str, value: float) -> None:
    assert f"{key}: Input should be a finite number" in refused(**{key: value})


def test_missing_keys_are_named() -> None:
    with pytest.raises(UserError, match="network: Field required; duration_kimg: Field required"):
        validate(ToyConfig, {}, "who")


@pytest.mark.parametrize("value", [3, "x", None, []])
def test_a_value_in_a_tables_place_is_refused(value: object) -> None:
    assert "optimizer: Input should be a valid dictionary" in refused(optimizer=value)


def test_every_field_says_what_it_is() -> None:
    from cmbench.plugin.config import EMAConfig, MethodConfig, OptimizerConfig

    for model in (MethodConfig, OptimizerConfig, EMAConfig):
        for name, field in model.model_fields.items():
            assert field.description or name == "name", f"{model.__name__}.{name}"


def test_every_shipped_training_writes_checkpoints_on_its_way(context: Context) -> None:
    for name, spec in context.plugins.methods.specs.items():
        for dataset, recipe in recipe_names(spec):
            table = recipe_table(spec, dataset, recipe)
            between = table.get("checkpoint_kimg")
            assert between is None or between < table["duration_kimg"], (name, dataset, recipe)


def test_published_recipes_train_the_same_run_on_one_to_eight_gpus(context: Context) -> None:
    """Shards that all these numbers of processes share evenly; whole batches are for one only."""
    seen = 0
    for name, spec in context.plugins.methods.specs.items():
        published = [(d, recipe) for d, recipe in recipe_names(spec) if recipe.startswith("paper")]
        assert published, name
        for dataset, recipe in published:
            plan = plan_run(context, name, dataset, recipe, 0)
            while plan is not None:
                batch, shard = plan.config.batch_size, plan.config.microbatch_size
                if batch > 128:
                    assert shard is not None, plan.run_id
                    cuts = [next(World(0, size).shards(batch, shard))[1] for size in (1, 2, 4, 8)]
                    assert cuts == [shard] * 4, plan.run_id
                    seen += 1
                plan = plan.teacher.run if plan.teacher is not None else None
    assert seen > 20


def test_edm2s_recipes_weight_by_uncertainty(context: Context) -> None:
    """As teachers of a student's architecture too, which says nothing of the head."""
    for method in ("ect", "sct", "scd"):
        teacher = plan_run(context, method, "imagenet64", "paper", 0).teacher
        assert teacher is not None
        assert teacher.run is not None
        config = teacher.run.config
        assert (config.network["name"], getattr(config, "logvar_channels", 0)) == ("edm2", 128)


def test_heads_start_from_the_runs_seed_too(context: Context) -> None:
    """What a method builds without the kit is named by the run's seed, whatever was drawn."""

    def head(seed: int) -> torch.Tensor:
        torch.rand(3)
        plan = plan_run(context, "edm", "digits", "smoke", seed, ("logvar_channels=8",))
        before = torch.get_rng_state()
        weight = build_modules(context, plan, None)[1]["logvar"].state_dict()["linear.weight"]
        assert torch.equal(torch.get_rng_state(), before)
        return weight

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))


def test_networks_start_from_the_runs_seed_and_their_number(context: Context) -> None:
    """Whatever was drawn before, by the method too."""
    plan = plan_run(context, "edm", "digits", "smoke", 0)
    data = plan.method(context).data

    def two() -> list[torch.Tensor]:
        kit = TrainingKit(context, plan, data, None)
        found = []
        for _ in range(2):
            torch.rand(3)
            found.append(torch.cat([p.flatten() for p in kit.network().parameters()]))
        return found

    (first, second), again = two(), two()
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("batch_size=true", "batch_size"),
        ("duration_kimg=false", "duration_kimg"),
        ("network.channel_mult=[true,2]", "channel_mult"),
        ("optimizer.lr=true", "optimizer.lr"),
    ],
)
def test_true_and_false_are_not_read_as_numbers(context: Context, override: str, name: str) -> None:
    with pytest.raises(UserError, match=f": {name}: true and false are not numbers"):
        plan_run(context, "edm", "digits", "smoke", 0, (override,))


def test_a_switch_takes_true_and_false(context: Context) -> None:
    plan = plan_run(context, "edm", "digits", "smoke", 0, ("conditional=true",))
    assert plan.config.conditional is True


def test_a_teacher_that_would_be_ignored_is_refused(context: Context) -> None:
    with pytest.raises(UserError, match="'edm' trains without a teacher, so 'analytic' would be"):
        plan_run(context, "edm", "gmm", None, 0, ("teacher=analytic",))


@pytest.mark.parametrize("key", ["duration_kimg", "batch_size", "checkpoint_kimg"])
@pytest.mark.parametrize("value", [1e308, 10**400, -(10**13)])
def test_numbers_whose_products_overflow(key: str, value: float) -> None:
    assert f"{key}: numbers go up to 1e+12" in refused(**{key: value})


# ---- recipes that datasets bring ----------------------------------------------------------------

BROUGHT = """
[base]
conditional = true

[m.own]
network = { name = "mlp", width = 8 }
duration_kimg = 7

[m.longer]
extends = "own"
duration_kimg = 70

[other.own]
duration_kimg = 1
"""


@pytest.fixture
def brought(tmp_path: Path) -> Path:
    path = tmp_path / "sea.toml"
    path.write_text(BROUGHT)
    return path


def test_a_dataset_brings_recipes_for_a_method_of_somebody_else(
    spec: MethodSpec, brought: Path
) -> None:
    both = spec._replace(dataset_recipes=(("sea", brought),))
    assert recipe_names(both, "sea") == [("sea", "own"), ("sea", "longer")]
    assert set(recipe_names(both)) == {*recipe_names(spec), ("sea", "own"), ("sea", "longer")}
    assert default_recipe(both, "sea") == "own"
    assert recipe_table(both, "sea", "longer") == {
        "optimizer": {"name": "adam", "lr": 1e-3},
        "conditional": True,
        "network": {"name": "mlp", "width": 8},
        "duration_kimg": 70,
    }
    assert recipe_table(both, "ring", "demo") == recipe_table(spec, "ring", "demo")
    bare = MethodSpec("m", "package:M", "M", dataset_recipes=(("sea", brought),))
    assert recipe_table(bare, "sea", "own")["duration_kimg"] == 7


def test_a_recipe_that_the_method_has_itself_is_not_replaced(
    spec: MethodSpec, tmp_path: Path
) -> None:
    path = tmp_path / "ring.toml"
    path.write_text("[m.demo]\nduration_kimg = 1\n")
    both = spec._replace(dataset_recipes=(("ring", path),))
    with pytest.raises(
        UserError, match=r"\[m\.demo\] is a recipe that method 'm' has for 'ring' its"
    ):
        recipe_names(both)


@pytest.mark.parametrize("order", [0, 1])
def test_the_loader_tells_methods_of_datasets_with_recipes(brought: Path, order: int) -> None:
    class Methods:
        @hookimpl
        def cmbench_register_methods(self) -> list[MethodSpec]:
            return [MethodSpec("m", "package:M", "M")]

    class Datasets:
        @hookimpl
        def cmbench_register_datasets(self) -> list[DatasetSpec]:
            return [TOYS._replace(name="sea", recipes=brought), TOYS]

    manager = PluginManager()
    for plugin in (Methods(), Datasets()) if order else (Datasets(), Methods()):
        name = type(plugin).__name__
        assert manager.register(plugin, PluginInfo(name, "p", name, "1")).status == "ok"
    assert manager.methods.get("m").dataset_recipes == (("sea", brought),)
    assert recipe_names(manager.methods.get("m")) == [("sea", "own"), ("sea", "longer")]


LSUN = ("lsun-bedroom256", "lsun-cat256")
SIZES = ("paper", "paper-m", "paper-l", "paper-xl")


@pytest.mark.parametrize(
    ("method", "dataset", "names"),
    [
        *((m, "imagenet512", (*SIZES, "paper-xxl")) for m in ("edm", "sct", "scd")),
        *((m, "imagenet64", SIZES) for m in ("edm", "ect", "sct", "scd")),
        *((m, d, ("paper",)) for m in ("edm", "cd", "ct") for d in LSUN),
        *((m, d, ("launch-script",)) for m in ("cd", "ct") for d in LSUN),
    ],
)
def test_the_trainable_rows_of_the_talk_have_recipes(
    context: Context, method: str, dataset: str, names: tuple[str, ...]
) -> None:
    plans = [plan_run(context, method, dataset, name, 0) for name in names]
    widths = [plan.config.network["channels"] for plan in plans]
    assert widths == [192, 256, 320, 384, 448][: len(names)] or dataset in LSUN
    for plan in plans:
        teacher = plan.teacher.run if plan.teacher is not None else None
        if teacher is not None:
            assert teacher.config.network["channels"] == plan.config.network["channels"]
        if method in ("sct", "scd"):
            assert teacher is not None
            # The student's dropout is its own, the teacher's hidden classes are the teacher's.
            hidden = 0.1 if dataset == "imagenet512" else 0.0
            assert teacher.config.network["label_dropout"] == hidden
            assert plan.config.network["label_dropout"] == 0.0
            rate = teacher.config.optimizer.lr
            assert plan.config.optimizer.lr == pytest.approx(rate / 100), "App. G"


def test_second_times_that_no_source_gives_are_left_to_tune_times(context: Context) -> None:
    known = {
        (method, dataset): plan_run(context, method, dataset, "paper", 0).table["mid_sigmas"]
        for method in ("cd", "ct")
        for dataset in LSUN
    }
    # Indices 17 of 39, 67 and 62 of 150 of the grids in OpenAI's launch.sh.
    assert known == {
        ("cd", LSUN[0]): [pytest.approx(4.3656, abs=1e-4)],
        ("cd", LSUN[1]): [],
        ("ct", LSUN[0]): [pytest.approx(3.9912, abs=1e-4)],
        ("ct", LSUN[1]): [pytest.approx(5.2485, abs=1e-4)],
    }
