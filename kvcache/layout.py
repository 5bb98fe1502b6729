"""Shapes and bytes of a page."""

from dataclasses import dataclass

from kvcache.policy import Policy


@dataclass(frozen=True)
class PageLayout:
    """One page: `page_size` tokens of every layer."""

    policy: Policy
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int  # tokens

    @property
    def layer_shape(self) -> tuple[int, int, int, int]:
        """One layer's part of a page: [keys | values, num_kv_heads, page_size, head_dim]."""
        return (2, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.policy.bytes_per_element

    @property
    def bytes_per_page(self) -> int:
        return self.bytes_per_token * self.page_size
