"""Drop-by-Drop: quantize an LLM once, run it at any precision."""
