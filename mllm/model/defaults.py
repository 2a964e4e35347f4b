"""What is used where nothing is named. Apart from `mllm.model.llm`, so that `--help` is answered without torch."""

DEFAULT_LLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
COLDEST = 1e-3
"""Below this temperature the likeliest token is taken: as good as the same, and logits divided by less overflow."""
