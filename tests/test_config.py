from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from groupsae.architectures import ARCHITECTURES, BY_COUNT
from groupsae.config import Config, keys
from groupsae.errors import InputError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_the_defaults_are_valid_and_survive_the_way_through_yaml():
    config = Config.load()
    assert Config.parse(yaml.safe_load(config.dump())) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = Config.load(path)
    assert config.training.tokens == 1_000_000_000
    assert config.sae.k == 128
    assert config.sae.width(config.host.d_model) == 16 * config.host.d_model


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("sae: {k: 8}\ntraining: {tokens: 2e6}\n")
    config = Config.load(path, ["sae.k=16", "grouping.partition=[[0,1],[2]]", "host.name=a=b"])
    assert config.sae.k == 16
    assert config.training.tokens == 2_000_000
    assert config.grouping.partition == ((0, 1), (2,))
    assert config.host.name == "a=b"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2e6", 2_000_000),
        ("2M", 2_000_000),
        ("1_000_000", 1_000_000),
        ("50k", 50_000),
        ("1B", 10**9),
    ],
)
def test_counts_can_be_written_as_people_write_them(written, meant):
    assert Config.load(None, [f"training.tokens={written}"]).training.tokens == meant


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.tokn=5",
            "training.tokn = 5: there is no such key; did you mean training.tokens?",
        ),
        ("trainig.tokens=5", "did you mean training?"),
        ("k=3", "did you mean sae.k?"),
        ("training.tokens=many", "training.tokens = 'many'"),
        ("training.tokens=1.5", "training.tokens = 1.5"),
        ("training.tokens=-4096", "training.tokens = -4096: Input should be greater than 0"),
        ("sae.k=true", "sae.k = True: Input should be a whole number"),
        ("training.seed=10000000000", "training.seed = 10000000000: Input should be less than"),
        ("sae.k=0", "sae.k = 0: Input should be greater than 0"),
        ("sae=3", "sae = 3: this is a section; give its keys"),
        ("sae.architecture=topp", "sae.architecture = 'topp': Input should be 'topk'"),
        ("sae.d_sae=16", "sae.k: 32 is more than sae.d_sae = 16; lower k"),
        ("training.tokens=1.2.3", "training.tokens = '1.2.3': Input should be a valid integer"),
        ("provenance=3", "provenance = 3: Input should be a valid dictionary"),
        ("tokens.held_out=1.5", "tokens.held_out = 1.5: Input should be less than 1"),
        ("grouping.threshold=0", "grouping.threshold = 0"),
        ("grouping.method=kmeans", "'linkage', 'optimal' or 'even'"),
        ("training.tokens=100", "training.tokens: 100 is less than one batch"),
        ("training.buffer_tokens=100", "training.buffer_tokens: 100 is smaller than"),
        ("training.adam_betas=[0.9,1]", "training.adam_betas"),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("training.tokens", "'training.tokens' is no override; write key.path=value"),
        ("sae.k=[", "sae.k: '[' cannot be read as a value"),
        ("host.name.first=3", "host.name = {'first': 3}: Input should be a valid string"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(override, message):
    with pytest.raises(InputError) as error:
        Config.load(None, [override])
    assert message in str(error.value)


def test_layers_are_put_in_order():
    assert Config.load(None, ["grouping.layers=[4,2,4]"]).grouping.layers == (2, 4)


def test_a_fixed_number_of_groups_and_a_partition_exclude_each_other():
    with pytest.raises(InputError, match=r"grouping\.groups or grouping\.partition, not both"):
        Config.load(None, ["grouping.groups=2", "grouping.partition=0-1,2-3"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n- 2\n", "holds a list"),
        (b"a: [", "not valid YAML"),
        (b"\xff\xfe\x00", "config file"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        Config.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml does not exist"):
        Config.load(tmp_path / "nowhere.yaml")


def test_yaml_cannot_run_code(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("host: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(InputError, match="not valid YAML"):
        Config.load(path)


def test_every_key_has_a_meaning():
    described = list(keys())
    assert len(described) > 40
    assert all(meaning for _, _, _, meaning in described)
    kinds = {path: (kind, default) for path, kind, default, _ in described}
    assert kinds["sae.k"] == ("int|null", None)
    assert kinds["sae.expansion"] == ("int", 16)


def test_the_paper_s_learning_rate():
    config = Config.load(None, ["training.learning_rate=null"])
    assert config.training.rate(2**14) == pytest.approx(2e-4)
    assert config.training.rate(12288) == pytest.approx(2e-4 / (12288 / 2**14) ** 0.5)


def test_k_is_held_against_the_width_that_expansion_gives():
    sae = Config.load(overrides=["sae.k=33", "sae.expansion=1"]).sae
    assert sae.width(33) == 33
    with pytest.raises(InputError, match=r"sae\.k: 33 is more than d_sae = 32 .*raise sae\.exp"):
        sae.width(32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_s_defaults_are_resolved_and_survive_the_way_through_yaml(architecture):
    config = Config.load(None, [f"sae.architecture={architecture}"])
    sae = config.sae
    assert sae.k == (32 if architecture in BY_COUNT else None)
    assert sae.target_l0 == (32 if architecture == "jumprelu" else None)
    assert (sae.bandwidth is not None) == (architecture == "jumprelu")
    assert sae.initial_threshold is None
    assert (sae.prefix_shares is not None) == (architecture == "matryoshka")
    assert Config.parse(yaml.safe_load(config.dump())) == config


def test_a_price_of_the_l0_takes_the_place_of_the_target():
    overrides = ["sae.architecture=jumprelu", "training.sparsity_weight=0.01"]
    config = Config.load(None, overrides)
    assert config.sae.target_l0 is None
    assert Config.parse(yaml.safe_load(config.dump())) == config
    both = Config.load(None, [*overrides, "sae.target_l0=20"])
    assert both.sae.target_l0 == 20
    assert Config.parse(yaml.safe_load(both.dump())) == both


def test_a_default_can_be_asked_for_as_null():
    assert Config.load(None, ["sae.k=null"]) == Config.load()
    overrides = ["sae.architecture=jumprelu", "sae.k=null", "sae.target_l0=null"]
    assert Config.load(None, overrides) == Config.load(None, overrides[:1])


def test_jumprelu_without_a_target_or_a_price_is_refused():
    values = Config.load(None, ["sae.architecture=jumprelu"])
    sae = values.sae.model_copy(update={"target_l0": None})
    with pytest.raises(
        ValueError, match=r"jumprelu needs sae\.target_l0.*training\.sparsity_weight"
    ):
        Config(sae=sae)


@pytest.mark.parametrize(
    ("architecture", "override", "belongs_to"),
    [
        ("jumprelu", "sae.k=8", "topk, batchtopk, matryoshka"),
        ("relu", "sae.k=8", "topk, batchtopk, matryoshka"),
        ("gated", "sae.k=8", "topk, batchtopk, matryoshka"),
        ("topk", "sae.target_l0=8.0", "jumprelu"),
        ("batchtopk", "sae.target_l0=8.0", "jumprelu"),
        ("relu", "sae.bandwidth=0.1", "jumprelu"),
        ("gated", "sae.initial_threshold=0.1", "jumprelu"),
        ("topk", "sae.per_layer_threshold=True", "batchtopk, matryoshka, jumprelu"),
        ("relu", "sae.per_layer_threshold=True", "batchtopk, matryoshka, jumprelu"),
        ("batchtopk", "sae.prefix_shares=[0.5, 1]", "matryoshka"),
        ("jumprelu", "training.auxk_weight=0.03", "topk, batchtopk, matryoshka"),
        ("topk", "training.sparsity_weight=0.1", "jumprelu, relu, gated"),
        ("topk", "training.sparsity_warmup=0.1", "jumprelu, relu, gated"),
        ("topk", "training.threshold_learning_rate=0.1", "jumprelu"),
        ("gated", "training.threshold_learning_rate=0.1", "jumprelu"),
    ],
)
def test_an_option_of_another_sparsity_rule_is_refused(architecture, override, belongs_to):
    with pytest.raises(InputError) as error:
        Config.load(None, [f"sae.architecture={architecture}", override])
    (line,) = str(error.value).splitlines()
    name, _, value = override.partition("=")
    refused, _, rest = line.partition(" does not go with ")
    assert refused.startswith(f"{name}: ")
    assert value.strip("[]") in refused.removeprefix(f"{name}: ")
    assert rest.startswith(f"sae.architecture={architecture};")
    assert line.endswith(belongs_to)


@pytest.mark.parametrize("name", ["training.auxk_weight", "training.sparsity_warmup"])
def test_nothing_of_what_a_rule_has_not_is_accepted(name):
    architecture = "jumprelu" if name.endswith("auxk_weight") else "topk"
    Config.load(None, [f"sae.architecture={architecture}", f"{name}=0"])


@pytest.mark.parametrize("shares", ["[0.5, 0.2, 1]", "[0.5, 0.5, 1]", "[0.5]", "[0, 1]", "[]"])
def test_prefixes_must_rise_to_all_latents(shares):
    with pytest.raises(
        InputError, match=r"^sae\.prefix_shares: \[.*\] must rise from above 0 to 1;"
    ):
        Config.load(None, ["sae.architecture=matryoshka", f"sae.prefix_shares={shares}"])


def test_a_target_is_held_against_the_width():
    overrides = ["sae.architecture=jumprelu", "sae.target_l0=33"]
    with pytest.raises(InputError, match=r"^sae\.target_l0: 33.* more than sae\.d_sae = 32; lower"):
        Config.load(None, [*overrides, "sae.d_sae=32"])
    sae = Config.load(None, [*overrides, "sae.expansion=1"]).sae
    assert sae.width(33) == 33
    with pytest.raises(InputError, match=r"^sae\.target_l0: 33.* is more than d_sae = 32 .*raise"):
        sae.width(32)


@pytest.mark.parametrize(
    "override",
    [
        "training.warmup=1.5",
        "training.decay=-0.1",
        "training.weight_average=1",
        "training.sparsity_weight=0",
        "training.threshold_learning_rate=0",
        "training.auxk_weight=-1",
        "sae.bandwidth=0",
        "sae.initial_threshold=-1",
        "sae.target_l0=0",
    ],
)
def test_numbers_out_of_their_range_are_named(override):
    key, _, value = override.partition("=")
    with pytest.raises(InputError) as error:
        Config.load(None, ["sae.architecture=jumprelu", override])
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{key} = {value}: Input should be ")
