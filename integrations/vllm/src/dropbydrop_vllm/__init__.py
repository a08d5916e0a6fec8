"""Drop-by-Drop checkpoints in vLLM, any level of them.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`) and then knows
`quant_method: dropbydrop` of config.json. Importing this package imports neither vLLM nor torch.

    config      what vLLM asks about the checkpoint: which layer is quantized, and how
    names       a layer of vLLM and the matrices it was merged from
    layers      linears, embedding and head
    ops         the product as one operator, safe to compile and to capture
    loader      reads the planes of one level, and nothing of the others
    requests    another level for single requests
"""

__all__ = ["register"]


def register() -> None:
    """Make vLLM know the format. Called in every process of vLLM; safe to call again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from . import loader, ops, requests
    from .config import DropByDropConfig

    register_quantization_config("dropbydrop")(DropByDropConfig)
    ops.register()
    loader.register()
    requests.register()
