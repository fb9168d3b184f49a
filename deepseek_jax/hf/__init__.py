"""Hugging Face checkpoints in and out: `load`, `save`, `Checkpoint`.

config.py   config.json <-> ModelConfig
names.py    which tensors make up which leaf of the parameter tree
files.py    checkpoint folders: config.json, index, checked scan
tensors.py  one safetensors file: checked header, streaming writer
packed.py   experts in one tensor per layer, as transformers 5 can save them
source.py   where parameters come from, tensor by tensor  fp8.py     DeepSeek's FP8 blocks
arrays.py   parameters on devices, a layer at a time
read.py     checkpoint -> parameters        write.py    parameters -> checkpoint
orbax.py    parameters in orbax by pieces   convert.py  streamed conversion between the two
job.py      a conversion that was cut off goes on       original.py what orbax remembers of a folder
"""

from deepseek_jax.hf import convert
from deepseek_jax.hf.orbax import load_tree
from deepseek_jax.hf.read import Checkpoint, load
from deepseek_jax.hf.write import FORMATS, save

__all__ = ["FORMATS", "Checkpoint", "convert", "load", "load_tree", "save"]
