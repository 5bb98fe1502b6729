"""Shapes and bytes of pages and of recent pages."""

from dataclasses import dataclass, field
from functools import cached_property

from kernels.attention.quantized.layout import RECENT_TOKENS, ChunkLayout, LayoutError, RowLayout
from kvcache.calibration import Calibration, CalibrationError
from kvcache.codecs import check_made_for
from kvcache.policy import CALIBRATED, LayerPolicy, Policy, PolicyError
from kvcache.recent import ReadRule

RECENT_BYTES = 2  # of an element of the window and the sinks: float16


@dataclass(frozen=True)
class PageLayout:
    """One page: `page_size` tokens of every layer. Raises PolicyError when the policy cannot serve the model, and
    CalibrationError when the artifact was made for another policy."""

    policy: Policy
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int  # tokens
    calibration: Calibration | None = field(default=None, repr=False, compare=False)  # for the layers that ask for one

    def __post_init__(self) -> None:
        for layer in self.layers:
            if layer.is_quantized:
                self.chunk(layer)
        if self.calibration is not None:
            self._check(self.calibration)

    def _check(self, calibration: Calibration) -> None:
        header = calibration.header
        made_for = (header.num_layers, header.num_kv_heads, header.head_dim)
        sizes = (self.num_layers, self.num_kv_heads, self.head_dim)
        if made_for != sizes:
            names = "layers, kv heads and channels of a head"
            raise CalibrationError(f"the model has {sizes} {names}, and the calibration is for {made_for}")
        for index, layer in enumerate(self.layers):
            if layer.transform == CALIBRATED:
                check_made_for(layer, calibration, index)

    @cached_property
    def layers(self) -> tuple[LayerPolicy, ...]:
        return self.policy.layers(self.num_layers, self.head_dim, has_artifact=self.calibration is not None)

    @property
    def salt(self) -> str:
        """All that decides the bytes of a page besides the tokens and the model."""
        return str(self.policy) if self.calibration is None else f"{self.policy}:{self.calibration.digest}"

    def chunk(self, layer: LayerPolicy) -> ChunkLayout:
        """A page of one kv head of a quantized layer. Raises PolicyError when pages cannot have this size."""
        keys, values = (RowLayout(bits, self.head_dim, layer.group_size) for bits in (layer.key_bits, layer.value_bits))
        try:
            return ChunkLayout(keys, values, self.page_size)
        except LayoutError as error:
            raise PolicyError(f"KV cache policy {self.policy}: {error}") from error

    @property
    def layer_shape(self) -> tuple[int, int, int, int]:
        """One layer's part of a page of floating point: [keys | values, num_kv_heads, page_size, head_dim]."""
        return (2, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def elements_per_token(self) -> int:
        """Numbers that a token's keys and values consist of, in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def bytes_per_token(self) -> int:
        """Of a page, codes and parameters; without what rounds a page up to whole cache lines."""
        return self.num_kv_heads * sum(
            self.chunk(layer).token_bytes if layer.is_quantized else int(2 * self.head_dim * layer.key_bits // 8)
            for layer in self.layers
        )

    @property
    def bytes_per_page(self) -> int:
        return self.num_kv_heads * sum(
            self.chunk(layer).chunk_bytes
            if layer.is_quantized
            else int(2 * self.head_dim * layer.key_bits // 8) * self.page_size
            for layer in self.layers
        )

    @property
    def effective_bits(self) -> float:
        """Bits of a page for each key or value element, parameters included."""
        return 8 * self.bytes_per_token / self.elements_per_token

    @cached_property
    def read_rule(self) -> ReadRule | None:
        """Who is read in high precision beside its page; None when nothing is."""
        rule = ReadRule(self.policy.window, self.policy.num_sinks)
        return rule if rule.max_pages and any(layer.is_quantized for layer in self.layers) else None

    def rule_of(self, window: int | None, num_exact: int = 0) -> ReadRule:
        """Of a sequence that reads `window` tokens in high precision, None: as many as the policy says; and whose first
        `num_exact` tokens read everything so."""
        return ReadRule(self.policy.window if window is None else window, self.policy.num_sinks, num_exact)

    @property
    def bytes_per_recent_page(self) -> int:
        """RECENT_TOKENS tokens of the quantized layers in float16."""
        num_quantized = sum(layer.is_quantized for layer in self.layers)
        return RECENT_BYTES * 2 * num_quantized * self.num_kv_heads * self.head_dim * RECENT_TOKENS

    @property
    def recent_bytes_per_sequence(self) -> int:
        """What the window and the sinks of a sequence take at most."""
        return 0 if self.read_rule is None else self.read_rule.max_pages * self.bytes_per_recent_page

    @property
    def break_even_tokens(self) -> int:
        """The length below which a sequence takes no less memory than in a float16 cache, window and sinks counted."""
        saved = RECENT_BYTES * self.elements_per_token - self.bytes_per_token  # bytes a token
        return -(-self.recent_bytes_per_sequence // saved) if saved > 0 else 0
