"""What a run is: one frozen, validated section per stage."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from groupsae.architectures import BY_COUNT, check_option
from groupsae.errors import InputError
from groupsae.presets import PRESETS, beneath, described

_MULTIPLES = {"k": 10**3, "m": 10**6, "b": 10**9}


def _count(value: object) -> object:
    """Read 2e6, "2M" and "1_000" as whole numbers; leave the rest to the type's own check."""
    if isinstance(value, bool):  # which pydantic would read as 0 or 1
        raise ValueError("Input should be a whole number")
    if isinstance(value, str):
        number_and_unit = r"\s*((?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([kmb]?)\s*"
        match = re.fullmatch(number_and_unit, value.lower())
        if match:
            number = float(match[1].replace("_", "")) * _MULTIPLES.get(match[2], 1)
            return int(number) if number.is_integer() else value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(layers)))


Count = Annotated[int, BeforeValidator(_count), Field(gt=0)]
Layers = Annotated[tuple[int, ...], AfterValidator(_ascending)]
LayerSampling = Literal["uniform", "balanced", "all"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class HostConfig(_Section):
    """The language model under study."""

    name: str = Field(
        "bundled",
        description="'bundled' (the small model that comes with groupsae), a local folder, or a "
        "name on the Hugging Face hub",
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = Field(
        "auto", description="the forward's precision; auto: the checkpoint's on a GPU, else float32"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps")
    n_layers: Count | None = Field(
        None, description="number of blocks, to plan without loading; checked when it is loaded"
    )
    d_model: Count | None = Field(
        None, description="width, to plan without loading; checked when it is loaded"
    )


class TokensConfig(_Section):
    """The text that the activations come from."""

    source: str = Field(
        "bundled",
        description="'bundled' (generated English), a .txt, .jsonl or .parquet file, a folder of "
        "them or of a saved data set, or a data set on the hub (streamed)",
    )
    split: str = Field("train", description="split of a data set")
    subset: str | None = Field(None, description="configuration (subset) of a hub data set")
    column: str | None = Field(
        None, description="column of text or token ids; by default text, tokens or input_ids"
    )
    revision: str | None = Field(None, description="revision of a data set on the hub")
    context_length: Count = Field(128, description="tokens in one packed context")
    prepend_bos: bool | None = Field(
        None, description="begin each context with BOS; by default where the tokenizer does"
    )
    exclude_special: bool = Field(
        True, description="keep special tokens (BOS, EOS) out of distances, training and metrics"
    )
    held_out: float = Field(
        0.05, gt=0, lt=1, description="share of the documents kept for evaluation, never trained on"
    )
    on_exhausted: Literal["error", "repeat"] = Field(
        "error", description="when the text is used up: stop, or begin another epoch"
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="where a document, a file of a folder or the rest of a streamed file cannot be "
        "read: stop, or pass over it and count it",
    )
    retries: int = Field(
        5,
        ge=0,
        description="how often a read of a stream that breaks off is tried again, after pauses of "
        "0.5 seconds doubling to 60",
    )
    seed: int = Field(0, ge=0, description="order of the documents, and which are held out")


class GroupingConfig(_Section):
    """Which layers share a dictionary."""

    layers: Literal["all_but_last", "all"] | Layers = Field(
        "all_but_last", description="layers to cover: all_but_last, all, or a list such as [2,3,4]"
    )
    distance_tokens: Count = Field(
        100_000,
        description="tokens for the distances and the layers' means and norms (paper: 10M)",
    )
    center: bool = Field(
        True, description="subtract each layer's mean before the angles (v2 of the paper)"
    )
    similarity: Literal["angular", "cka", "svcca"] = Field(
        "angular",
        description="what distances are: mean angles (paper); 1 - linear CKA, debiased; 1 - SVCCA "
        "of 99% of the variance, which holds 4 * layers^2 * d_model^2 bytes. The paper's threshold "
        "is for angles",
    )
    method: Literal["linkage", "optimal", "even"] = Field(
        "linkage",
        description="complete linkage (paper), exact smallest diameters, or groups of equal length",
    )
    threshold: float = Field(
        0.2, gt=0, le=1, description="choose the smallest G with AMAD below this (paper: 0.2)"
    )
    groups: Count | None = Field(None, description="fix G instead of using the threshold")
    partition: tuple[tuple[int, ...], ...] | str | None = Field(
        None, description="the groups themselves: [[0,1],[2,3,4]] or 0-1,2-4"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> GroupingConfig:
        if self.groups is not None and self.partition is not None:
            raise ValueError("give either grouping.groups or grouping.partition, not both")
        return self

    @model_validator(mode="after")
    def _means_of_similarity(self) -> GroupingConfig:
        if self.similarity != "angular" and not self.center:
            raise ValueError(
                f"grouping.center: false goes with grouping.similarity=angular alone; "
                f"{self.similarity} subtracts the means by definition; leave grouping.center out"
            )
        return self


class SAEConfig(_Section):
    """The dictionary."""

    architecture: Literal["topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated"] = Field(
        "topk", description="sparsity rule"
    )
    k: Count | None = Field(
        None,
        description="topk, batchtopk, matryoshka: active latents per token, exactly or on average; "
        "32 by default (paper: 128)",
    )
    expansion: Count = Field(16, description="d_sae / d_model")
    d_sae: Count | None = Field(None, description="number of latents, instead of expansion")
    affine: Literal["none", "scale", "center", "bias", "gain"] = Field(
        "center",
        description="what each member layer has of its own: nothing; its scale (paper); its scale "
        "and mean; these and a learned bias on the latents; these and a learned gain on every "
        "dimension of input and output",
    )
    encoder_norm: float | None = Field(
        None,
        gt=0,
        description="norm of the encoder's rows at the start, which have the decoder's directions; "
        "by default what reconstructs the first batch best, with relu and gated 0.05 (1: the "
        "decoder's transpose)",
    )
    target_l0: float | None = Field(
        None,
        gt=0,
        description="jumprelu: the L0 to train for; 32 by default, unless a "
        "training.sparsity_weight for the L0 itself is given",
    )
    per_layer_threshold: bool = Field(
        False,
        description="batchtopk, matryoshka, jumprelu: each member layer has k, or target_l0 and "
        "thresholds, for itself, instead of the group as a whole",
    )
    bandwidth: float | None = Field(
        None,
        gt=0,
        description="jumprelu: width of the estimators' rectangle about a threshold; by default "
        "0.001 (Rajamanoharan et al. 2024)",
    )
    initial_threshold: float | None = Field(
        None,
        gt=0,
        description="jumprelu: where thresholds start; by default where target_l0 latents are "
        "active on the first batch, without a target 0.001 (the same)",
    )
    prefix_shares: tuple[float, ...] | None = Field(
        None,
        description="matryoshka: ends of the nested dictionaries in shares of d_sae; by default "
        "1/32, 3/32, 7/32, 15/32, 1 (Bussmann et al. 2025)",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """What an architecture takes unless it is told; nothing for what it has not."""
        if not isinstance(values, Mapping):
            return values
        architecture = values.get("architecture", "topk")
        defaults: dict[str, object] = {"k": 32} if architecture in BY_COUNT else {}
        if architecture == "jumprelu":
            defaults = {"bandwidth": 0.001}
        if architecture == "matryoshka":
            defaults["prefix_shares"] = [1 / 32, 3 / 32, 7 / 32, 15 / 32, 1]
        given = {name: value for name, value in values.items() if value is not None}
        return {**values, **defaults, **given}

    @model_validator(mode="after")
    def _go_together(self) -> SAEConfig:
        options = ("k", "target_l0", "per_layer_threshold", "bandwidth", "initial_threshold")
        for name in (*options, "prefix_shares"):
            check_option(f"sae.{name}", getattr(self, name), self.architecture)
        shares = self.prefix_shares
        if shares is not None and (shares[-1:] != (1,) or sorted({*shares, 0}) != [0, *shares]):
            raise ValueError(
                f"sae.prefix_shares: {list(shares)} must rise from above 0 to 1; 1 is all latents"
            )
        return self

    def width(self, d_model: int) -> int:
        """d_sae for a host of this width.

        Raises:
            InputError: If it is less than k, or than the L0 that is aimed at.
        """
        d_sae = self.d_sae or self.expansion * d_model
        for name in ("k", "target_l0"):
            value = getattr(self, name)
            if value is not None and value > d_sae:
                raise InputError(
                    f"sae.{name}: {value} is more than d_sae = {d_sae} (sae.expansion = "
                    f"{self.expansion} times d_model = {d_model}); lower {name} or raise "
                    "sae.expansion"
                )
        return d_sae


class TrainingConfig(_Section):
    """How the SAEs are trained."""

    tokens: Count = Field(1_000_000, description="tokens that each SAE is trained on (paper: 1B)")
    batch_tokens: Count = Field(2048, description="tokens of one step, per SAE (paper: 131,072)")
    buffer_tokens: Count = Field(32_768, description="tokens that the shuffle buffer mixes")
    host_batch_contexts: Count = Field(32, description="contexts in one forward of the host model")
    baseline: bool = Field(
        True, description="also train one SAE per layer, on the same tokens, to compare with"
    )
    also_groups: Literal["all"] | tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (),
        description="numbers of groups whose SAEs are trained and judged beside those of the "
        "chosen one, or all: linkage's partitions are nested and have most of their SAEs in common",
    )
    twins: bool = Field(
        False,
        description="also train a second SAE per layer, from another seed: how alike two SAEs of "
        "one layer are, beside which `groupsae similarity` sets a group's",
    )
    init_from: str | None = Field(
        None,
        description="directory of a trained run of the same host model with SAEs of the same size "
        "and architecture: each SAE starts from that run's of the same layers, else from its "
        "smallest that has them all, with its means and scales. The same text goes on behind what "
        "that run read. Adam's moments, warm-up, decay and the count of silent tokens begin anew",
    )
    kernel: Literal["auto", "torch", "cpu", "triton", "reference"] = Field(
        "auto",
        description="how a step is computed, always with the same result: plain PyTorch, compiled "
        "for CPU or CUDA, dense autograd; auto: compiled on the CPU where a C++ compiler is there, "
        "else plain PyTorch",
    )
    learning_rate: float | None = Field(
        None, gt=0, description="by default 2e-4 / sqrt(d_sae / 2^14), constant (paper)"
    )
    threshold_learning_rate: float | None = Field(
        None,
        gt=0,
        description="jumprelu: of the logarithms of the thresholds; by default 4 / steps, "
        "so that they can move by a factor of 50 within the run",
    )
    warmup: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the steps over which the learning rate rises from 0; by default 0, "
        "with a sparsity penalty 0.05 (paper, v1)",
    )
    decay: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the steps, the last, over which it falls to 0; by default 0, with a "
        "sparsity penalty 0.2 (paper, v1)",
    )
    weight_average: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="save the running mean of the weights with this decay per step instead of the "
        "last weights",
    )
    adam_betas: tuple[float, float] | None = Field(
        None,
        description="Adam's decay rates; by default 0.9, 0.999, for jumprelu 0, 0.999",
    )
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's epsilon")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm, per SAE")
    auxk_weight: float | None = Field(
        None,
        ge=0,
        description="topk, batchtopk, matryoshka: weight of the auxiliary loss; 0: none; by "
        "default 1/32 (paper)",
    )
    sparsity_weight: float | None = Field(
        None,
        gt=0,
        description="relu, gated: weight of the L1 penalty; jumprelu: of the distance from "
        "target_l0, or of the L0. The reconstruction's loss is FVU",
    )
    sparsity_warmup: float | None = Field(
        None,
        ge=0,
        le=1,
        description="relu, gated, jumprelu: share of the steps over which sparsity_weight rises "
        "from 0; by default 0.05",
    )
    dead_after_tokens: Count = Field(
        250_000,
        description="a latent that was silent for so many tokens counts as dead (paper: 10M)",
    )
    max_dropped_batches: Annotated[int, Field(ge=0)] = Field(
        10,
        description="batches of an SAE that are left out because activations or gradients are NaN "
        "or infinite; with more of them training stops",
    )
    data_ranks: Count | None = Field(
        None,
        description="of several processes (torchrun), how many share each SAE, every one learning "
        "from its share of the batch (topk alone); by default as many as leave none without one",
    )
    latent_ranks: Count = Field(
        1,
        description="of several processes, over how many the latents of each SAE are divided, for "
        "SAEs that do not fit one device (topk and batchtopk, without what layers learn)",
    )
    layer_sampling: LayerSampling = Field(
        "uniform",
        description="which member layers a group sees of a token: one, drawn (paper); one, with "
        "equally many of each layer in every batch; all, which takes as many times the memory and "
        "computation for each SAE",
    )
    layer_weights: dict[int, Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="by layer, 1 where left out: among a group's layers the probability is in "
        "proportion (uniform sampling alone)",
    )
    max_norm_multiple: float | None = Field(
        None,
        gt=1,
        description="leave out tokens whose residual stream is longer, at any of the layers, than "
        "this multiple of the layer's mean norm (attention sinks)",
    )
    activation_cache: str | None = Field(
        None,
        description="folder of residual streams that `groupsae cache` wrote, to train from instead "
        "of running the host model; several runs may share it",
    )
    cache_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="what the activation cache is stored in"
    )
    cache_shuffle: bool = Field(
        True,
        description="read the activation cache's files in an order drawn from training.seed; "
        "false: in the order of the text, as without a cache",
    )
    log_every: Count = Field(20, description="steps between two lines of metrics")
    checkpoint_every: Count = Field(500, description="steps between two checkpoints")
    checkpoints_kept: Count = Field(2, description="checkpoints kept, the newest")
    checkpoint_in_background: bool = Field(
        True,
        description="copy what a checkpoint holds and write it while training goes on; false: wait "
        "for the disk, which takes no memory for the copy",
    )
    tracker: Literal["none", "wandb", "tensorboard"] = Field(
        "none", description="also send the metrics there"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="weights, layer sampling and shuffling")

    @model_validator(mode="after")
    def _sizes(self) -> TrainingConfig:
        if self.buffer_tokens < self.batch_tokens:
            raise ValueError(
                f"training.buffer_tokens: {self.buffer_tokens} is smaller than "
                f"training.batch_tokens = {self.batch_tokens}; raise the one or lower the other"
            )
        if self.tokens < self.batch_tokens:
            raise ValueError(
                f"training.tokens: {self.tokens} is less than one batch "
                f"(training.batch_tokens = {self.batch_tokens}); raise the one or lower the other"
            )
        if self.layer_weights and self.layer_sampling != "uniform":
            raise ValueError(
                f"training.layer_weights: {self.layer_weights} do not go with "
                f"training.layer_sampling = {self.layer_sampling}, which takes as many rows of "
                "each layer; leave them out or choose uniform"
            )
        if not all(0 <= beta < 1 for beta in self.adam_betas or ()):
            raise ValueError(f"training.adam_betas: {self.adam_betas} must lie in [0, 1)")
        return self

    def rate(self, d_sae: int) -> float:
        """The learning rate for a dictionary of this size (Gao et al. 2024, as in the paper)."""
        return self.learning_rate or 2e-4 / (d_sae / 2**14) ** 0.5

    def weights_of(self, layers: Iterable[int]) -> dict[int, float]:
        """The weight of each of the covered layers in the draw of member layers.

        Raises:
            InputError: If `layer_weights` names a layer that is not covered.
        """
        covered, given = sorted(layers), self.layer_weights or {}
        for layer, weight in given.items():
            if layer not in covered:
                raise InputError(
                    f"training.layer_weights: {weight} is given for layer {layer}, but the layers "
                    f"covered are {', '.join(map(str, covered))}; leave it out or cover the layer"
                )
        return {layer: given.get(layer, 1.0) for layer in covered}

    @property
    def steps(self) -> int:
        """Number of steps: whole batches only."""
        return self.tokens // self.batch_tokens


class EvaluationConfig(_Section):
    """How the SAEs are judged."""

    tokens: Count = Field(100_000, description="held-out tokens (paper: 1M)")
    batch_contexts: Count = Field(
        32,
        description="contexts in one forward of the host model; two times their logits are held",
    )


class CircuitsConfig(_Section):
    """How `groupsae circuits` finds and judges the latents that carry a task."""

    tasks: tuple[str, ...] = Field(
        ("ioi", "greater_than", "subject_verb"),
        description="built-in tasks, or NAME=FILE.jsonl with clean_prefix, patch_prefix, "
        "clean_answer and patch_answer in every line",
        min_length=1,
    )
    examples: Count = Field(
        1024,
        description="prompt pairs of each task; effects and means come from the first half, scores "
        "from the second",
    )
    methods: tuple[Literal["attribution", "integrated_gradients"], ...] = Field(
        ("attribution", "integrated_gradients"),
        description="how a latent's indirect effect is estimated",
        min_length=1,
    )
    steps: Count = Field(10, description="points of the integrated gradients (paper: 10)")
    points: Annotated[int, Field(ge=2)] = Field(
        16, description="sizes of a circuit between 4 latents per layer and the largest"
    )
    controls: bool = Field(
        True, description="also judge latents drawn at random, and those of an untrained SAE"
    )
    batch_tokens: Count = Field(4096, description="tokens of one forward; bounds the memory")
    seed: int = Field(0, ge=0, lt=2**32, description="order of examples, halves and controls")

    @model_validator(mode="after")
    def _one_result_for_each(self) -> CircuitsConfig:
        titles = [name.partition("=")[0] for name in self.tasks]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(
                    f"circuits.tasks: two are called {title!r}, and would share one result; give "
                    "them names of their own"
                )
        return self


class SimilarityConfig(_Section):
    """How `groupsae similarity` compares a group's SAE with its layers' own."""

    tokens: Count = Field(
        100_000, description="held-out tokens on which firing is compared (paper: 1M)"
    )


class InterpretationConfig(_Section):
    """What `groupsae interpret` looks at and shows."""

    tokens: Count = Field(
        100_000, description="held-out tokens whose latents are kept (paper: 1M); 8 bytes a firing"
    )
    compare: Literal["none", "baseline", "all"] = Field(
        "baseline",
        description="whose latents are kept beside those of the chosen groups: nobody's; those of "
        "one SAE per layer; also those of training.also_groups",
    )
    cards: Literal["all"] | Count = Field(
        1000,
        description="latents of each SAE that the browser shows: those that circuits and pairs "
        "name, then others that fire, drawn at random; or all that fire",
    )
    contexts: Count = Field(10, description="strongest contexts on a latent's card")
    ground_truth_tokens: Count = Field(
        20_000,
        description="held-out tokens on which latents are held against what is known of each word "
        "(tokens.source=bundled alone)",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of all samples")


class ExplanationConfig(_Section):
    """How `groupsae explain` lets a language model explain latents and scores that."""

    endpoint: str | None = Field(
        None,
        description="an OpenAI-compatible address, such as http://localhost:8000/v1 (vLLM, "
        "llama.cpp, Ollama, a hosted one)",
    )
    model: str | None = Field(None, description="the model's name there")
    api_key_variable: str = Field(
        "OPENAI_API_KEY",
        description="environment variable that holds the key, where the endpoint wants one; the "
        "key is never stored",
    )
    latents: Count = Field(96, description="latents of each SAE and layer (paper: 96)")
    contexts: Count = Field(20, description="strongest contexts that the model explains")
    examples: Count = Field(
        20, description="held-out contexts of each kind that detection and fuzzing judge"
    )
    examples_per_request: Count = Field(5, description="of them judged in one request")
    budget_tokens: Count = Field(
        1_000_000,
        description="tokens in prompts and answers; when they are used nothing more is asked, and "
        "a larger budget continues",
    )
    answer_tokens: Count = Field(500, description="longest answer")
    concurrency: Count = Field(8, description="requests under way at a time")
    requests_per_minute: Count | None = Field(None, description="at most; by default no limit")
    timeout: float = Field(60, gt=0, description="seconds to wait for an answer")
    retries: Annotated[int, Field(ge=0)] = Field(
        5, description="times that a request is repeated after a failure of the endpoint"
    )
    temperature: float = Field(0, ge=0, description="of the model's answers")
    seed: int = Field(0, ge=0, lt=2**32, description="of latents and examples")


class ReportConfig(_Section):
    """The page and the figures."""

    formats: tuple[Literal["pdf", "png", "svg"], ...] = Field(
        ("pdf", "png"), description="files written for each figure"
    )


class Config(_Section):
    """A whole run; every key has a default, and the defaults run."""

    preset: Literal["group-sae-v1", "group-sae-v2"] | None = Field(
        None,
        description="the paper's settings, beneath every key that is given and above the defaults. "
        + ". ".join(f"{name}: {described(name)}" for name in PRESETS),
    )
    host: HostConfig = HostConfig()
    tokens: TokensConfig = TokensConfig()
    grouping: GroupingConfig = GroupingConfig()
    sae: SAEConfig = SAEConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    circuits: CircuitsConfig = CircuitsConfig()
    similarity: SimilarityConfig = SimilarityConfig()
    interpretation: InterpretationConfig = InterpretationConfig()
    explanation: ExplanationConfig = ExplanationConfig()
    report: ReportConfig = ReportConfig()
    provenance: dict[str, Any] | None = Field(
        None, description="written by groupsae into a run's config.yaml; not an input"
    )

    @model_validator(mode="before")
    @classmethod
    def _target(cls, values: Any) -> Any:
        """Jumprelu aims at an L0 of 32, unless it is told another, or what an L0 costs."""
        sae, training = values.get("sae"), values.get("training")
        if not isinstance(sae, Mapping) or sae.get("architecture") != "jumprelu":
            return values
        if isinstance(training, Mapping) and training.get("sparsity_weight") is not None:
            return values
        given = {name: value for name, value in sae.items() if value is not None}
        return {**values, "sae": {"target_l0": 32, **given}}

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """Lays a preset beneath; comes before `_target`: the last such validator is the first."""
        return beneath(values)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        for name in ("k", "target_l0"):
            value, d_sae = getattr(self.sae, name), self.sae.d_sae
            if value is not None and d_sae is not None and value > d_sae:
                raise ValueError(
                    f"sae.{name}: {value} is more than sae.d_sae = {d_sae}; lower {name}"
                )
        options = ("auxk_weight", "sparsity_weight", "sparsity_warmup", "threshold_learning_rate")
        for name in options:
            value = getattr(self.training, name)
            check_option(f"training.{name}", value, self.sae.architecture)
        if (
            self.sae.architecture == "jumprelu"
            and self.sae.target_l0 is None
            and self.training.sparsity_weight is None
        ):
            raise ValueError(
                "sae.architecture: jumprelu needs sae.target_l0, the L0 to aim at, or "
                "training.sparsity_weight, what an L0 of one costs"
            )
        if isinstance(self.grouping.layers, tuple):  # elsewhere the host decides
            self.training.weights_of(self.grouping.layers)
        return self

    @classmethod
    def load(cls, path: Path | str | None = None, overrides: Iterable[str] = ()) -> Config:
        """Read a YAML file (the defaults where None) and apply `key.path=value` overrides.

        Raises:
            InputError: Naming the key, the value, and what is allowed or the nearest valid name.
        """
        values = {} if path is None else _read_yaml(Path(path))
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator:
                raise InputError(f"{override!r} is no override; write key.path=value")
            try:
                _put(values, key.strip(), yaml.safe_load(text))
            except yaml.YAMLError as error:
                raise InputError(f"{key}: {text!r} cannot be read as a value: {error}") from error
        return cls.parse(values)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Config:
        """Validate nested values; errors as in :meth:`load`."""
        unknown = list(_unknown_keys(cls, values))
        if unknown:
            raise InputError("\n".join(unknown))
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError("\n".join(_messages(error))) from error

    def dump(self) -> str:
        """The whole config as YAML that :meth:`load` reads back to the same config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)


def keys() -> Iterator[tuple[str, str, object, str]]:
    """Every key as (path, type, default, meaning), for the help."""
    for section_name, section in Config.model_fields.items():
        annotation = section.annotation
        if section_name == "preset":
            yield "preset", _type_name(annotation), section.default, section.description or ""
        if isinstance(annotation, type) and issubclass(annotation, _Section):
            for name, field in annotation.model_fields.items():
                yield (
                    f"{section_name}.{name}",
                    _type_name(field.annotation),
                    field.default,
                    field.description or "",
                )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"config file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"config file {path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(
            f"config file {path} holds a {type(values).__name__}, not sections of keys"
        )
    return values


def _put(values: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(f"{key}: {parent} is a value, not a section")
        values = inner
    values[last] = value


def _unknown_keys(
    section: type[BaseModel], values: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    for name, value in values.items():
        field = section.model_fields.get(str(name))
        if field is None:
            suggestion = _suggestion(prefix, str(name))
            yield f"{prefix}{name} = {value!r}: there is no such key{suggestion}"
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if isinstance(value, Mapping):
                yield from _unknown_keys(field.annotation, value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name} = {value!r}: this is a section; give its keys"


def _suggestion(prefix: str, name: str) -> str:
    paths = [path for path, *_ in keys()]
    names = {path.rpartition(".")[2]: path for path in paths}
    near = difflib.get_close_matches(f"{prefix}{name}", [*paths, *Config.model_fields], n=1)
    same_name = [names[name]] if name in names else []
    similar_name = [names[match] for match in difflib.get_close_matches(name, names, n=1)]
    for found in (*same_name, *near, *similar_name):
        return f"; did you mean {found}?"
    section = Config.model_fields.get(prefix.rstrip("."))
    known = getattr(section.annotation, "model_fields", None) if section else Config.model_fields
    return f"; known are {', '.join(known or ())}"


def _messages(error: ValidationError) -> Iterator[str]:
    """One line for each key that is wrong."""
    seen: dict[str, list[str]] = {}
    values: dict[str, object] = {}
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"][:2])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "value_error" and "." not in path:
            path = ""  # a rule across keys, which names them itself
        seen.setdefault(path, [])
        values[path] = problem["input"]
        if message not in seen[path]:
            seen[path].append(message)
    for path, messages in seen.items():
        if not path:
            yield from messages
        else:
            yield f"{path} = {values[path]!r}: {'; or '.join(messages)}"


def _type_name(annotation: object) -> str:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_type_name(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list"
    if annotation is type(None):
        return "null"
    return getattr(annotation, "__name__", str(annotation))
