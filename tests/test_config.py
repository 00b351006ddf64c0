"""What a user writes becomes a Config, or one line a mistake that says how to put it right."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono import config as config_module
from unisono.config import RECIPES, Config, apply_overrides, load, parse
from unisono.errors import EXIT_USAGE, ConfigError

LEAST = {"model": "m", "data": "text.txt", "output_dir": "out"}


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse({**LEAST, **changes})
    return str(caught.value)


def write(folder: Path, text: str) -> str:
    path = folder / "job.yaml"
    path.write_text(text)
    return str(path)


def test_least_configuration_and_defaults() -> None:
    config = parse(LEAST)
    assert config.data.path == ("text.txt",)
    assert (config.global_batch_size, config.learning_rate) == (32, 5e-5)
    assert (config.sync, config.determinism, config.resume) == ("exact", "default", "auto")


@pytest.mark.parametrize("data", ["a.txt", ["a.txt", "b/"], {"path": "a.txt"}, {"path": ["a.txt"]}])
def test_data_is_a_path_or_paths_or_a_section(data: object) -> None:
    assert parse({**LEAST, "data": data}).data.path[0] == "a.txt"


def test_config_is_frozen() -> None:
    config = parse(LEAST)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


# --- unknown keys


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lerning_rate": 1}, "config: unknown key lerning_rate: did you mean learning_rate?"),
        ({"global_batchsize": 1}, "unknown key global_batchsize: did you mean global_batch_size?"),
        ({"data": {"path": "a", "eval_fration": 0.1}}, "unknown key data.eval_fration: did you mean data.eval_fraction?"),
        ({"tokenizer": {"vocabsize": 300}}, "unknown key tokenizer.vocabsize: did you mean tokenizer.vocab_size?"),
        ({"data": {"path": "a", "seed": 1}}, "unknown key data.seed: known: path, eval_path"),
        ({"qqqqqqq": 1}, "unknown key qqqqqqq: known: model, tokenizer, data"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_known_one(changes: dict, line: str) -> None:
    message = refusal(**changes)
    assert line in message
    assert "\n" not in message


@pytest.mark.parametrize("name", sorted(config_module._HINTS))
def test_names_from_elsewhere_say_what_to_write(name: str) -> None:
    assert name not in Config.model_fields, "a hint for a key that exists is never shown"
    message = refusal(**{name: 1})
    assert message == f"config: unknown key {name}: {config_module._HINTS[name]}"
    named = [word for word in message.replace(":", " ").split() if word in Config.model_fields]
    assert named, "the hint names a field that exists"


# --- wrong values


@pytest.mark.parametrize(
    ("changes", "field", "found", "fix"),
    [
        ({"learning_rate": -1}, "learning_rate", "-1", "greater than 0"),
        ({"learning_rate": "fast"}, "learning_rate", "'fast'", "valid number"),
        ({"learning_rate": True}, "learning_rate", "True", "not be a yes or no"),
        ({"learning_rate": float("inf")}, "learning_rate", "inf", "finite number"),
        ({"learning_rate": float("nan")}, "learning_rate", "nan", "finite number"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs", "inf", "finite number"),
        ({"timeout_s": float("inf")}, "timeout_s", "inf", "finite number"),
        ({"global_batch_size": 0}, "global_batch_size", "0", "greater than or equal to 1"),
        ({"global_batch_size": 2.5}, "global_batch_size", "2.5", "valid integer"),
        ({"global_batch_size": True}, "global_batch_size", "True", "not be a yes or no"),
        ({"global_batch_size": "1e400"}, "global_batch_size", "'1e400'", "valid integer"),
        ({"micro_batch_size": 0}, "micro_batch_size", "0", "greater than or equal to 1 or 'auto'"),
        ({"micro_batch_size": "many"}, "micro_batch_size", "'many'", "or 'auto'"),
        ({"replicas": 0}, "replicas", "0", "greater than or equal to 1 or 'auto'"),
        ({"replicas": 1.5}, "replicas", "1.5", "or 'auto'"),
        ({"warmup_steps": -1}, "warmup_steps", "-1", "greater than or equal to 0 or 'auto'"),
        ({"seed": -1}, "seed", "-1", "greater than or equal to 0"),
        ({"seed": 2**64}, "seed", str(2**64), "less than"),
        ({"threads": 0}, "threads", "0", "greater than or equal to 1"),
        ({"bf16": "maybe"}, "bf16", "'maybe'", "valid boolean"),
        ({"optim": "adam"}, "optim", "'adam'", "'adamw', 'sgd' or 'muon'"),
        ({"sync": "zero"}, "sync", "'zero'", "'exact'"),
        ({"determinism": True}, "determinism", "True", "not be a yes or no"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type", "'cosin'", "'cosine'"),
        ({"output_dir": 3}, "output_dir", "3", "valid string"),
        ({"output_dir": None}, "output_dir", "None", "valid string"),
        ({"model": 3}, "model", "3", "valid string or a mapping"),
        ({"model": {"hidden_size": 3}}, "model", "{'hidden_size': 3}", "needs model_type, for example llama"),
        ({"data": 3}, "data", "3", "a mapping"),
        ({"data": {"path": 3}}, "data.path", "3", "a list"),
        ({"data": {"path": ["a", 3]}}, "data.path.1", "3", "valid string"),
        ({"data": {"path": "a", "eval_fraction": 1.0}}, "data.eval_fraction", "1.0", "less than 1"),
        ({"data": {"path": "a", "packing": "best"}}, "data.packing", "'best'", "'best_fit'"),
        ({"tokenizer": 3}, "tokenizer", "3", "valid string or a mapping"),
        ({"tokenizer": {"vocab_size": 3}}, "tokenizer.vocab_size", "3", "greater than or equal to 260"),
        ({"report_to": "wandb"}, "report_to.0", "'wandb'", "'tensorboard'"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_with_field_value_and_fix(
    changes: dict, field: str, found: str, fix: str
) -> None:
    message = refusal(**changes)
    assert message.startswith(f"config: {field}: found {found}; ")
    assert fix in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["model", "data", "output_dir"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^config: {name} is missing: add it$"):
        parse({k: v for k, v in LEAST.items() if k != name})


def test_every_mistake_has_its_line() -> None:
    lines = refusal(seed=-1, lr=3, tokenizer={"vocab_size": 1}).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("config: ") for line in lines)


def test_a_large_value_does_not_flood_the_message() -> None:
    assert len(refusal(optim="x" * 10**6)) < 300
    assert len(refusal(output_dir=list(range(10**5)))) < 300
    assert "very many digits" in refusal(optim=10**5000)


# --- YAML


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_yaml_without_a_dot_in_an_exponent_is_a_number(tmp_path: Path, written: str) -> None:
    """YAML 1.1 reads 1e-4 as a string."""
    assert yaml.safe_load("1e-4") == "1e-4"
    text = f"model: m\ndata: d\noutput_dir: o\nlearning_rate: {written}\n"
    assert load(write(tmp_path, text)).learning_rate == 1e-4


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch %s']",
        "a: !!python/name:os.system",
        "a: !!python/object/new:os._wrap_close [1]",
        "a: [",
        "a: !!bool maybe",
        "a: !!timestamp never",
        "a: 2024-13-45",
        "a: " + "1" * 5000,
        "[" * 3000,
        "a: *nowhere",
        "\t- x: \x00",
    ],
)
def test_hostile_yaml_is_refused_and_runs_nothing(tmp_path: Path, text: str) -> None:
    witness = tmp_path / "ran"
    path = write(tmp_path, text.replace("%s", str(witness)))
    with pytest.raises(ConfigError, match="cannot be read as YAML") as caught:
        load(path)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)
    assert not witness.exists()


@pytest.mark.timeout(20)
def test_yaml_that_grows_or_contains_itself_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{" + ", ".join(f"k{j}: *a{i - 1}" for j in range(9)) + "}" for i in range(1, 30)]  # fmt: skip
    for text in ("\n".join(lines), "data: &a {path: *a}", "optim: &a [*a, *a]"):
        with pytest.raises(ConfigError):
            load(write(tmp_path, text), ["seed=1"])


@pytest.mark.parametrize("text", ["", "[]", "- a", "just text", "3", "null", "2024-01-01"])
def test_not_a_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.yaml: must be a mapping of keys to values, found"):
        load(write(tmp_path, text))


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(path))


def test_no_such_file_names_the_recipes(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none.yaml"), str(tmp_path), "shakespear"):
        with pytest.raises(ConfigError, match=r"no such file, .*\(.*shakespeare.*\)"):
            load(source)


def test_a_file_goes_before_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shakespeare").write_text("model: m\ndata: d\noutput_dir: mine\n")
    assert load("shakespeare").output_dir == "mine"


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_shipped_recipes_load(name: str) -> None:
    config = load(name, ["output_dir=elsewhere"])
    assert config.output_dir == "elsewhere"


# --- overrides


def test_overrides() -> None:
    items = [
        "learning_rate=3e-4", "data.path=[a.txt, b.txt]", "data.eval-fraction=0.2", "max_steps=7",
        "model.model_type=gpt2", "bf16=true", "tokenizer.vocab_size=300", "sample_prompt=a=b",
        "max_steps=null", "sample_tokens=3", "sample_tokens=4",
    ]  # fmt: skip
    raw = {**LEAST, "seed": 5}
    config = parse(apply_overrides(raw, items))
    assert config.learning_rate == 3e-4
    assert config.data.path == ("a.txt", "b.txt")
    assert config.data.eval_fraction == 0.2
    assert config.max_steps is None, "null takes a value away; the later override wins"
    assert config.sample_tokens == 4
    assert config.model == {"model_type": "gpt2"}
    assert config.bf16 is True
    assert config.sample_prompt == "a=b"
    assert config.seed == 5
    assert raw == {**LEAST, "seed": 5}, "the mapping given is left alone"


def test_an_override_of_a_nested_value_keeps_its_neighbours() -> None:
    raw = {**LEAST, "data": {"path": "a", "eval_fraction": 0.5}}
    config = parse(apply_overrides(raw, ["data.path=b"]))
    assert (config.data.path, config.data.eval_fraction) == (("b",), 0.5)
    assert raw["data"]["path"] == "a"
    config = parse(apply_overrides(LEAST, ["data.eval_fraction=0.5"]))
    assert (config.data.path, config.data.eval_fraction) == (("text.txt",), 0.5)


@pytest.mark.parametrize("item", ["learning_rate", "=3", "", "--replicas"])
def test_an_override_without_key_or_value(item: str) -> None:
    with pytest.raises(ConfigError, match="write key=value, for example"):
        apply_overrides(LEAST, [item])


@pytest.mark.parametrize("item", ["seed=[1", "seed=!!python/name:os.system", "seed=2024-13-45"])
def test_an_override_that_is_not_yaml(item: str) -> None:
    with pytest.raises(ConfigError, match=r"override .*cannot be read as YAML"):
        apply_overrides(LEAST, [item])


def test_an_unknown_override_is_refused_like_an_unknown_key() -> None:
    for item in ("lr=3", "data.pathh=3", "seed.x=3", ".seed=3", "seed.=3"):
        with pytest.raises(ConfigError):
            parse(apply_overrides(LEAST, [item]))


def test_errors_are_usage_errors() -> None:
    assert ConfigError("x").exit_code == EXIT_USAGE


# --- anything at all

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
    | st.binary(max_size=4) | st.integers(10**40, 10**41) | st.sampled_from(["auto", "1e-4", "strict"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(Config.model_fields)) | SCALARS


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=6), st.booleans())
def test_any_mapping_is_a_config_or_a_config_error(raw: dict, complete: bool) -> None:
    try:
        config = parse({**LEAST, **raw} if complete else raw)
    except ConfigError:
        return
    again = parse(config.model_dump(mode="json"))
    assert again == config, "what is saved with a run reads back as the same"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=3))
def test_any_override_is_a_config_or_a_config_error(items: list[str]) -> None:
    with contextlib.suppress(ConfigError):
        parse(apply_overrides(LEAST, items))


# --- attention


def test_attention_is_a_word_or_a_mapping() -> None:
    assert parse(LEAST).attention == "auto"
    asked = parse({**LEAST, "attention": {"window": 4096, "sinks": 4}}).attention
    assert (asked.window, asked.sinks) == (4096, 4)
    assert parse({**LEAST, "attention": {"pattern": "bigbird", "layers": [1]}}).attention.layers == (1,)  # fmt: skip


@pytest.mark.parametrize(
    ("attention", "told"),
    [
        ("fast", "attention: found 'fast'; "),
        ({"window": 0}, "attention.window: found 0; "),
        ({"windows": 4}, "unknown key attention.windows: did you mean attention.window?"),
        ({"sinks": 4}, "sinks need a window"),
        ({"window": 64, "pattern": "bigbird"}, "write either window or pattern"),
        ({"pattern": "bird"}, "attention.pattern: found 'bird'; "),
    ],
)
def test_attention_that_makes_no_sense_is_told(attention: Any, told: str) -> None:
    assert told in refusal(attention=attention)


def test_quantized_scales_are_of_quantized_weights() -> None:
    fields = {"model": "m", "data": "d", "output_dir": "o"}
    asked = parse({**fields, "lora": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}})
    assert asked.lora.load_in_4bit and asked.lora.bnb_4bit_use_double_quant
    with pytest.raises(ConfigError, match=r"lora: found .* needs load_in_4bit: true"):
        parse({**fields, "lora": {"bnb_4bit_use_double_quant": True}})
