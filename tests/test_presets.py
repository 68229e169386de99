"""The paper's settings by name, and where they lie among what else is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from groupsae.config import Config, SAEConfig, keys
from groupsae.errors import InputError
from groupsae.presets import PRESETS

CONFIGS = Path(__file__).parents[1] / "configs"


def values(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"preset", "provenance"})


def differences(config: Config, other: Config) -> dict[str, Any]:
    """What `config` has otherwise than `other`."""
    there = values(other)
    return {
        f"{section}.{key}": value
        for section, found in values(config).items()
        for key, value in found.items()
        if value != there[section][key]
    }


def test_v2_is_the_paper_s_recipe():
    """arXiv 2410.21508v2, and its published scripts: 8 processes with 16 contexts of 1,024."""
    assert differences(Config.load(None, ["preset=group-sae-v2"]), Config()) == {
        "tokens.context_length": 1024,
        "grouping.distance_tokens": 10_000_000,
        "sae.k": 128,
        "sae.affine": "scale",
        "sae.encoder_norm": pytest.approx(3**-0.5, abs=1e-3),  # the rows of torch.nn.Linear
        "training.tokens": 1_000_000_000,
        "training.batch_tokens": 8 * 16 * 1024,
        "training.buffer_tokens": 262_144,
        "training.dead_after_tokens": 10_000_000,
        "evaluation.tokens": 1_000_000,
    }
    config = Config.load(None, ["preset=group-sae-v2"])
    assert (config.sae.architecture, config.sae.expansion) == ("topk", 16)
    assert (config.grouping.threshold, config.grouping.center) == (0.2, True)
    assert config.training.gradient_clip == 1


def test_v1_is_the_paper_s_recipe():
    """arXiv 2410.21508v1."""
    assert differences(Config.load(None, ["preset=group-sae-v1"]), Config()) == {
        "grouping.distance_tokens": 5_000_000,
        "grouping.center": False,
        "sae.architecture": "jumprelu",
        "sae.k": None,
        "sae.target_l0": 32,
        "sae.bandwidth": 0.001,
        "sae.expansion": 8,
        "sae.affine": "scale",
        "training.tokens": 1_000_000_000,
        "training.batch_tokens": 4096,
        "training.learning_rate": 3e-5,
        "training.adam_betas": [0.0, 0.999],
        "training.sparsity_weight": 1.0,
        "training.warmup": 0.05,
        "training.decay": 0.2,
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_s_resolved_config_names_it_and_loads_to_itself(name):
    config = Config.load(None, [f"preset={name}"])
    written = yaml.safe_load(config.dump())
    assert written["preset"] == name
    assert all(
        written[section][key] == (list(value) if isinstance(value, tuple) else value)
        for section, stated in PRESETS[name].items()
        for key, value in stated.items()
    )
    assert Config.parse(written) == config
    assert values(Config.parse(written | {"preset": None})) == values(config)


def test_what_is_given_lies_above_a_preset_in_the_file_and_on_the_command_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("preset: group-sae-v2\nsae: {k: 64}\ntraining: {tokens: 5M}\n")
    config = Config.load(path, ["training.dead_after_tokens=1M", "sae.expansion=4"])
    assert (config.sae.k, config.sae.expansion, config.sae.affine) == (64, 4, "scale")
    assert (config.training.tokens, config.training.dead_after_tokens) == (5 * 10**6, 10**6)
    assert config.training.batch_tokens == 131_072
    assert Config.load(path, ["preset=null"]).training.batch_tokens == 2048
    assert Config.load(path, ["preset=group-sae-v2"]) == Config.load(path)


def test_a_null_that_is_given_lies_above_a_preset():
    config = Config.load(None, ["preset=group-sae-v1", "sae.target_l0=null"])
    assert config.sae.target_l0 is None, "the L0 itself is the penalty"
    assert Config.parse(yaml.safe_load(config.dump())) == config
    default = Config.load(None, ["preset=group-sae-v1", "training.warmup=null"])
    assert default.training.warmup is None


def test_a_preset_is_laid_beneath_in_python_too():
    config = Config(preset="group-sae-v2", training={"tokens": 10**6})
    assert (config.sae.k, config.training.tokens) == (128, 10**6)
    built = SAEConfig(d_sae=4096)
    assert Config(preset="group-sae-v2", sae=built).sae == built, "a section that is whole stays"


@pytest.mark.parametrize("name", ["group-sae-v3", "3", "[1]"])
def test_an_unknown_preset_is_refused_with_those_that_are_known(name):
    with pytest.raises(InputError, match=r"preset = .*'group-sae-v1' or 'group-sae-v2'"):
        Config.load(None, [f"preset={name}"])


def test_a_section_of_another_form_is_refused_beside_a_preset():
    with pytest.raises(InputError, match="sae = 3: this is a section; give its keys"):
        Config.load(None, ["preset=group-sae-v2", "sae=3"])


def test_a_misspelt_preset_is_recognised():
    with pytest.raises(InputError, match="did you mean preset"):
        Config.load(None, ["prest=group-sae-v2"])


def test_help_lists_the_presets_with_what_they_set():
    ((kind, default, meaning),) = [rest for path, *rest in keys() if path == "preset"]
    assert (kind, default) == ("group-sae-v1|group-sae-v2|null", None)
    for stated in (
        "group-sae-v1: ",
        "sae.expansion=8",
        "grouping.center=false",
        "group-sae-v2: ",
        "sae.k=128",
    ):
        assert stated in meaning


@pytest.mark.parametrize(
    ("model", "n_layers", "d_model", "batch_tokens"),
    [("160m", 12, 768, 131_072), ("410m", 24, 1024, 65_536), ("1b", 16, 2048, 32_768)],
)
def test_the_shipped_configs_are_those_that_were_written_out(
    model, n_layers, d_model, batch_tokens
):
    """16, 8 and 4 contexts of 1,024 tokens for each of 8 processes."""
    written_out = {
        "host": {"name": f"EleutherAI/pythia-{model}", "n_layers": n_layers, "d_model": d_model},
        "tokens": {"source": "EleutherAI/the_pile_deduplicated", "context_length": 1024},
        "grouping": {"distance_tokens": "10M", "threshold": 0.2},
        "sae": {"k": 128, "expansion": 16, "affine": "scale", "encoder_norm": 0.577},
        "training": {
            "tokens": "1B",
            "batch_tokens": batch_tokens,
            "buffer_tokens": 2 * batch_tokens,
            "host_batch_contexts": 16,
            "dead_after_tokens": "10M",
        },
        "evaluation": {"tokens": "1M", "batch_contexts": 8},
    }
    shipped = Config.load(CONFIGS / f"pythia-{model}.yaml")
    assert shipped.preset == "group-sae-v2"
    assert values(shipped) == values(Config.parse(written_out))
