"""LongMem: language models with long-term memory (arXiv 2306.07174), for any Hugging Face causal LM."""

from longmem.configuration import LongMemConfig
from longmem.errors import StaleMemoryError
from longmem.memory import MemoryBank
from longmem.modeling import LongMemForCausalLM
from longmem.streaming import MemoryStream

__version__ = "0.1.0"
__all__ = ["LongMemConfig", "LongMemForCausalLM", "MemoryBank", "MemoryStream", "StaleMemoryError"]
