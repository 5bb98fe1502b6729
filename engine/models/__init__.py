"""One file per architecture, on shared layers."""
