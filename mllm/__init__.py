"""The language side: LLaVA-style models on top of a vision encoder, their training, evaluation and chat."""

import logging

# On every import this logger advises installing a package that would fetch compiled kernels from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

DEFAULT_LLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The language model that is used by default."""
