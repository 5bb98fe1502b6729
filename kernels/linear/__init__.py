"""Linear layers: one folder per weight family, each with its layout, its reference and its faster back ends."""
