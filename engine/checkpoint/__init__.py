"""One file per on-disk format: reads tensors, returns canonical weights.

hub.py       name -> folder
source.py    folder -> tensors by name, checked and counted
format.py    config.json -> the reader of its format, one file each; refused.py: formats that are known but not read
gptq_layout.py, awq_layout.py, blocks.py
             tensors that several formats lay out alike
gguf_choice.py, gguf_file.py, gguf_source.py, gguf_blocks.py, gguf.py
             one file with everything in place of a folder: which one, its header, its tensors, their blocks;
             gguf_tokenizer.py: its tokenizer
hadamards.py, quip_codes.py
             the transforms and the codebooks of quip.py
linear.py    what the readers share: shapes, dense layers, biases, which settings are honoured
terms.py     the terms and transforms of Nibble's own container (nibble.py), read and written
codes.py     words of packed codes -> canonical codes, zero points, input order
errors.py    why a checkpoint is refused
"""
