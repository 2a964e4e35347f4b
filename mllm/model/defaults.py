"""What is used where nothing is named. Apart from `mllm.model.llm`, so that `--help` is answered without torch."""

DEFAULT_LLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
