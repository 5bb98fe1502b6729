"""The affine family: w = scale * (code - zero) per group of input channels, 1 to 8 bits."""
