"""The registry of depth mechanisms, and the config section of each: `model.depth=NAME`, `model.NAME.*`."""

from __future__ import annotations

import dataclasses

from moda_jax.config_checks import check_types, require, require_positive

# Name -> "module:Class", a `moda_jax.model.depth.mechanism.DepthMechanism`. `model.depth` may also be such a path.
MECHANISMS = {
    "none": "moda_jax.model.depth.none:NoDepth",
    "moda": "moda_jax.model.depth.moda:MixtureOfDepths",
    "denseformer": "moda_jax.model.depth.denseformer:DenseFormer",
    "depth_attention": "moda_jax.model.depth.depth_attention:AttentionOverDepth",
    "attnres": "moda_jax.model.depth.attnres:AttentionResiduals",
    "attnres_delta": "moda_jax.model.depth.attnres_delta:DeltaAttentionResiduals",
    "attnres_block": "moda_jax.model.depth.attnres_block:BlockAttentionResiduals",
    "value_mixing": "moda_jax.model.depth.value_mixing:ValueMixing",
    "value_residual": "moda_jax.model.depth.value_residual:ValueResidual",
    "mudd": "moda_jax.model.depth.mudd:MultiwayDynamicDense",
    "hc": "moda_jax.model.depth.hc:HyperConnections",
    "mhc": "moda_jax.model.depth.mhc:ManifoldHyperConnections",
}
MODA_KEYS = ("own", "writer_norm", "reader_norm")
MODA_READS = ("all", "window", "stride", "hybrid", "top")
MODA_SOFTMAXES = ("joint", "separate")
MODA_ENTRY_DTYPES = (None, "float8_e4m3fn")
STREAMS = "at least 2 residual streams; one is model.depth='none'"


@dataclasses.dataclass(frozen=True)
class Section:
    """The base of the sections."""

    def check(self, name: str) -> None:
        """Checks the fields; `name` stands before theirs in messages.

        Raises:
            ValueError: naming the field, what came and what was expected.
        """
        check_types(name, self)


@dataclasses.dataclass(frozen=True)
class DenseFormerSection(Section):
    """DenseFormer (arXiv 2402.02622).

    Attributes:
        dilation: behind layer i, only outputs of layers i, i - dilation, i - 2 dilation, ... are summed.
        period: a sum stands behind every period-th layer.
    """

    dilation: int = 1
    period: int = 1

    def check(self, name: str) -> None:
        super().check(name)
        require_positive(name, self, "dilation", "period")


@dataclasses.dataclass(frozen=True)
class MoDASection(Section):
    """Mixture-of-depths attention (arXiv 2603.15619). What is not the default is a question that the paper leaves open.

    Attributes:
        ffn_kv: the FFN sub-layer also writes a depth entry, projected from its input (Table 3 row 4).
        attn_kv: the attention sub-layer writes a projection of its input instead of its own KV (row 5).
        key: how a depth key is stored. "own": with the writer's key norm and rotated, as its attention uses it;
            "writer_norm": normed, not rotated; "reader_norm": as projected, and every reader applies its own key norm.
        query_rotated: the query meets depth keys rotated; False: as it is before, for keys that are not rotated either.
        read: the slots that a layer reads. "all"; "window": the last `read_slots`; "hybrid": the first `read_first` and
            the last `read_slots - read_first`; "top": the `read_slots` with the highest learned scores; "stride": all,
            but only every `read_stride`-th layer writes any.
        read_slots: R, at most the model's slots; of "window", "hybrid" and "top".
        read_first: of "hybrid", below `read_slots`.
        read_stride: of "stride", below `model.num_layers`.
        null_slot: a learned logit for each head and layer, with the value 0: a head can decline.
        entry_bias: a learned number for each kind of entry, head and layer is added to depth logits.
        softmax: "joint": one softmax over sequence and depth; "separate": one each, (1 - g) sequence + g depth with a
            learned g for each head and layer.
        chunk: C, tokens: a token also reads the slots of the earlier tokens of its chunk of C tokens, which are counted
            from its document's first token. 1: its own alone. More with those options only for which one op computes
            the whole softmax (`one_softmax`).
        entry_dtype: how entries are kept. None: in the compute dtype; "float8_e4m3fn": rounded to 8 bits when they are
            written, their gradients straight through: half the bytes for every layer that reads them. Without a scale:
            one for each entry and head lowers the error of the depth part's output from 3.1 to 2.8 % (docs/mechanisms).
            With those options only with which one op computes the whole softmax.
    """

    ffn_kv: bool = True
    attn_kv: bool = False
    key: str = "own"
    query_rotated: bool = True
    read: str = "all"
    read_slots: int = 8
    read_first: int = 2
    read_stride: int = 4
    null_slot: bool = False
    entry_bias: bool = False
    softmax: str = "joint"
    chunk: int = 1
    entry_dtype: str | None = None

    def check(self, name: str) -> None:
        super().check(name)
        for field, choices in (
            ("key", MODA_KEYS), ("read", MODA_READS), ("softmax", MODA_SOFTMAXES), ("entry_dtype", MODA_ENTRY_DTYPES),
        ):  # fmt: skip
            require(getattr(self, field) in choices, f"{name}.{field}", getattr(self, field), f"one of {choices}")
        require_positive(name, self, "read_slots", "read_first", "read_stride", "chunk")
        require(
            self.query_rotated or self.key != "own", f"{name}.query_rotated", self.query_rotated,
            f"True with {name}.key='own', whose keys are rotated",
        )  # fmt: skip
        require(
            self.read != "hybrid" or self.read_first < self.read_slots, f"{name}.read_first", self.read_first,
            f"less than {name}.read_slots={self.read_slots}",
        )  # fmt: skip
        require(
            not self.entry_bias or self.read in ("all", "stride"), f"{name}.entry_bias", self.entry_bias,
            f"False with {name}.read={self.read!r}",
        )  # fmt: skip
        for field in ("null_slot", "entry_bias"):
            require(
                self.softmax == "joint" or not getattr(self, field), f"{name}.{field}", getattr(self, field),
                f"False with {name}.softmax={self.softmax!r}",
            )  # fmt: skip
        for field, fits in self._one_softmax.items():
            require(
                self.chunk == 1 or fits, f"{name}.chunk", self.chunk,
                f"1 with {name}.{field}={getattr(self, field)!r}, which reads the slots of the token itself alone",
            )  # fmt: skip
            require(
                self.entry_dtype is None or fits, f"{name}.entry_dtype", self.entry_dtype,
                f"None with {name}.{field}={getattr(self, field)!r}, which reads the slots outside of the one op",
            )  # fmt: skip

    @property
    def one_softmax(self) -> bool:
        """Whether the depth slots join the sequence's softmax as they are, in one op."""
        return all(self._one_softmax.values())

    @property
    def _one_softmax(self) -> dict[str, bool]:
        """The fields that decide about that, and whether what they say allows it."""
        return {
            "key": self.key != "reader_norm", "query_rotated": self.query_rotated,
            "read": self.read in ("all", "stride", "window"), "null_slot": not self.null_slot,
            "entry_bias": not self.entry_bias, "softmax": self.softmax == "joint",
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BlockAttentionResidualsSection(Section):
    """Attention Residuals, block form (arXiv 2603.15031).

    Attributes:
        block_size: sub-layers whose outputs are one source, two to a layer; 1: the full form.
    """

    block_size: int = 4

    def check(self, name: str) -> None:
        super().check(name)
        require_positive(name, self, "block_size")


@dataclasses.dataclass(frozen=True)
class DeltaAttentionResidualsSection(Section):
    """Attention Residuals, delta form (arXiv 2605.18855).

    Attributes:
        null_source: every sub-layer has a learned vector among its sources, 0 at the start.
    """

    null_source: bool = False


@dataclasses.dataclass(frozen=True)
class ValueMixingSection(Section):
    """Depth-attention value mixing (arXiv 2606.05014).

    Attributes:
        stride: layers 0, stride, 2 stride, ... are sources of later layers.
    """

    stride: int = 4

    def check(self, name: str) -> None:
        super().check(name)
        require_positive(name, self, "stride")


@dataclasses.dataclass(frozen=True)
class ValueResidualSection(Section):
    """Value residual (arXiv 2410.17897).

    Attributes:
        first, own: weights of the first layer's value and of the layer's own, from the second layer on.
        learned: they are where every layer's weights start.
    """

    first: float = 0.5
    own: float = 0.5
    learned: bool = False


@dataclasses.dataclass(frozen=True)
class HCSection(Section):
    """Hyper-connections (arXiv 2409.19606).

    Attributes:
        streams: n, residual streams, at least 2.
    """

    streams: int = 4

    def check(self, name: str) -> None:
        super().check(name)
        require(self.streams > 1, f"{name}.streams", self.streams, STREAMS)


@dataclasses.dataclass(frozen=True)
class MHCSection(Section):
    """Manifold-constrained hyper-connections (arXiv 2512.24880).

    Attributes:
        streams: n, residual streams, at least 2.
        sinkhorn_rounds: rounds of column and row normalisation that make the mixing matrix doubly stochastic.
    """

    streams: int = 4
    sinkhorn_rounds: int = 20

    def check(self, name: str) -> None:
        super().check(name)
        require(self.streams > 1, f"{name}.streams", self.streams, STREAMS)
        require_positive(name, self, "sinkhorn_rounds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthSections:
    """A section for every mechanism that has fields; only the one that `depth` names is read.

    Attributes:
        denseformer: of `depth="denseformer"`.
        moda: of `depth="moda"`.
        attnres_block: of `depth="attnres_block"`.
        attnres_delta: of `depth="attnres_delta"`.
        value_mixing: of `depth="value_mixing"`.
        value_residual: of `depth="value_residual"`.
        hc: of `depth="hc"`.
        mhc: of `depth="mhc"`.
    """

    denseformer: DenseFormerSection = dataclasses.field(default_factory=DenseFormerSection)
    moda: MoDASection = dataclasses.field(default_factory=MoDASection)
    attnres_block: BlockAttentionResidualsSection = dataclasses.field(default_factory=BlockAttentionResidualsSection)
    attnres_delta: DeltaAttentionResidualsSection = dataclasses.field(default_factory=DeltaAttentionResidualsSection)
    value_mixing: ValueMixingSection = dataclasses.field(default_factory=ValueMixingSection)
    value_residual: ValueResidualSection = dataclasses.field(default_factory=ValueResidualSection)
    hc: HCSection = dataclasses.field(default_factory=HCSection)
    mhc: MHCSection = dataclasses.field(default_factory=MHCSection)
