"""From a checkpoint in 16 bits to Nibble's container:  nibble convert SRC DST --scheme ... | --recover.

convert.py    shard by shard, resumable, into a folder that appears when it is whole
schemes.py    "rtn:b4:g64:asym" -> an encoder
recover.py    the exact codes of weights that were rounded but saved as floats (distinct.py, forms.py)
rtn.py        round to nearest, 2 to 8 bits
blocks.py     MXINT8, MXFP4, NVFP4, NVINT4
ptqtp.py      two ternary planes
svd.py        low-rank pairs

An encoder takes one matrix and returns canonical weights (kernels/linear/weights.py). Adding a method is adding one
file and one line in schemes.py: container, command line, server and kernels know nothing of methods.
"""
