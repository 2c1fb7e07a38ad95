"""Typed configuration: one frozen dataclass per section, and the only place for defaults and cross-field checks.

`configs/base.py` turns these dataclasses into an `ml_collections.ConfigDict` so that every field can be overridden on
the command line; `Config.from_dict` turns the result back and validates it. Code below `train.py` sees dataclasses
only.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moda_jax.config_checks import check_types as _check_types
from moda_jax.config_checks import require as _require
from moda_jax.config_checks import require_not_negative as _require_not_negative
from moda_jax.config_checks import require_positive as _require_positive
from moda_jax.depth_config import MECHANISMS, DepthSections
from moda_jax.source_config import WeightedSource, weighted_sources
from moda_jax.task_config import TASKS
from moda_jax.vision_config import ImageDataSection, ImageModelSection

NORMS = ("pre", "post", "post_sum")
NORM_KINDS = ("rms", "layer")
FFNS = ("swiglu", "gelu")
REMATS = ("full", "attention", "ffn", "none")
LAYER_LOOPS = ("scan", "unroll")
DTYPES = ("float32", "bfloat16", "float16")
IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu", "triton")
FAULT_POLICIES = ("fail", "skip")
TRACKERS = ("tensorboard", "wandb")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant", "wsd")
DECAY_SHAPES = ("linear", "cosine", "sqrt")
_CLASS_PATH = re.compile(r"[\w.]+:\w+")  # "package.module:Class"
# A URL, or one of remote storage after `Path` took a slash from it; a data source's kind may stand before.
_REMOTE = re.compile(
    r"(tfds:|tokens:)?([A-Za-z][A-Za-z0-9+.-]*://|(gs|gcs|s3[an]?|hdfs|viewfs|abfss?|wasbs?|az|adl|oss|https?|hf):/)"
)


def check_local(name: str, place: str) -> None:
    """Checks that a place is one of this machine's file system: nothing here reads or writes remote storage.

    Args:
        name: of the field or flag, for the message.
        place: as the user wrote it; a prefix that names the kind of a data source ("tfds:") may stand before it.

    Raises:
        ValueError: it is a URL.
    """
    if _REMOTE.match(str(place)):
        raise ValueError(
            f"{name}={str(place)!r}: is remote, and only local paths are read and written; mount it as a folder (as "
            "gcsfuse, s3fs or an NFS client do), or copy it, and name that folder"
        )


def check_text(text: str, field: str) -> None:
    """Checks that a string from a command line is text.

    Raises:
        ValueError: it came as bytes that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # Python keeps such bytes as halves of surrogate pairs
        raise ValueError(
            f"{field}={text[:40]!r}: expected UTF-8; character {error.start} is none. A shell or file in another "
            "encoding has to be converted"
        ) from error


def _with_aliases(**aliases: tuple[str, str]) -> Callable[[type], type]:
    """A class decorator: keyword arguments and properties that are another name of a section's field.

    Args:
        **aliases: other name -> (section, field). `dataclasses.replace` takes the other name too.
    """

    def decorate(cls: type) -> type:
        plain = cls.__init__
        defaults = {field.name: field.default_factory for field in dataclasses.fields(cls)}

        @functools.wraps(plain)
        def init(self: Any, *args: Any, **values: Any) -> None:
            for alias, (section, field) in aliases.items():
                value = values.pop(alias, None)
                if value is not None:
                    _require(type(value) is bool, f"model.{alias}", value, "a value of type bool")
                    values[section] = dataclasses.replace(
                        _as_section(f"model.{section}", defaults[section], values.get(section, {})), **{field: value}
                    )
            plain(self, *args, **values)

        cls.__init__ = init
        cls.ALIASES = tuple(aliases)
        for alias, (section, field) in aliases.items():
            setattr(cls, alias, property(lambda self, s=section, f=field: getattr(getattr(self, s), f)))
        return cls

    return decorate


@_with_aliases(depth_ffn_kv=("moda", "ffn_kv"), depth_attn_kv=("moda", "attn_kv"))
@dataclasses.dataclass(frozen=True)
class TransformerConfig(DepthSections):
    """The model: all that `Transformer` needs, and nothing else. `depth="none", norm="post", qk_norm=True` is OLMo 2.

    Attributes:
        vocab_size: V, rows of the embedding.
        num_layers: L, attention + FFN pairs.
        width: D, channels of the residual stream.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; divides N, G = N / K query heads share one.
        head_dim: H, channels of a head.
        ffn_width: hidden channels of the SwiGLU feed-forward network.
        norm: "post": x + norm(f(x)), OLMo 2's reordered norm; "pre": x + f(norm(x)); "post_sum": norm(x + f(x)), which
            not every depth mechanism knows.
        depth: a name of `MECHANISMS`, whose section beside these fields has the mechanism's own, or
            "package.module:Class" for a mechanism of one's own.
        rope_theta: base of the rotary embedding's wavelengths; None: no rotary embedding.
        norm_epsilon: added to the mean square (or the variance) in every norm.
        tie_embeddings: the output projection is the embedding's transpose.
        qk_norm: RMSNorm over the full width of the query and the key projection.
        qk_norm_per_head: that norm is over each head's channels instead, with one scale for all heads.
        max_sequence_length: longest sequence that the model accepts.
        initializer_range: standard deviation of every weight matrix at the start.
        attention_implementation: name for `pallas_kernels`; None picks the best one for the device. With "xla" or
            "reference" the norms have no kernel either.
        dtype: compute dtype, "float32", "bfloat16" or "float16" (dtype objects become their names); None: bfloat16 on a
            GPU, float32 elsewhere.
        remat: what the layer loop stores for the backward pass, see `moda_jax.depth_scan`.
        layer_loop: "scan" compiles one layer; "unroll" each by itself, which is faster on a GPU and slower to compile.
        depth_gradient_dtype: dtype in which the depth stream's gradient accumulates; None: the compute dtype.
        depth_gradient_group: how many layers add their gradients of older slots together, see `moda_jax.depth_scan`;
            None: as many as the device's kernels ask for: four on Hopper if their query heads fit into a tile, else 1,
            which takes the least memory.
        causal: a token sees the sequence up to itself; False: all of it, as in a model of images.
        norm_kind: "rms": RMSNorm; "layer": LayerNorm with a bias, of the sub-layers' norms and the final one.
        ffn: "swiglu", or "gelu": two projections with a GELU between them.
        biases: attention's projections and those of the "gelu" network add a bias. Depth projections have none.
        stochastic_depth: of a model of images in training: the share of rows in which the last layer's attention, and
            its FFN, are left out; from layer to layer it rises evenly from 0.
        image: an image as tokens, and the head, of a model of images.

    `depth_ffn_kv` and `depth_attn_kv` are other names of `moda.ffn_kv` and `moda.attn_kv`, for the constructor and for
    config files; they win over the section.
    """

    vocab_size: int = 50304
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    num_kv_heads: int = 6
    head_dim: int = 64
    ffn_width: int = 3072
    norm: str = "post"
    depth: str = "moda"
    rope_theta: float | None = 500000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = True
    qk_norm_per_head: bool = False
    max_sequence_length: int = 4096
    initializer_range: float = 0.02
    attention_implementation: str | None = None
    dtype: str | None = None
    remat: str = "attention"
    layer_loop: str = "scan"
    depth_gradient_dtype: str | None = None
    depth_gradient_group: int | None = None
    causal: bool = True
    norm_kind: str = "rms"
    ffn: str = "swiglu"
    biases: bool = False
    stochastic_depth: float = 0.0
    image: ImageModelSection = dataclasses.field(default_factory=ImageModelSection)

    def __post_init__(self) -> None:
        for field in ("dtype", "depth_gradient_dtype"):
            object.__setattr__(self, field, _dtype_name(getattr(self, field)))
        _check_types("model", self)
        for section in dataclasses.fields(DepthSections):
            getattr(self, section.name).check(f"model.{section.name}")
        self.image.check("model.image")
        _require(
            0 <= self.stochastic_depth < 1, "model.stochastic_depth", self.stochastic_depth, "a share in [0, 1)"
        )  # fmt: skip
        _require_positive(
            "model", self, "vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "ffn_width",
            "norm_epsilon", "max_sequence_length", "initializer_range",
        )  # fmt: skip
        _require(
            self.num_heads % self.num_kv_heads == 0, "model.num_heads", self.num_heads,
            f"a multiple of model.num_kv_heads={self.num_kv_heads}",
        )  # fmt: skip
        _require(
            self.qk_norm or not self.qk_norm_per_head, "model.qk_norm_per_head", self.qk_norm_per_head,
            "False with model.qk_norm=False",
        )  # fmt: skip
        if self.depth_gradient_group is not None:
            _require_positive("model", self, "depth_gradient_group")
        if self.rope_theta is not None:
            _require_positive("model", self, "rope_theta")
            _require(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "an even number (rotary pairs)")
        _require(
            self.depth in MECHANISMS or _CLASS_PATH.fullmatch(self.depth) is not None, "model.depth", self.depth,
            f'one of {tuple(MECHANISMS)}, or "package.module:Class"',
        )  # fmt: skip
        for field, choices in (
            ("norm", NORMS), ("remat", REMATS), ("layer_loop", LAYER_LOOPS),
            ("attention_implementation", (None, *IMPLEMENTATIONS)), ("dtype", (None, *DTYPES)),
            ("depth_gradient_dtype", (None, *DTYPES)), ("norm_kind", NORM_KINDS), ("ffn", FFNS),
        ):  # fmt: skip
            _require(getattr(self, field) in choices, f"model.{field}", getattr(self, field), f"one of {choices}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """A validated config from a mapping of its fields; errors as `Config.from_dict`."""
        return _section_from_dict("model", cls, values)

    @property
    def depth_entries_per_layer(self) -> int:
        """Slots that one writing layer of MoDA fills: 1 for the attention entry, 2 with the FFN entry; else 0."""
        return 1 + int(self.moda.ffn_kv) if self.depth == "moda" else 0

    @property
    def depth_slots(self) -> int:
        """S: slots of MoDA's whole depth stream, of which the last layer writes none; 0 for other mechanisms."""
        stride = self.moda.read_stride if self.moda.read == "stride" else 1
        return len(range(0, self.num_layers - 1, stride)) * self.depth_entries_per_layer

    @property
    def has_depth_probes(self) -> bool:
        """Whether a layer's softmax is over its token's slots of all layers before it, so that its mass on them is
        known."""
        own = self.moda.read == "all" and self.moda.chunk == 1
        return self.depth_slots > 0 and self.moda.one_softmax and own


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes rows of tokens.

    Attributes:
        source: "python_stdlib" (built in); a directory of .txt, .md, .jsonl, .json (lines) and .parquet files, .jsonl
            and .json also as .gz; one such file; or "tfds:NAME[:VERSION]" or "tfds:DIRECTORY", a TFDS dataset that is
            prepared as array_record; or "tokens:DIRECTORY", splits `train` and `validation` as the cache holds
            them, tokenised elsewhere. A mixture: "0.7*SOURCE + 0.3*SOURCE", whose weights are shares of the rows.
        feature: the text or token feature of a TFDS dataset, the text field of a JSON line, the column of a .parquet.
        train_split, validation_split: names of a TFDS dataset's splits; other sources are split by a hash of the
            document's name (its path; where a file holds several also the number of the line, row or part). A source of
            one .txt or .md file is split by position.
        validation_fraction: share of the documents that the hash of their names sends to validation; of one text file
            the share at its end.
        document_separator: parts a .txt or .md file into documents; None: a file is one. Of a mixture's sources those
            of files are parted.
        tokenizer: "bytes", or the path of a Hugging Face tokenizer.json.
        end_of_text: the tokenizer.json's token that ends a document; None: the first that is known of
            "<|endoftext|>", "</s>", "<eos>".
        sequence_length: T, tokens of a row.
        shuffle: rows come in a new seeded order every epoch.
        prefetch_batches: batches read ahead.
        cache_dir: prepared datasets and tokens; None: the user's cache directory.
        on_damage: what becomes of a file or record that cannot be read whole, a .jsonl line without text, and a
            document above `max_document_bytes`: "fail" refuses the source at start, "skip" leaves it out, counted and
            named.
        on_invalid_utf8: the same for a document that is not UTF-8 under a tokenizer.json. Under "bytes" every document
            is valid and passes unchanged.
        max_document_bytes: longest document, longest line of a .jsonl file, and largest file of an image.
        images: of the vision task, whose `source` is "digits" (those that scikit-learn ships); a directory of class
            folders of .jpg, .jpeg and .png files, or of one such directory for each split, named as `train_split` and
            `validation_split`; or "tfds:..." as above. Fields that speak of text are not read then.
    """

    source: str = "python_stdlib"
    feature: str = "text"
    train_split: str = "train"
    validation_split: str = "validation"
    validation_fraction: float = 0.05
    document_separator: str | None = None
    tokenizer: str = "bytes"
    end_of_text: str | None = None
    sequence_length: int = 512
    shuffle: bool = True
    prefetch_batches: int = 4
    cache_dir: str | None = None
    on_damage: str = "fail"
    on_invalid_utf8: str = "skip"
    max_document_bytes: int = 2**26
    images: ImageDataSection = dataclasses.field(default_factory=ImageDataSection)

    def __post_init__(self) -> None:
        _check_types("data", self)
        self.images.check("data.images")
        _require_positive("data", self, "sequence_length", "prefetch_batches", "max_document_bytes")
        for field in ("on_damage", "on_invalid_utf8"):
            _require(
                getattr(self, field) in FAULT_POLICIES, f"data.{field}", getattr(self, field),
                f"one of {FAULT_POLICIES}",
            )  # fmt: skip
        _require(
            self.max_document_bytes <= 2**30, "data.max_document_bytes", self.max_document_bytes,
            "at most 2**30 (a record holds less than 2 GiB)",
        )  # fmt: skip
        _require(bool(self.source), "data.source", self.source, "a built-in name, a directory or tfds:...")
        for field in ("end_of_text", "document_separator"):
            check_text(getattr(self, field) or "", f"data.{field}")
        separator = self.document_separator
        _require(separator != "", "data.document_separator", separator, "text that stands between documents, or None")
        _require(
            separator is None or not all(_has_documents(source) for _, source in self.sources),
            "data.document_separator", separator, f"None with data.source={self.source!r}, which has documents",
        )  # fmt: skip
        _require(bool(self.tokenizer), "data.tokenizer", self.tokenizer, '"bytes" or the path of a tokenizer.json')
        for _, source in self.sources:
            check_local("data.source", source)
        for field in ("tokenizer", "cache_dir"):
            check_local(f"data.{field}", getattr(self, field) or "")
        _require(
            0 < self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction, "a share in (0, 1)"
        )

    @property
    def sources(self) -> tuple[WeightedSource, ...]:
        """What `source` names: one source, or those of a mixture with their shares."""
        return weighted_sources(self.source)

    def of_one(self, source: str) -> DataConfig:
        """The section as one source of a mixture has it."""
        separator = None if _has_documents(source) else self.document_separator
        return dataclasses.replace(self, source=source, document_separator=separator)


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """What `optimizer.name="muon"` does with matrices.

    Attributes:
        learning_rate: the peak of the matrices' learning rate, by the same schedule; None: `optimizer.learning_rate`.
        weight_decay: decoupled, of the matrices; None: `optimizer.weight_decay`.
        momentum: decay of the running mean of the gradients; Nesterov's form of it is what becomes orthogonal.
        newton_schulz_steps: iterations that make it so.
        update_rms: root mean square of a matrix's update before the learning rate; 0.2 is about that of AdamW's, whose
            learning rate and weight decay then suit; None: the orthogonal matrix times
            sqrt(max(1, outputs / inputs)), for a learning rate of about 0.02.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    update_rms: float | None = 0.2

    def __post_init__(self) -> None:
        _check_types("optimizer.muon", self)
        _require_positive("optimizer.muon", self, "newton_schulz_steps")
        for field in ("learning_rate", "update_rms"):
            if getattr(self, field) is not None:
                _require_positive("optimizer.muon", self, field)
        if self.weight_decay is not None:
            _require_not_negative("optimizer.muon", self, "weight_decay")
        _require(0 <= self.momentum < 1, "optimizer.muon.momentum", self.momentum, "a number in [0, 1)")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate; by default AdamW with warm-up and cosine decay, OLMo 2's recipe.

    Attributes:
        name: "adamw"; or "muon", by which the matrices between two layers' activations are updated as the section
            `muon` says, and all else by AdamW: embedding, output projection, norms, and what a depth mechanism has
            beside such matrices.
        learning_rate: the peak, reached after `warmup_steps`.
        schedule: what follows the warm-up. "cosine": half a cosine down to the last step; "constant": the peak; "wsd"
            (warm-up, stable, decay): the peak, and a decay over the last `decay_fraction` of the run.
        final_learning_rate_fraction: "cosine" and "wsd" end at this share of the peak.
        decay_fraction: of "wsd": share of `train.num_steps` over which the learning rate falls.
        decay_shape: of "wsd": how it falls; "linear", "cosine" (half of one) or "sqrt" (1 minus the square root of the
            share of the decay that is done).
        warmup_steps: linear from 0.
        beta1, beta2, epsilon: Adam's.
        weight_decay: decoupled, on matrices only: not on norm scales, not on embeddings.
        gradient_clip_norm: global norm that a gradient is scaled down to.
        ema_decay: of a moving average of the parameters, which is evaluated beside them (`moda_jax.training.averaged`);
            0: none is kept.
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    final_learning_rate_fraction: float = 0.1
    decay_fraction: float = 0.2
    decay_shape: str = "linear"
    warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip_norm: float = 1.0
    muon: MuonConfig = dataclasses.field(default_factory=MuonConfig)
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_types("optimizer", self)
        _require_positive("optimizer", self, "learning_rate", "epsilon", "gradient_clip_norm")
        _require_not_negative("optimizer", self, "warmup_steps", "weight_decay")
        for field in ("beta1", "beta2", "ema_decay"):
            _require(0 <= getattr(self, field) < 1, f"optimizer.{field}", getattr(self, field), "a number in [0, 1)")
        fraction = self.final_learning_rate_fraction
        _require(0 <= fraction <= 1, "optimizer.final_learning_rate_fraction", fraction, "a share in [0, 1]")
        _require(0 < self.decay_fraction <= 1, "optimizer.decay_fraction", self.decay_fraction, "a share in (0, 1]")
        for field, choices in (("name", OPTIMIZERS), ("schedule", SCHEDULES), ("decay_shape", DECAY_SHAPES)):
            _require(getattr(self, field) in choices, f"optimizer.{field}", getattr(self, field), f"one of {choices}")

    def decay_steps(self, num_steps: int) -> int:
        """Updates over which the learning rate of a run of `num_steps` falls; 0: it does not."""
        if self.schedule == "constant":
            return 0
        if self.schedule == "cosine":
            return max(num_steps - self.warmup_steps, 1)
        return max(round(self.decay_fraction * num_steps), 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
        task: what is learned: a name of `moda_jax.task_config.TASKS`, or "package.module:Class".
        init_from: a run's directory (its newest good checkpoint), an export, or for images a DeiT's safetensors, whose
            parameters a new run starts with; None: fresh ones. A run that has a checkpoint itself goes on from that.
        num_steps: optimizer steps of the whole run.
        batch_size: sequences per optimizer step, over all devices and micro-batches.
        accumulation_steps: micro-batches per step; divides `batch_size`.
        seed: of parameters and of the data order.
        z_loss: weight of log(Z)^2 in the objective; not in the reported loss.
        log_interval_steps: a metrics line every so many steps.
        trackers: what shows the metrics beside metrics.jsonl: "tensorboard", "wandb" (an extra), both with a comma
            between, or "none".
        sample_prompt: text that the run continues when it ends; "" for no sample.
        sample_tokens: tokens of that sample.
        max_skipped_in_a_row: a step with a non-finite loss or gradient leaves parameters and optimizer as they are; so
            many of them in a row are passed over, one more stops the run.
        loss_spike_deviations: a loss so many (robust) standard deviations above the median of the last steps counts as
            a spike in the metrics; 0: none does.
        watchdog_seconds: when no step was done for so long, every thread's stack goes to stderr; 0: never.
        peer_timeout_seconds: of a run of many processes: so long after one was lost (it died, or gave no sign of life)
            the others have ended.
        deterministic: on a GPU, take only operations of XLA that give the same bits every time (the kernels always do).
            False lets XLA choose among all of them.
    """

    task: str = "language"
    init_from: str | None = None
    num_steps: int = 10000
    batch_size: int = 32
    accumulation_steps: int = 1
    seed: int = 0
    z_loss: float = 1e-5
    log_interval_steps: int = 10
    trackers: str = "tensorboard"
    sample_prompt: str = ""
    sample_tokens: int = 200
    max_skipped_in_a_row: int = 10
    loss_spike_deviations: float = 6.0
    watchdog_seconds: float = 600.0
    peer_timeout_seconds: float = 30.0
    deterministic: bool = True

    def __post_init__(self) -> None:
        _check_types("train", self)
        _require_positive("train", self, "num_steps", "batch_size", "accumulation_steps", "log_interval_steps")
        _require(
            self.peer_timeout_seconds >= 10, "train.peer_timeout_seconds", self.peer_timeout_seconds, "at least 10"
        )
        _require_not_negative(
            "train", self, "seed", "z_loss", "sample_tokens", "max_skipped_in_a_row", "loss_spike_deviations",
            "watchdog_seconds",
        )  # fmt: skip
        _require(
            self.task in TASKS or _CLASS_PATH.fullmatch(self.task) is not None, "train.task", self.task,
            f'one of {tuple(TASKS)}, or "package.module:Class"',
        )  # fmt: skip
        names = self.tracker_names
        _require(
            set(names) <= set(TRACKERS) and len(set(names)) == len(names), "train.trackers", self.trackers,
            f'some of {TRACKERS} with a comma between, each once, or "none"',
        )  # fmt: skip
        check_text(self.sample_prompt, "train.sample_prompt")
        _require(self.init_from != "", "train.init_from", self.init_from, "a directory, or None")
        check_local("train.init_from", self.init_from or "")
        _require(
            self.batch_size % self.accumulation_steps == 0, "train.accumulation_steps", self.accumulation_steps,
            f"a divisor of train.batch_size={self.batch_size}",
        )  # fmt: skip

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """What `trackers` names."""
        return () if self.trackers == "none" else tuple(name.strip() for name in self.trackers.split(","))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the validation split while training.

    Attributes:
        interval_steps: evaluate every so many steps, and at the end; 0: never.
        num_batches: batches of `train.batch_size` rows per evaluation, spread evenly over the split; 0: all of it.
        depth_mass: for a model with a depth stream, an evaluation also logs the attention's mass on the depth slots
            over one micro-batch (mean over tokens, heads and the layers that see a slot); on one device only.
    """

    interval_steps: int = 500
    num_batches: int = 16
    depth_mass: bool = True

    def __post_init__(self) -> None:
        _check_types("eval", self)
        _require_not_negative("eval", self, "interval_steps", "num_batches")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints.

    Attributes:
        interval_steps: save every so many steps, and at the end; 0: at the end only.
        keep_last: newest checkpoints kept.
        keep_every_steps: steps divisible by this are kept for ever; 0: none.
        max_failed_saves: a save that fails (disk full, read-only) is tried again at the next interval; so many in a row
            end the run.
        retry_pause_seconds: pause before the run's last save is tried again.
    """

    interval_steps: int = 500
    keep_last: int = 2
    keep_every_steps: int = 0
    max_failed_saves: int = 3
    retry_pause_seconds: float = 10.0

    def __post_init__(self) -> None:
        _check_types("checkpoint", self)
        _require_positive("checkpoint", self, "keep_last", "max_failed_saves")
        _require_not_negative("checkpoint", self, "interval_steps", "keep_every_steps", "retry_pause_seconds")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; at most one of them may be -1, "what the others leave of the devices".

    Attributes:
        data: the batch is split; parameters are whole on every device.
        fsdp: the batch is split; parameters and optimizer state too, gathered layer by layer.
        tensor: heads, KV heads, FFN channels and the vocabulary are split.
        context: the tokens of a sequence are split.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        _check_types("mesh", self)
        fields = ("data", "fsdp", "tensor", "context")
        for field in fields:
            size = getattr(self, field)
            _require(size > 0 or size == -1, f"mesh.{field}", size, "a positive number, or -1 for the rest")
        rest = [field for field in fields if getattr(self, field) == -1]
        _require(len(rest) < 2, "mesh." + " and mesh.".join(rest), -1, "-1 for one axis at most")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Every check that needs more than one section stands here."""

    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        _require(
            self.data.sequence_length <= self.model.max_sequence_length, "data.sequence_length",
            self.data.sequence_length, f"at most model.max_sequence_length={self.model.max_sequence_length}",
        )  # fmt: skip
        _require(
            self.optimizer.warmup_steps <= self.train.num_steps, "optimizer.warmup_steps", self.optimizer.warmup_steps,
            f"at most train.num_steps={self.train.num_steps}",
        )  # fmt: skip
        chunk = self.model.moda.chunk if self.model.depth == "moda" else 1
        _require(
            chunk == 1 or self.mesh.context == 1, "mesh.context", self.mesh.context,
            f"1 with model.moda.chunk={chunk}, as the tokens of a chunk would lie on different devices",
        )  # fmt: skip
        optimizer, num_steps = self.optimizer, self.train.num_steps
        stable = num_steps - optimizer.warmup_steps
        _require(
            optimizer.schedule != "wsd" or optimizer.decay_steps(num_steps) <= stable, "optimizer.decay_fraction",
            optimizer.decay_fraction, f"a share of train.num_steps={num_steps} that is no more than the {stable} steps "
            f"after optimizer.warmup_steps={optimizer.warmup_steps}",
        )  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """A validated Config from nested mappings (a ConfigDict, or a run's config.json).

        Raises:
            ValueError: an unknown section or key, a value of the wrong type, or a failed check; the field is named.
        """
        sections = {field.name: field.default_factory for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(sections))
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown config section; known: {', '.join(sections)}")
        return cls(**{name: _section_from_dict(name, sections[name], values[name]) for name in values})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain dicts, ready for JSON; `from_dict` reads them back."""
        return dataclasses.asdict(self)


def _has_documents(source: str) -> bool:
    """Whether a data source is made of documents, not of files that may be parted into some."""
    return source == "python_stdlib" or source.startswith("tfds:")


def _section_from_dict(name: str, section: type, values: Mapping[str, Any]) -> Any:
    """One section's dataclass from a mapping; an unknown key is an error that names the nearest known ones."""
    _require(isinstance(values, Mapping), name, values, "a mapping of the section's keys to values")
    fields = {field.name: field for field in dataclasses.fields(section)}
    for key in values:
        if key not in fields and key not in getattr(section, "ALIASES", ()):
            known = sorted(fields, key=lambda name: dataclasses.is_dataclass(fields[name].default_factory))
            raise ValueError(f"{name}.{key}: unknown config key; known in {name}: {', '.join(known)}")
    return section(**{
        key: _as_section(f"{name}.{key}", fields[key].default_factory, value)
        if key in fields and dataclasses.is_dataclass(fields[key].default_factory) else value
        for key, value in values.items()
    })  # fmt: skip


def _as_section(name: str, section: type, values: Any) -> Any:
    """A section inside of a section, from itself or from a mapping."""
    return values if isinstance(values, section) else _section_from_dict(name, section, values)


def _dtype_name(dtype: Any) -> Any:
    """The name of a dtype object such as jnp.bfloat16; anything else as it came, for the checks to judge."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    try:
        return np.dtype(dtype).name
    except TypeError:
        return dtype
