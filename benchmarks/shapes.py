"""Sizes of public models. Nothing is imported here: peers' interpreters, which have no torch, read this too."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-architecture model; `qkv_bias` makes it Qwen 2."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of one layer's matrices, by role."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of all layers, without embedding and head."""
        return self.num_layers * sum(rows * columns for rows, columns in self.linears().values())

    def with_layers(self, num_layers: int | None) -> "Shape":
        """The same model cut to its first layers; None keeps all."""
        return self if num_layers is None else replace(self, num_layers=num_layers)


SMALLEST = Shape(128, 128, 1, 2, 1, 64, 128, True)
SHAPES = {
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 64, 128_256, True),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128, 128_256, False),
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 64, 151_936, True, qkv_bias=True),
}
BIASED = ("q", "k", "v")  # the roles that carry a bias when qkv_bias is set
